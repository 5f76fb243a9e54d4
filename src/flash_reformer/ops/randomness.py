"""Randomness as a function of a seed and a place: nothing is stored to replay it, and no generator moves.

Seeds are int64 tensors of no dimensions that live on the CPU, so that a compiled graph takes them as inputs.
Letters: X any shape, W columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Dropout probabilities are rounded to multiples of one in so many: a decision takes 16 of a hash's 32 bits.
DROPOUT_STEPS = 2**16
_GOLDEN, _MIX_1, _MIX_2 = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_COLUMNS = 0x632BE59BD9B4E019
_HASH_1, _HASH_2 = 0x7FEB352D, 0x846CA68B - 2**32


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift in zeros, as for unsigned words."""
    width = 8 * x.element_size()
    return (x >> bits) & ((1 << (width - bits)) - 1)


def mix(seed: Tensor, steps_X: Tensor | int) -> Tensor:
    """Return well-mixed int64 words that are functions of the seed and each step (splitmix64; Steele et al., 2014)."""
    if isinstance(steps_X, int):
        advance: Tensor | int = ((steps_X + 1) * _GOLDEN + 2**63) % 2**64 - 2**63
    else:
        advance = (steps_X + 1) * _GOLDEN
    state = seed + advance
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def derive_seed(seed: Tensor, *path: int) -> Tensor:
    """Return a seed in ``[0, 2**63)`` that is a fixed, well-mixed function of ``seed`` and ``path``.

    One number drawn per forward is the root of all of that forward's private randomness; each consumer names its
    own branch (say, layer 3's rotations), so no two share a stream and nothing needs to be stored to replay one.

    >>> one = torch.tensor(1)
    >>> derive_seed(one, 0) == derive_seed(one, 0), derive_seed(one, 0) == derive_seed(one, 1)
    (tensor(True), tensor(False))
    """
    for step in path:
        seed = mix(seed, step)
    return _shift_right(seed, 1)


def derive_seeds(seed: Tensor, num_layers: int, num_branches: int) -> Tensor:
    """Return ``derive_seed(seed, layer, branch)`` for all of them, ``[layers, branches]``, where the seed is.

    >>> derive_seeds(torch.tensor(1), 3, 2)[2, 1] == derive_seed(torch.tensor(1), 2, 1)
    tensor(True)
    """
    layers_L1 = torch.arange(num_layers, device=seed.device).unsqueeze(-1)
    return _shift_right(mix(mix(seed, layers_L1), torch.arange(num_branches, device=seed.device)), 1)


def normal(seed: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return numbers from N(0, 1) as a function of the seed, on its device, by arithmetic alone (Box and Muller, 1958).

    Each 64-bit word makes two numbers out of its halves: a radius and an angle.
    """
    count = math.prod(shape)
    words = mix(seed, torch.arange((count + 1) // 2, device=seed.device))
    first, second = (half.to(torch.float32) for half in (_shift_right(words, 40), words & (2**24 - 1)))
    radius = torch.sqrt(-2.0 * torch.log((first + 0.5) * 2**-24))
    angle = second * (2 * math.pi * 2**-24)
    both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return both.flatten()[:count].view(*shape).to(dtype)


def keep_mask(seed: Tensor, rows_X: Tensor, width: int, p: float) -> Tensor:
    """Return bool ``[X, W]``: which entries of these rows dropout keeps, each with probability ``1 - p``.

    Row r is the same whatever other rows are asked for, so a kernel may go through a matrix in any order. Each 32-bit
    hash of (row, pair of columns) decides on two columns.
    """
    columns_Y = torch.arange((width + 1) // 2, device=rows_X.device)
    seed = seed.to(rows_X.device)
    words_XY = mix(seed, rows_X).to(torch.int32).unsqueeze(-1) ^ mix(seed ^ _COLUMNS, columns_Y).to(torch.int32)
    words_XY = words_XY * _HASH_1
    words_XY = (words_XY ^ _shift_right(words_XY, 15)) * _HASH_2
    words_XY = words_XY ^ _shift_right(words_XY, 16)
    low_XY, high_XY = words_XY & (DROPOUT_STEPS - 1), _shift_right(words_XY, 16)
    drawn_XW = torch.stack([low_XY, high_XY], dim=-1).flatten(-2)[..., :width]
    return drawn_XW >= round(p * DROPOUT_STEPS)


def kept_scale(p: float) -> float:
    """Return what kept entries are multiplied by, one over the probability of being kept; 1 where nothing is kept.

    >>> kept_scale(0.5), kept_scale(1.0)
    (2.0, 1.0)
    """
    kept = DROPOUT_STEPS - round(p * DROPOUT_STEPS)
    return DROPOUT_STEPS / kept if kept else 1.0


def dropout(x_XW: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return ``x`` with entries zeroed with probability ``p`` and the others scaled up; rows are numbered in order."""
    rows_X = torch.arange(x_XW[..., 0].numel(), device=x_XW.device).view(x_XW.shape[:-1])
    keep_XW = keep_mask(seed, rows_X, x_XW.shape[-1], p)
    return x_XW * (keep_XW.to(x_XW.dtype) * kept_scale(p))
