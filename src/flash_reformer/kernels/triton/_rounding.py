"""Rounding on the device."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from flash_reformer.kernels.triton._launch import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Return fp32 numbers in DTYPE, each rounded to the nearest, ties to even.

    That is what ``.to`` does on a device. Triton's interpreter cuts bf16 off instead, so there the bits are rounded
    first. What is no number stays none.
    """
    if _INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.add(bits, 0x7FFF + ((bits >> 16) & 1), sanitize_overflow=False) & -0x10000
        x = tl.where(x == x, bits, 0x7FC00000).to(tl.float32, bitcast=True)
    return x.to(DTYPE)
