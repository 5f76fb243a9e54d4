"""What a layer keeps of the tokens it has seen, so that the next one costs no more than its window.

Nothing counts that lies beyond a row's length, as the cache knows it, so a step that fails half-way leaves a cache as
it was. Storage grows by a quarter at a time: a token's share of the copying is constant.

Letters: B batch, H heads, R rounds, D head size, T positions, X any trailing shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: Storage that grows has room for so many positions at least.
LEAST_CAPACITY = 64


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Keep what is made inside free of graphs, and of inference mode, outside which it could not be written to."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def capacity_for(needed: int) -> int:
    """Return for how many positions room is made when ``needed`` do not fit."""
    return needed + max(LEAST_CAPACITY, needed // 4)


def grow(storage: Tensor, needed: int, dim: int) -> Tensor:
    """Return the storage with room for ``needed`` positions along ``dim``; new room holds zeros, never NaN."""
    have = storage.shape[dim]
    if needed <= have:
        return storage
    shape = list(storage.shape)
    shape[dim] = capacity_for(needed)
    with ordinary_tensors():
        grown = storage.new_zeros(shape)
        grown.narrow(dim, 0, have).copy_(storage)
    return grown


@dataclass(frozen=True)
class Fill:
    """How a full forward hands what it computed to the cache.

    Attributes:
        states: the cache's states, one per layer.
        rows: the rows of the cache to fill.
        source: for each of them, which sequence of the forward's batch it is.
        lengths: for each of them, how many tokens.
        places: ``[batch, T]``, the columns of each sequence's tokens, in order; None where they come first.
        all_lengths: the length of every row of the cache once all are filled.
    """

    states: Sequence[Any]
    rows: list[int]
    source: list[int]
    lengths: list[int]
    places: Tensor | None
    all_lengths: list[int]

    def joined(self, key_BTHD: Tensor, value_BTHD: Tensor, i: int, start: int) -> Tensor:
        """Return keys and values ``[H, T, 2D]`` of the i-th row's tokens from ``start`` on."""
        sequence, stop = self.source[i], self.lengths[i]
        index = slice(start, stop) if self.places is None else self.places[sequence, start:stop]
        return torch.cat([key_BTHD[sequence, index], value_BTHD[sequence, index]], dim=-1).detach().transpose(0, 1)


def room_for(like_BTHD: Tensor, batch_size: int, capacity: int) -> Tensor:
    """Return room for keys and values, ``[B, H, capacity, 2D]``, in the dtype and on the device of ``like``."""
    H, D = like_BTHD.shape[-2:]
    with ordinary_tensors():
        return like_BTHD.new_zeros(batch_size, H, capacity, 2 * D)


class KeyValues:
    """Keys and values side by side, ``[B, H, T, 2D]``: one write, one gather and one growth serve both."""

    def __init__(self) -> None:
        self.storage: Tensor | None = None

    @property
    def keys(self) -> Tensor | None:
        """``[B, H, capacity, D]``, a view."""
        return None if self.storage is None else self.storage.chunk(2, dim=-1)[0]

    @property
    def values(self) -> Tensor | None:
        """``[B, H, capacity, D]``, a view."""
        return None if self.storage is None else self.storage.chunk(2, dim=-1)[1]


def write(storage_BHTX: Tensor, key_BTHD: Tensor, value_BTHD: Tensor, places: list[int]) -> None:
    """Write new tokens of each row from its place on."""
    new = torch.cat([key_BTHD, value_BTHD], dim=-1).detach().transpose(1, 2)
    T = new.shape[2]
    if len(set(places)) == 1:
        storage_BHTX[:, :, places[0] : places[0] + T] = new
        return
    for row, place in enumerate(places):
        storage_BHTX[row, :, place : place + T] = new[row]
