"""Sorting positions by bucket (Reformer, section 2). Letters: B batch, H heads, R rounds, T positions."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_positions(buckets_BHRT: Tensor) -> Tensor:
    """Return, per batch, head and round, the positions in order of (bucket, position), int64 ``[B, H, R, T]``.

    >>> sort_positions(torch.tensor([[[[1, 0, 1, 0]]]])).tolist()
    [[[[1, 3, 0, 2]]]]
    """
    return torch.sort(buckets_BHRT, dim=-1, stable=True).indices


def invert_permutation(permutation_XT: Tensor) -> Tensor:
    """Return the inverse of each permutation along the last dimension: where each position went.

    >>> invert_permutation(torch.tensor([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    places = torch.arange(permutation_XT.shape[-1], device=permutation_XT.device).expand(permutation_XT.shape)
    return torch.empty_like(permutation_XT).scatter_(-1, permutation_XT, places)
