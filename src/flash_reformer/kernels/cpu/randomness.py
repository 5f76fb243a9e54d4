"""Dropout masks by 32-bit words in place. X any shape, W columns, Y pairs of columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_STEPS = 2**16
_GOLDEN, _MIX_1, _MIX_2 = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_COLUMNS = 0x632BE59BD9B4E019
_HASH_1, _HASH_2 = 0x7FEB352D, 0x846CA68B - 2**32
#: Entries of one block of :func:`dropout`: what the second-level caches hold beside their masks.
_BLOCK = 2**18


def _splitmix(seed: Tensor, steps_X: Tensor) -> Tensor:
    state = steps_X.add(1).mul_(_GOLDEN).add_(seed)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2), (31, 1)):
        state.bitwise_xor_((state >> bits).bitwise_and_((1 << (64 - bits)) - 1)).mul_(factor)
    return state.to(torch.int32)


def keep_mask(seed: Tensor, rows_X: Tensor, width: int, p: float) -> Tensor:
    """Return bool ``[X, W]``: which entries of these rows dropout keeps, each with probability ``1 - p``."""
    columns_Y = torch.arange((width + 1) // 2)
    words_XY = _splitmix(seed, rows_X).unsqueeze(-1) ^ _splitmix(seed ^ _COLUMNS, columns_Y)
    shifted_XY = torch.empty_like(words_XY)
    words_XY.mul_(_HASH_1)
    torch.bitwise_right_shift(words_XY, 15, out=shifted_XY)
    words_XY.bitwise_xor_(shifted_XY.bitwise_and_(2**17 - 1)).mul_(_HASH_2)
    torch.bitwise_right_shift(words_XY, 16, out=shifted_XY)
    words_XY.bitwise_xor_(shifted_XY.bitwise_and_(2**16 - 1))
    # The two halves as signed numbers: what is drawn, less half the steps. int16 comparisons know no 2**16.
    drawn_XW = words_XY.view(torch.int16)
    threshold = round(p * _STEPS)
    if threshold in (0, _STEPS):
        return torch.full((*rows_X.shape, width), threshold == 0)
    # Halves count from 0 to 2**16 - 1; as int16 those from 2**15 on are negative. Flipping the top bit keeps order.
    return drawn_XW.bitwise_xor_(-(2**15)).ge(threshold - 2**15)[..., :width]


def kept_scale(p: float) -> float:
    """Return what kept entries are multiplied by, one over the probability of being kept; 1 where nothing is kept."""
    kept = _STEPS - round(p * _STEPS)
    return _STEPS / kept if kept else 1.0


@torch.library.custom_op("flash_reformer::cpu_dropout", mutates_args=())
def _dropout(x_XW: Tensor, p: float, seed: Tensor) -> Tensor:
    result_XW = torch.empty(x_XW.shape, dtype=x_XW.dtype)
    flat, out = x_XW.reshape(-1, x_XW.shape[-1]), result_XW.view(-1, x_XW.shape[-1])
    rows = max(1, _BLOCK // flat.shape[1])
    for start in range(0, flat.shape[0], rows):
        stop = min(start + rows, flat.shape[0])
        keep = keep_mask(seed, torch.arange(start, stop), flat.shape[1], p)
        torch.mul(flat[start:stop], keep, out=out[start:stop])
        out[start:stop].mul_(kept_scale(p))
    return result_XW


@_dropout.register_fake
def _(x_XW: Tensor, p: float, seed: Tensor) -> Tensor:
    return x_XW.new_empty(x_XW.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, grad_XW: Tensor) -> tuple[Tensor, None, None]:
    # Each entry is multiplied by a constant, so the gradient is.
    return _dropout(grad_XW, ctx.p, ctx.saved_tensors[0]), None, None


_dropout.register_autograd(_dropout_backward, setup_context=_remember)


def dropout(x_XW: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return ``x`` with entries zeroed with probability ``p`` and the others scaled up; rows are numbered in order."""
    return _dropout(x_XW, p, seed)
