"""An addition to a residual stream that loses nothing, in one pass; in plain tensor operations it takes a dozen."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from flash_reformer.kernels.triton._launch import UNSPECIALIZED, launch

#: Numbers of one program.
_BLOCK = 1024


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _add_kernel(X, LOW, VALUE, RESULT, LOST, N, NEGATED: tl.constexpr, ONE_LOW: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < N
    x = tl.load(X + place, mask=inside, other=0.0)
    value = tl.load(VALUE + place, mask=inside, other=0.0).to(tl.float32)
    if NEGATED:
        value = -value
    if ONE_LOW:
        low = tl.load(LOW)
    else:
        low = tl.load(LOW + place, mask=inside, other=0.0)
    # Two-sum, as in ``residual.add``: additions only, so that no compiler fuses any.
    total = x + value
    back = total - x
    lost = (x - (total - back)) + (value - back) + low
    result = total + lost
    tl.store(RESULT + place, result, mask=inside)
    tl.store(LOST + place, lost - (result - total), mask=inside)


def add_streams(x: Tensor, low: Tensor, value: Tensor, negated: bool, result: Tensor, lost: Tensor) -> None:
    """Write ``x + low + value`` to ``result`` and what rounding lost to ``lost``; they may be ``x`` and ``low``.

    All but ``value`` are fp32; results are contiguous.
    """
    # The first low part is one number of stride 0, which need not become a stream to be read.
    one_low = not any(low.stride())
    pointers = (x.contiguous(), low if one_low else low.contiguous(), value.contiguous(), result, lost)
    options = {"NEGATED": negated, "ONE_LOW": one_low, "BLOCK": _BLOCK}
    launch(_add_kernel, triton.cdiv(x.numel(), _BLOCK), *pointers, x.numel(), **options, like=x, num_warps=4)
