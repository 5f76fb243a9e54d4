"""What a local layer keeps between steps of decoding. Letters: B batch, H heads, U keys, D head size, T positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flash_reformer.layers.decode_step import Step
from flash_reformer.layers.decode_storage import Fill, KeyValues, capacity_for, room_for, write


class LocalState(KeyValues):
    """Keys and values of the last tokens: at least ``before + 1`` whole chunks and the one that is being written.

    Position p of row b lies at ``p - base[b]``. The bases move up only where room runs out. More is kept where exact
    attention reaches further back, and while the past is recorded.
    """

    def __init__(self, chunk_length: int | None, num_chunks_before: int, exact_up_to: float) -> None:
        super().__init__()
        self.chunk_length = chunk_length
        self.num_chunks_before = num_chunks_before
        self.exact_up_to = exact_up_to
        self.base: list[int] = []
        #: Per row, the length from which on nothing may be dropped; None where the past is not recorded.
        self.recorded_from: list[int] | None = None

    def _start(self, length: int, num_chunks: int) -> int:
        """Return where the last so many chunks before that of the token after ``length`` others begin."""
        if self.chunk_length is None or length + 1 <= self.exact_up_to:
            return 0
        return max(0, (length // self.chunk_length - num_chunks) * self.chunk_length)

    def _keep_from(self, row: int, length: int) -> int:
        """Return the first position to keep of a row: its window's, and one chunk more for ``crop``."""
        keep = self._start(length, self.num_chunks_before + 1)
        if self.recorded_from is None:
            return keep
        return min(keep, self._start(self.recorded_from[row], self.num_chunks_before))

    def can_crop(self, lengths: Sequence[int]) -> bool:
        """Whether the windows of rows of these lengths are still there."""
        pairs = zip(self.base, lengths, strict=True)
        return all(base <= self._start(length, self.num_chunks_before) for base, length in pairs)

    def crop(self, lengths: Sequence[int]) -> None:
        """Take note that the rows are of these lengths now."""
        if self.recorded_from is not None:
            self.recorded_from = list(lengths)

    def _make_room(self, like_BTHD: Tensor, lengths: Sequence[int], new: int) -> Tensor:
        """Have room for ``new`` more tokens after ``lengths`` in every row."""
        old = self.storage
        if old is not None:
            ends = [length + new - base for length, base in zip(lengths, self.base, strict=True)]
            if max(ends) <= old.shape[2]:
                return old
        base = [self._keep_from(row, length) for row, length in enumerate(lengths)]
        if old is not None:
            # After a crop less is there than one would keep, though no less than the window.
            base = [max(pair) for pair in zip(base, self.base, strict=True)]
        needed = max(length + new - start for length, start in zip(lengths, base, strict=True))
        window = 0 if self.chunk_length is None else (self.num_chunks_before + 2) * self.chunk_length
        storage = room_for(like_BTHD, len(lengths), window if needed <= window else capacity_for(needed))
        if old is not None:
            for row, (before, after, length) in enumerate(zip(self.base, base, lengths, strict=True)):
                storage[row, :, : length - after] = old[row, :, after - before : length - before]
        self.storage, self.base = storage, base
        return storage

    def fill(self, key_BTHD: Tensor, value_BTHD: Tensor, fill: Fill) -> None:
        """Keep the end of each row of a full forward."""
        if self.recorded_from is not None:
            # What is recorded is what comes after: a whole prompt would undo the window.
            self.recorded_from = list(fill.all_lengths)
        storage = self._make_room(key_BTHD, fill.all_lengths, 0)
        for i, (row, length) in enumerate(zip(fill.rows, fill.lengths, strict=True)):
            base = self.base[row]
            storage[row, :, : length - base] = fill.joined(key_BTHD, value_BTHD, i, base)

    def append(self, key_BTHD: Tensor, value_BTHD: Tensor, step: Step) -> None:
        """Keep the new tokens."""
        storage = self._make_room(key_BTHD, step.lengths, step.new)
        write(storage, key_BTHD, value_BTHD, [n - base for n, base in zip(step.lengths, self.base, strict=True)])

    def seen(self, step: Step, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return keys, values ``[B, H, U, D]`` and their positions ``[X, U]``, up to the new token ``stop``."""
        assert self.storage is not None
        used = max(n + stop - base for n, base in zip(step.lengths, self.base, strict=True))
        key, value = self.storage[:, :, :used].chunk(2, dim=-1)
        base = tuple(self.base[:1] if len(set(self.base)) == 1 else self.base)

        def positions() -> Tensor:
            return torch.tensor(base, device=key.device).unsqueeze(-1) + torch.arange(used, device=key.device)

        return key, value, step.once(("positions", base, used), positions)

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        return [] if self.storage is None else [self.storage]

    def select(self, rows: Tensor, numbers: list[int]) -> None:
        """Keep these rows, in this order; ``numbers`` are the same on the host."""
        if self.storage is not None:
            self.storage = self.storage.index_select(0, rows.to(self.storage.device))
            self.base = [self.base[row] for row in numbers]
        if self.recorded_from:
            self.recorded_from = [self.recorded_from[row] for row in numbers]
