"""Where kernels run, and how one is launched."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _probe_kernel():  # type: ignore[no-untyped-def]
    pass


#: Whether kernels run in triton's interpreter, on CPU tensors. A choice of triton's, made when it is imported.
INTERPRETED = not isinstance(_probe_kernel, triton.JITFunction)

#: Arguments that follow the lengths of sequences. Kernels are not compiled anew where one of them is 1, or a multiple
#: of 16, as triton would otherwise do.
UNSPECIALIZED = (
    "plane length num_chunks chunks_per_round tiles_here first_tile turns blocks N num_tokens column_tiles T tiles "
    "ignore_index chunk_length"
).split()

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
#: What the kernels take; they accumulate in fp32.
DTYPES = tuple(_DTYPES)


def dtype_of(x: Tensor) -> tl.dtype:
    """Return triton's name for the dtype of a tensor."""
    return _DTYPES[x.dtype]


def dot_dtype(x: Tensor) -> tl.dtype:
    """Return the dtype in which matrix products take numbers that have the dtype of ``x``.

    The interpreter multiplies with numpy, which has no bf16: there numbers are rounded, then widened. Products are
    exact and sums are fp32 either way.
    """
    return tl.float32 if INTERPRETED else dtype_of(x)


def block_of(size: int, least: int = 16) -> int:
    """Return the power of two that holds ``size``; matrix products take no fewer than 16."""
    return max(least, triton.next_power_of_2(size))


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether matrix products read their operands from shared memory, as on Hopper and on data centres' Blackwell.

    The interpreter goes the same way.
    """
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def seed_on(device: torch.device, seed: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return the seed where kernels can read it; without one, any pointer does."""
    return stand_in if seed is None else seed.to(device, non_blocking=True)


def launch(
    kernel: Any, programs: int, *args: Any, like: Tensor, num_warps: int, num_stages: int = 2, **rest: Any
) -> None:
    """Run a kernel in so many programs on the device of ``like``, whatever the current one is.

    The choice of fused multiply-adds is named because triton announces another default.
    """
    if programs == 0:
        return
    on_device = torch.cuda.device(like.device) if like.device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        kernel[(programs,)](*args, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **rest)
