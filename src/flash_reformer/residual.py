"""Additions to a residual stream that lose nothing: the number that rounding misses is kept beside the sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_reformer.buffers import lasting_like

#: Numbers that one pass of :func:`add_in_pieces` works on: its seven tensors then stay in a CPU's cache. Elsewhere a
#: pass is as large as its temporaries may be, since launching it takes time too.
_PIECE, _PIECE_ON_DEVICE = 2**16, 2**25


def add(x: Tensor, low: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return ``x + low + value`` rounded to x's dtype, and as its low part what that rounding lost.

    Gradients pass as through ``x + value``: the low parts are constants.
    """
    total = x + value
    if low is None:
        return total, None
    with torch.no_grad():
        # Two-sum: x - (total - back) + (value - back) is exactly what ``total`` misses.
        back = total - x
        lost = (x - (total - back)).add_(value.to(total.dtype).sub(back)).add_(low)
    result = total + lost
    with torch.no_grad():
        lost.sub_(result - total)
    return result, lost


def add_in_pieces(
    x: Tensor,
    low: Tensor,
    value: Tensor,
    *,
    negated: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
    fused: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Do what :func:`add` does, to the bit, without autograd and some positions (dim 1) at a time.

    ``negated`` adds ``-value``. ``out`` are tensors to write to. ``fused(x, low, value, negated, result, lost)`` does
    all of it in one pass.
    """
    result, lost = (lasting_like(x), lasting_like(x)) if out is None else out
    if fused is not None and result.is_contiguous() and lost.is_contiguous():
        fused(x, low, value, negated, result, lost)
        return result, lost
    piece = _PIECE if x.device.type == "cpu" else _PIECE_ON_DEVICE
    positions = max(1, piece * x.shape[1] // max(1, x.numel()))
    pieces = (tensor.split(positions, dim=1) for tensor in (x, low, value, result, lost))
    for x_, low_, value_, result_, lost_ in zip(*pieces, strict=True):
        after, after_low = add(x_, low_, -value_ if negated else value_)
        assert after_low is not None
        result_.copy_(after)
        lost_.copy_(after_low)
    return result, lost
