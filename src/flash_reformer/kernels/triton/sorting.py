"""Stable sorting by counting, a byte at a time. Letters: B batch, H heads, R rounds, T positions; S = B H R segments.

A pass counts, for every tile of consecutive places, how often each digit occurs; sums over (digit, tile) say where a
tile's first key of a digit goes, and a tile's keys go there in order. The least significant digit comes first.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_reformer.kernels.triton._launch import UNSPECIALIZED, launch

_DIGITS = tl.constexpr(256)
#: Keys of a tile; keys whose ranks are found at once, by comparing each with each.
_TILE, _STEP = 2048, 128


@triton.jit
def _digits(KEYS, ORDER, segment, place, T, SHIFT: tl.constexpr, FIRST: tl.constexpr):
    """Return the positions that stand at these places of a segment, and the digits of their keys."""
    inside = place < T
    # The first pass finds the positions in order.
    position = place if FIRST else tl.load(ORDER + segment.to(tl.int64) * T + place, mask=inside, other=0).to(tl.int32)
    key = tl.load(KEYS + segment.to(tl.int64) * T + position, mask=inside, other=0).to(tl.int32)
    return position, (key >> SHIFT) & 255


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _count_kernel(KEYS, ORDER, COUNTS, T, tiles, SHIFT: tl.constexpr, FIRST: tl.constexpr, TILE: tl.constexpr):
    segment, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    place = tile * TILE + tl.arange(0, TILE)
    _, digit = _digits(KEYS, ORDER, segment, place, T, SHIFT, FIRST)
    counts = tl.histogram(digit, _DIGITS, mask=place < T)
    tl.store(COUNTS + (segment.to(tl.int64) * _DIGITS + tl.arange(0, _DIGITS)) * tiles + tile, counts)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _move_kernel(
    KEYS,
    ORDER,
    COUNTS,
    ENDS,
    MOVED,
    T,
    tiles,
    SHIFT: tl.constexpr,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    segment, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    entry = (segment.to(tl.int64) * _DIGITS + tl.arange(0, _DIGITS)) * tiles + tile
    # Where the tile's next key of each digit goes.
    next_free = tl.load(ENDS + entry) - tl.load(COUNTS + entry)
    i = tl.arange(0, STEP)
    for start in range(0, TILE, STEP):
        place = tile * TILE + start + i
        inside = place < T
        position, digit = _digits(KEYS, ORDER, segment, place, T, SHIFT, FIRST)
        # What lies beyond the end comes last, so it counts for nobody that is inside.
        before = (digit[None, :] == digit[:, None]) & (i[None, :] < i[:, None])
        goes_to = tl.gather(next_free, digit, 0) + tl.sum(before.to(tl.int32), 1)
        tl.store(MOVED + segment.to(tl.int64) * T + goes_to, position.to(MOVED.dtype.element_ty), mask=inside)
        next_free += tl.histogram(digit, _DIGITS, mask=inside)


def _by_counting(keys_BHRT: Tensor) -> Tensor:
    """Sort by bytes: two passes for int16, four for int32; keys are never negative. Nothing waits for the device."""
    keys_BHRT = keys_BHRT.contiguous()
    T = keys_BHRT.shape[-1]
    order_BHRT = torch.empty(keys_BHRT.shape, dtype=torch.int64, device=keys_BHRT.device)
    if keys_BHRT.numel() == 0:
        return order_BHRT
    S, tiles, passes = keys_BHRT.numel() // T, triton.cdiv(T, _TILE), keys_BHRT.element_size()
    counts_SDN = torch.empty((S, _DIGITS.value, tiles), dtype=torch.int32, device=keys_BHRT.device)
    # Two orders take turns; the last pass writes the result.
    between = [torch.empty_like(keys_BHRT, dtype=torch.int32) for _ in range(min(2, passes - 1))]
    source = keys_BHRT
    for number in range(passes):
        target = order_BHRT if number == passes - 1 else between[number % 2]
        which: dict[str, Any] = {
            "SHIFT": 8 * number,
            "FIRST": number == 0,
            "TILE": _TILE,
            "like": keys_BHRT,
            "num_warps": 4,
        }
        launch(_count_kernel, S * tiles, keys_BHRT, source, counts_SDN, T, tiles, **which)
        ends_SX = counts_SDN.view(S, -1).cumsum(-1, dtype=torch.int32)
        launch(_move_kernel, S * tiles, keys_BHRT, source, counts_SDN, ends_SX, target, T, tiles, STEP=_STEP, **which)
        source = target
    return order_BHRT


def _by_torch(keys_BHRT: Tensor) -> Tensor:
    return torch.sort(keys_BHRT, dim=-1, stable=True).indices.contiguous()


#: The one that runs: both give the same order, so only measurements on a GPU can decide. Until there are some, torch's.
_sort = _by_torch


@torch.library.custom_op("flash_reformer::triton_sort_positions", mutates_args=())
def _sort_positions(buckets_BHRT: Tensor) -> Tensor:
    assert buckets_BHRT.dtype in (torch.int16, torch.int32), "bucket numbers are int16 or int32"
    return _sort(buckets_BHRT)


@_sort_positions.register_fake
def _(buckets_BHRT: Tensor) -> Tensor:
    return buckets_BHRT.new_empty(buckets_BHRT.shape, dtype=torch.int64)


def sort_positions(buckets_BHRT: Tensor) -> Tensor:
    """Return, per batch, head and round, the positions in order of (bucket, position), int64 ``[B, H, R, T]``."""
    return _sort_positions(buckets_BHRT)
