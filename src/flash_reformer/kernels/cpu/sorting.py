"""Stable sorting by radix. Letters: B batch, H heads, R rounds, T positions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _argsort(keys: np.ndarray) -> np.ndarray:
    """Sort along the last axis. numpy's stable sort is a radix sort for 16-bit keys, and only for them."""
    if keys.dtype.itemsize <= 2:
        return np.argsort(keys, axis=-1, kind="stable")
    # Least significant half first; keys are bucket numbers, never negative.
    order = np.argsort((keys & 0xFFFF).astype(np.uint16), axis=-1, kind="stable")
    high = np.take_along_axis(keys >> 16, order, axis=-1).astype(np.uint16)
    return np.take_along_axis(order, np.argsort(high, axis=-1, kind="stable"), axis=-1)


@torch.library.custom_op("flash_reformer::cpu_sort_positions", mutates_args=())
def _sort_positions(buckets_BHRT: Tensor) -> Tensor:
    assert buckets_BHRT.dtype in (torch.int16, torch.int32), "bucket numbers are int16 or int32"
    return torch.from_numpy(_argsort(buckets_BHRT.contiguous().numpy()))


@_sort_positions.register_fake
def _(buckets_BHRT: Tensor) -> Tensor:
    return buckets_BHRT.new_empty(buckets_BHRT.shape, dtype=torch.int64)


def sort_positions(buckets_BHRT: Tensor) -> Tensor:
    """Return, per batch, head and round, the positions in order of (bucket, position), int64 ``[B, H, R, T]``."""
    return _sort_positions(buckets_BHRT)
