"""What an LSH layer keeps between steps of decoding: keys, values, and the order of its tokens by bucket.

Letters: B batch, H heads, R rounds, D head size, T positions, M queries, X keys of a query, K buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_reformer import functional
from flash_reformer.layers.decode_step import Factors, Span, Step
from flash_reformer.layers.decode_storage import Fill, KeyValues, capacity_for, grow, ordinary_tensors, room_for, write

#: Bounds on how many recent positions may stand beside an order before they are merged into it.
_FEWEST_RECENT, _MOST_RECENT = 32, 1024


class LSHState(KeyValues):
    """Keys (unit vectors) and values of all tokens, and their order by bucket per head and round.

    Of row b, ``hashed[b]`` positions have a bucket, and the first ``indexed[b]`` stand in the order; those after them
    are recent (see :mod:`flash_reformer.ops.decoding`).

    A token takes ``H * (2 * D * element_size + R * (4 + 2))`` bytes (4 + 4 with more than 32,766 buckets), a row and
    head and round ``4 * (K + 2)`` more; capacity may exceed the tokens by a quarter.
    """

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.buckets: Tensor | None = None
        self.order: Tensor | None = None
        self.starts: Tensor | None = None
        self.hashed: list[int] = []
        self.indexed: list[int] = []
        self.factors: list[Factors | None] = []
        self.rotations: dict[Factors, Tensor] = {}

    def _make_room(self, like_BTHD: Tensor, batch_size: int, needed: int) -> Tensor:
        if self.storage is None:
            self.storage = room_for(like_BTHD, batch_size, capacity_for(needed))
            self.hashed, self.indexed, self.factors = [0] * batch_size, [0] * batch_size, [None] * batch_size
        self.storage = grow(self.storage, needed, 2)
        return self.storage

    def _make_index_room(self, num_hashes: int, factors: Sequence[Factors], needed: int) -> None:
        """Have room for buckets and order of ``needed`` positions and for the widest of these bucket counts."""
        assert self.storage is not None
        B, H = self.storage.shape[:2]
        device = self.storage.device
        dtype = max((functional.bucket_dtype(f) for f in factors), key=lambda dtype: dtype.itemsize)
        width = 2 + max(math.prod(f) for f in factors)
        if self.buckets is None or self.order is None or self.starts is None:
            shape = (B, H, num_hashes, self.storage.shape[2])
            with ordinary_tensors():
                self.buckets = torch.zeros(shape, dtype=dtype, device=device)
                self.order = torch.zeros(shape, dtype=torch.int32, device=device)
                self.starts = torch.zeros((B, H, num_hashes, width), dtype=torch.int32, device=device)
        if needed > self.order.shape[-1]:
            self.buckets, self.order = grow(self.buckets, needed, 3), grow(self.order, needed, 3)
        if dtype.itemsize > self.buckets.dtype.itemsize or width > self.starts.shape[-1]:
            with ordinary_tensors():
                self.buckets = self.buckets.to(torch.promote_types(self.buckets.dtype, dtype))
                wider = self.starts[..., -1:].expand(-1, -1, -1, max(0, width - self.starts.shape[-1]))
                self.starts = torch.cat([self.starts, wider], dim=-1)

    def rotations_for(self, factors: Factors, step: Step, like_BTHD: Tensor) -> Tensor:
        """Return the rotations of this layer for a bucket count: the same as long as the cache lives."""
        if factors not in self.rotations:
            self.rotations[factors] = functional.draw_rotations(
                step.call.seed_for_rotations(self.layer_idx),
                like_BTHD.shape[2],
                like_BTHD.shape[3],
                step.call.num_hashes,
                factors,
                like_BTHD.dtype,
                like_BTHD.device,
            )
        return self.rotations[factors]

    def fill(
        self,
        key_BTHD: Tensor,
        value_BTHD: Tensor,
        fill: Fill,
        buckets_BHRT: Tensor | None,
        sorted_positions_BHRT: Tensor | None,
        factors: Factors,
    ) -> None:
        """Keep each row of a full forward; its buckets and order too where rows did not share it with pads."""
        needed = max(fill.all_lengths)
        storage = self._make_room(key_BTHD, len(fill.all_lengths), needed)
        for i, (row, length) in enumerate(zip(fill.rows, fill.lengths, strict=True)):
            storage[row, :, :length] = fill.joined(key_BTHD, value_BTHD, i, 0)
        if buckets_BHRT is None or sorted_positions_BHRT is None or fill.places is not None:
            return
        self._make_index_room(buckets_BHRT.shape[2], [factors], needed)
        assert self.buckets is not None
        for row, sequence, length in zip(fill.rows, fill.source, fill.lengths, strict=True):
            self.buckets[row, ..., :length] = buckets_BHRT[sequence, ..., :length]
            self.hashed[row], self.factors[row] = length, factors
            # Pads of the forward stand behind all tokens.
            self._set_order(row, sorted_positions_BHRT[sequence, ..., :length])

    def _set_order(self, row: int, sorted_positions_HRT: Tensor) -> None:
        assert self.buckets is not None
        assert self.order is not None
        assert self.starts is not None
        length = sorted_positions_HRT.shape[-1]
        self.order[row, ..., :length] = sorted_positions_HRT
        sorted_buckets = self.buckets[row].gather(-1, sorted_positions_HRT)
        self.starts[row] = functional.bucket_starts(sorted_buckets, self.starts.shape[-1])
        self.indexed[row] = length

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget what is known of positions beyond these lengths."""
        self.hashed = [min(pair) for pair in zip(self.hashed, lengths, strict=True)]
        if all(indexed <= length for indexed, length in zip(self.indexed, lengths, strict=True)):
            return
        assert self.order is not None
        assert self.starts is not None
        kept = torch.tensor(lengths, device=self.order.device)
        counted = torch.tensor(self.indexed, device=self.order.device)
        N = max(self.indexed)
        left, starts = functional.drop_positions(self.order[..., :N], self.starts, counted, kept)
        self.order[..., :N] = left
        self.starts[:] = starts
        self.indexed = [min(pair) for pair in zip(self.indexed, lengths, strict=True)]

    def append(self, key_BTHD: Tensor, value_BTHD: Tensor, step: Step) -> None:
        """Keep the new tokens; their place in the order comes with :meth:`hash_span`."""
        storage = self._make_room(key_BTHD, len(step.lengths), max(step.lengths) + step.new)
        self.crop(step.lengths)
        write(storage, key_BTHD, value_BTHD, step.lengths)

    def hash_span(self, qk_BTHD: Tensor, span: Span, step: Step) -> None:
        """Give a bucket to the new tokens of a span, and to those before that have none for the span's bucket count."""
        assert span.factors is not None
        rows = range(len(step.lengths)) if span.rows is None else span.rows
        needed = max(step.lengths) + step.new
        self._make_index_room(step.call.num_hashes, span.factors, needed)
        assert self.buckets is not None
        assert self.storage is not None
        for row, factors in zip(rows, span.factors, strict=True):
            begin = step.lengths[row] + span.start
            if self.factors[row] != factors:
                self.factors[row], self.hashed[row], self.indexed[row] = factors, 0, 0
            if self.hashed[row] < begin:
                missing = slice(self.hashed[row], begin)
                keys_1THD = self.storage.chunk(2, dim=-1)[0][row : row + 1, :, missing].transpose(1, 2)
                self.buckets[row, ..., missing] = self._hash(keys_1THD, factors, step)[0]
            if self.indexed[row] == 0:
                upto = min(begin, step.lengths[row] + step.counts[row])
                self._set_order(row, functional.sort_positions(self.buckets[row : row + 1, ..., :upto])[0])
            self.hashed[row] = begin + span.stop - span.start
        new = slice(span.start, span.stop)
        if span.rows is None and step.uniform and len(set(span.factors)) == 1:
            place = step.lengths[0] + span.start
            hashed = self._hash(qk_BTHD[:, new], span.factors[0], step)
            self.buckets[..., place : place + span.stop - span.start] = hashed
            return
        for row, factors in zip(rows, span.factors, strict=True):
            place = step.lengths[row] + span.start
            hashed = self._hash(qk_BTHD[row : row + 1, new], factors, step)
            self.buckets[row, ..., place : place + span.stop - span.start] = hashed[0]

    def _hash(self, vectors_BTHD: Tensor, factors: Factors, step: Step) -> Tensor:
        rotations = self.rotations_for(factors, step, vectors_BTHD)
        return functional.hash_vectors(vectors_BTHD, rotations, factors, backend=step.call.backend)

    def windows(self, span: Span, start: int, stop: int, step: Step, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Return positions ``[B, H, M, X]`` in the windows of tokens ``start`` to ``stop``, and which are visible."""
        rows = list(range(len(step.lengths))) if span.rows is None else list(span.rows)
        self._merge(rows, start, step)
        assert self.buckets is not None
        assert self.order is not None
        assert self.starts is not None
        first = [self.indexed[row] for row in rows]
        recent = [step.lengths[row] + stop - f for row, f in zip(rows, first, strict=True)]
        order, starts, buckets = self.order, self.starts, self.buckets
        if span.rows is not None:
            index = torch.tensor(rows, device=order.device)
            order, starts, buckets = (x.index_select(0, index) for x in (order, starts, buckets))
        lengths_XM = step.lengths_after(start, stop, span.rows)
        padded_XM = step.padded_after(start, stop, span.rows)
        if len(set(first)) == 1:
            recent_BHRT = buckets[..., first[0] : first[0] + max(recent)]
        else:
            places = torch.tensor(first, device=order.device).view(-1, 1, 1, 1)
            places = places + torch.arange(max(recent), device=order.device)
            recent_BHRT = buckets.gather(-1, places.clamp(max=buckets.shape[-1] - 1).expand(*buckets.shape[:3], -1))
        same = len(set(first)) == 1
        num_recent_XM = lengths_XM - (first[0] if same else torch.tensor(first, device=order.device).unsqueeze(-1))
        complete = stop - start == 1 and len(set(recent)) == 1
        return functional.windows_of_new_tokens(
            order, starts, recent_BHRT, num_recent_XM, lengths_XM, padded_XM, complete=complete, **options
        )

    def _merge(self, rows: list[int], start: int, step: Step) -> None:
        """Merge recent positions into the order where there are many."""
        ends = [step.lengths[row] + min(start, step.counts[row]) for row in rows]
        limit = min(max(int(max(ends) ** 0.5), _FEWEST_RECENT), _MOST_RECENT)
        if max(end - self.indexed[row] for row, end in zip(rows, ends, strict=True)) <= limit:
            return
        assert self.buckets is not None
        assert self.order is not None
        assert self.starts is not None
        device = self.order.device
        index = torch.tensor(rows, device=device)
        first = torch.tensor([self.indexed[row] for row in rows], device=device)
        N = max([1, *(self.indexed[row] for row in rows)])
        counts = torch.tensor(ends, device=device) - first
        T = max(end - self.indexed[row] for row, end in zip(rows, ends, strict=True))
        places = (first.view(-1, 1, 1, 1) + torch.arange(T, device=device)).clamp(max=self.buckets.shape[-1] - 1)
        buckets = self.buckets[index]
        recent = buckets.gather(-1, places.expand(*buckets.shape[:3], -1))
        merged, starts = functional.merge_recent(self.order[..., :N][index], self.starts[index], recent, first, counts)
        upto = max(ends)
        self.order[index, ..., :upto] = merged[..., :upto]
        self.starts[index] = starts
        for row, end in zip(rows, ends, strict=True):
            self.indexed[row] = end

    def lanes(self, span: Span, step: Step) -> tuple[Tensor, Tensor]:
        """Return the storage and, ``[B, H]``, in which of its rows the heads of a span's rows begin."""
        assert self.storage is not None
        B, H, capacity, _ = self.storage.shape
        rows = range(B) if span.rows is None else span.rows

        def lanes() -> Tensor:
            starts = torch.tensor(rows, device=step.device).unsqueeze(-1) * H
            return (starts + torch.arange(H, device=step.device)) * capacity

        return self.storage, step.once(("lanes", capacity, span.rows), lanes)

    def seen(self, rows: tuple[int, ...] | None, upto: int) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[B, H, U, D]`` of these rows' first ``upto`` positions."""
        assert self.storage is not None
        storage = self.storage[:, :, :upto]
        if rows is not None:
            storage = storage[list(rows)]
        return storage.chunk(2, dim=-1)  # type: ignore[return-value]

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        kept = (self.storage, self.buckets, self.order, self.starts, *self.rotations.values())
        return [tensor for tensor in kept if tensor is not None]

    def select(self, rows: Tensor, numbers: list[int]) -> None:
        """Keep these rows, in this order; ``numbers`` are the same on the host."""
        for name in ("storage", "buckets", "order", "starts"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.index_select(0, rows.to(tensor.device)))
        if self.hashed:
            self.hashed, self.indexed = ([x[row] for row in numbers] for x in (self.hashed, self.indexed))
            self.factors = [self.factors[row] for row in numbers]
