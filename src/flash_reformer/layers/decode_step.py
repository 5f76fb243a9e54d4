"""What one cached forward knows and every layer needs: who is how long, and where a regime of attention ends.

Every row is on its own: new tokens of row b stand at positions ``lengths[b], lengths[b] + 1, ...``, whatever the other
rows do. A row with fewer new tokens than others is filled up at its end; the filling is computed like tokens that
come later, is read by nobody, and is overwritten when the row goes on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_reformer.layers.call import Call

#: Queries that gather keys of their own are computed so many at a time.
WINDOW_BLOCK = 64
#: Queries that share their keys, so many at a time.
SHARED_BLOCK = 256

Factors = tuple[int, ...]


@dataclass(frozen=True)
class Span:
    """New tokens ``start`` to ``stop`` of some rows (None: all), all in one regime.

    ``factors`` has a bucket count per row where they attend by hashing; it is None where they attend exactly.
    """

    start: int
    stop: int
    rows: tuple[int, ...] | None
    factors: tuple[Factors, ...] | None


@dataclass(frozen=True)
class Layout:
    """At which length rows are laid out, and up to which they attend exactly.

    Attributes:
        exact_below: up to this length every layer attends exactly (``full_attention_below``).
        smallest_chunk: the smallest chunk length of all layers; None where there are no chunks.
        multiple: rows longer than that are padded to a multiple of this, of which every chunk length is a divisor.
    """

    exact_below: int
    smallest_chunk: int | None
    multiple: int

    def padded(self, length: int) -> int:
        """Return the length at which a row of ``length`` tokens is laid out."""
        if length <= self.exact_below or self.smallest_chunk is None or length <= self.smallest_chunk:
            return length
        # Written so that a compiler sees a positive multiple whatever the length.
        return (length + self.multiple - 1) // self.multiple * self.multiple

    def exact_up_to(self, chunk_length: int | None) -> float:
        """Return the length up to which a layer with this chunk length attends exactly."""
        if chunk_length is None or self.smallest_chunk is None:
            return float("inf")
        # A longer row is padded to ``multiple``, which fits the chunk only if it is the chunk.
        return max(self.exact_below, chunk_length if self.multiple == chunk_length else self.smallest_chunk)


class Step:
    """One cached forward of ``new`` columns.

    Args:
        call: the facts that it shares with a full forward; its mask and bucket factors say nothing here.
        layout: how rows are laid out.
        lengths: tokens of each row before this forward.
        counts: how many of the new columns are tokens, per row.
        new: new columns.
        bucket_factors: the bucket count of a row at a length.
        device: where tensors go.
    """

    def __init__(
        self,
        call: Call,
        layout: Layout,
        lengths: list[int],
        counts: list[int],
        new: int,
        bucket_factors: Callable[[int, int], Factors],
        device: torch.device,
    ) -> None:
        self.call = call
        self.layout = layout
        self.lengths = lengths
        self.counts = counts
        self.new = new
        self.device = device
        self._bucket_factors = bucket_factors
        #: Whether all rows are of one length, so that slices and one row of indices do.
        self.uniform = len(set(lengths)) == 1
        self.lengths_X = torch.tensor(lengths[:1] if self.uniform else lengths, device=device)
        self._shared: dict[object, Tensor] = {}
        self._spans: dict[tuple[int | None, bool], list[Span]] = {}

    def once(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """Return what ``make`` makes, made once for all layers that ask under the same key."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def lengths_after(self, start: int, stop: int, rows: tuple[int, ...] | None = None) -> Tensor:
        """Return ``[X, M]``: the rows' lengths after each of the new tokens ``start`` to ``stop``."""

        def lengths() -> Tensor:
            some = self.lengths_X
            if rows is not None:
                some = torch.tensor([self.lengths[row] for row in rows], device=self.device)
            return some.unsqueeze(-1) + torch.arange(start + 1, stop + 1, device=self.device)

        return self.once(("lengths", start, stop, rows), lengths)

    def padded_after(self, start: int, stop: int, rows: tuple[int, ...] | None = None) -> Tensor:
        """Return ``[X, M]``: at which lengths rows that do not attend exactly are laid out then."""
        lengths, multiple = self.lengths_after(start, stop, rows), self.layout.multiple
        return self.once(("padded", start, stop, rows), lambda: -(-lengths // multiple) * multiple)

    def _regime(self, row: int, length: int, limit: float, hashed: bool) -> Factors | None:
        if length <= limit:
            return None
        return self._bucket_factors(row, length) if hashed else ()

    def spans(self, chunk_length: int | None, *, hashed: bool) -> list[Span]:
        """Cut the new tokens where a row's regime changes: from exact to chunked or, if ``hashed``, its buckets."""
        key = (chunk_length, hashed)
        if key not in self._spans:
            self._spans[key] = self._cut(chunk_length, hashed)
        return self._spans[key]

    def _cut(self, chunk_length: int | None, hashed: bool) -> list[Span]:
        limit = self.layout.exact_up_to(chunk_length)
        regimes = [self._regimes_of(row, limit, hashed) for row in range(len(self.lengths))]
        cuts = sorted({start for changes in regimes for start in changes} | {self.new})
        spans = []
        for start, stop in itertools.pairwise(cuts):
            now = [changes[max(s for s in changes if s <= start)] for changes in regimes]
            for exact in (True, False):
                rows = tuple(b for b, factors in enumerate(now) if (factors is None) is exact)
                if rows:
                    factors = None if exact else tuple(now[b] or () for b in rows)
                    spans.append(Span(start, stop, None if len(rows) == len(now) else rows, factors))
        return spans

    def _regimes_of(self, row: int, limit: float, hashed: bool) -> dict[int, Factors | None]:
        """Return at which of the new tokens a regime of this row begins."""
        before = self.lengths[row]
        candidates = {0}
        if before + 1 <= limit < before + self.new:
            candidates.add(int(limit) - before)
        if hashed:
            # A bucket count follows the layout's length, so it changes there only.
            multiple = self.layout.multiple
            first = -(-(before + 1) // multiple) * multiple
            candidates.update(range(first - before, self.new, multiple))
        changes: dict[int, Factors | None] = {}
        last: object = self
        for start in sorted(candidates):
            regime = self._regime(row, before + start + 1, limit, hashed)
            if regime != last:
                changes[start] = last = regime
        return changes
