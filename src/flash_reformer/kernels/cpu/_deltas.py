"""What attention's backward needs of its output: a number per row. Letters as in ``attention.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _dots(x_XD: Tensor, y_XD: Tensor, dtype: torch.dtype, block: int = 2**13) -> Tensor:
    """Return the dot product of every row of one matrix with that of the other, without a product of their size."""
    dots = [(x.to(dtype) * y.to(dtype)).sum(-1) for x, y in zip(x_XD.split(block), y_XD.split(block), strict=True)]
    return torch.cat(dots)


@torch.library.custom_op("flash_reformer::cpu_row_dots", mutates_args=())
def _row_dots(x_BTHD: Tensor, y_BTHD: Tensor) -> Tensor:
    D = y_BTHD.shape[-1]
    return _dots(x_BTHD.reshape(-1, D), y_BTHD.reshape(-1, D), torch.promote_types(y_BTHD.dtype, torch.float32))


@_row_dots.register_fake
def _(x_BTHD: Tensor, y_BTHD: Tensor) -> Tensor:
    B, T, H, _D = y_BTHD.shape
    return y_BTHD.new_empty((B * T * H,), dtype=torch.promote_types(y_BTHD.dtype, torch.float32))


def saved_with_delta(ctx: Any, d_out_BTHD: Tensor) -> tuple[Tensor, ...]:
    """Return delta (the row sums of dO * O), and what was saved besides O.

    O itself is let go where autograd is about to, too: it would take a third of what a backward needs.
    """
    out_BTHD, *others = ctx.saved_tensors
    delta_X = _row_dots(d_out_BTHD, out_BTHD)
    let_go = getattr(ctx, "maybe_clear_saved_tensors", None)
    if let_go is not None and not torch.compiler.is_compiling():
        let_go()
    return delta_X, *others
