"""Slabs: as many chunks at a time as fit the cache, with the chunks around them.

Letters: G rings (one per batch row and head), N chunks of a ring, C chunk length, n chunks of a slab, W keys of a
window, X any trailing shape.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Scores of one slab. Two such fp32 buffers fill the second-level caches of two cores; fewer cost more calls.
SLAB_SCORES = 2**19


@dataclass(frozen=True)
class Window:
    """How many chunks a chunk sees, and what it may not look at."""

    chunk_length: int
    before: int
    after: int
    wrap_around: bool = True

    @property
    def chunks(self) -> int:
        return self.before + 1 + self.after

    @property
    def width(self) -> int:
        """W, the number of keys in a window."""
        return self.chunks * self.chunk_length


@dataclass(frozen=True)
class Slab:
    """Chunks ``first`` to ``last`` of the rings ``rings``; ``whole`` if these are all chunks of each."""

    rings: slice
    first: int
    last: int
    whole: bool
    window: Window

    @property
    def num_rings(self) -> int:
        return int(self.rings.stop - self.rings.start)

    def own(self, x_GNCX: Tensor) -> Tensor:
        """Return the slab's own chunks ``[n, C, ...]``."""
        return x_GNCX[self.rings, self.first : self.last].flatten(0, 1)

    def around(self, x_GNCX: Tensor) -> Tensor:
        """Return all chunks that the slab's windows touch, each once: its own and, unless whole, neighbours."""
        if self.whole:
            return x_GNCX[self.rings].flatten(0, 1)
        x_NCX, N = x_GNCX[self.rings.start], x_GNCX.shape[1]
        start, stop = self.first - self.window.before, self.last + self.window.after
        if start >= 0 and stop <= N:
            return x_NCX[start:stop]
        return x_NCX.index_select(0, torch.arange(start, stop, device=x_NCX.device) % N)

    def windows(self, around_XCX: Tensor) -> Tensor:
        """Return the window of every chunk, ``[n, W, ...]``, from what :meth:`around` returned, row by row."""
        C, window = self.window.chunk_length, self.window
        if not self.whole:
            # Windows overlap, so each is a view that begins one chunk after the one before.
            flat = around_XCX.flatten(0, 1)
            n, inner = self.last - self.first, flat.stride()
            return flat.as_strided((n, window.width, *flat.shape[1:]), (C * inner[0], *inner))
        if window.chunks == 1:
            return around_XCX
        x_GNCX = around_XCX.unflatten(0, (self.num_rings, -1))
        offsets = range(-window.before, window.after + 1)
        return torch.cat([x_GNCX.roll(-o, dims=1) if o else x_GNCX for o in offsets], dim=2).flatten(0, 1)

    def fold(self, windows_nWX: Tensor, out_XCX: Tensor) -> Tensor:
        """Write to ``out``, laid out as by :meth:`around`, the sums of what windows hold for a chunk, and return it."""
        C, window = self.window.chunk_length, self.window
        parts = windows_nWX.unflatten(1, (window.chunks, C))
        if self.whole:
            parts_GN = parts.unflatten(0, (self.num_rings, -1))
            out_GN = out_XCX.unflatten(0, (self.num_rings, -1)).copy_(parts_GN[:, :, window.before])
            for place in range(window.chunks):
                if place != window.before:
                    out_GN += parts_GN[:, :, place].roll(place - window.before, dims=1)
            return out_XCX
        n = self.last - self.first
        out_XCX[:n].copy_(parts[:, 0])
        out_XCX[n:].zero_()
        for place in range(1, window.chunks):
            out_XCX[place : place + n] += parts[:, place]
        return out_XCX


def slabs(num_rings: int, chunks_per_round: int, num_rounds: int, window: Window) -> Iterator[Slab]:
    """Cut rings of ``num_rounds * chunks_per_round`` chunks: several whole ones, or parts of one within a round."""
    N = chunks_per_round * num_rounds
    most = max(1, SLAB_SCORES // (window.chunk_length * window.width))
    # A part reads neighbours on the ring once each; a ring that is no longer than a window meets itself.
    if most >= N or 2 * window.chunks > N:
        together = max(1, most // max(1, N))
        for ring in range(0, num_rings, together):
            yield Slab(slice(ring, min(ring + together, num_rings)), 0, N, True, window)
        return
    for ring in range(num_rings):
        for start in range(0, N, chunks_per_round):
            pieces = -(-chunks_per_round // most)
            for piece in range(pieces):
                first = start + piece * chunks_per_round // pieces
                last = start + (piece + 1) * chunks_per_round // pieces
                yield Slab(slice(ring, ring + 1), first, last, False, window)
