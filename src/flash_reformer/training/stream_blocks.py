"""Blocks of tokens that are made as training goes: of text that is never whole in memory, or of changing length.

The blocks of a pass are those that :class:`flash_reformer.training.packing.PackedBlocks` makes of the same text.
They are mixed within *windows*: so many neighbouring blocks that they have ``shuffle_tokens`` tokens, in an order that
the seed and the window's number decide. What is drawn is one sequence of blocks, whatever the number of processes;
each takes its rows of every batch out of it. So where a run stands is said by a few numbers, which a checkpoint
carries (see :meth:`BlockStream.position`), and a resumed run goes on with the very next block.
"""

import copy
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from flash_reformer.training.packing import IGNORED_LABEL
from flash_reformer.training.stream_pieces import BEFORE_ALL, Piece, TokenSource, join
from flash_reformer.training.vocabulary import Encoded

#: Makes a row of a block's tokens and of how many of its first tokens other blocks predict.
MakeRow = Callable[[Encoded, int], dict[str, Tensor]]


def causal_row(text: Encoded, done: int) -> dict[str, Tensor]:
    """Return ``input_ids`` and ``labels``, int64 of shape ``[length]``; -100 for the first ``done``."""
    ids = torch.from_numpy(text.ids.astype(np.int64))
    labels = ids.clone()
    labels[:done] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class _Place:
    """Where a window begins: a pass, a document in it, a piece of that, a token of that."""

    epoch: int = 0
    document: int = 0
    offset: int = BEFORE_ALL
    skip: int = 0


class _Reader:
    """Reads on from a place, and holds what was read but is not done with."""

    def __init__(self, source: TokenSource, place: _Place) -> None:
        self._epoch = place.epoch
        self._pieces = source.pieces(place.epoch, place.document, place.offset)
        self._held: deque[Piece] = deque()
        self._skip = place.skip

    def fill(self, count: int) -> Encoded:
        """Return the next ``count`` tokens, or all that are left of the pass where that is fewer."""
        have = sum(len(piece.text.ids) for piece in self._held) - self._skip
        while have < count:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._held.append(piece)
            have += len(piece.text.ids)
        parts, skip = [], self._skip
        for piece in self._held:
            parts.append(_slice(piece.text, skip, skip + count))
            count -= len(parts[-1].ids)
            skip = 0
            if count <= 0:
                break
        return join(parts) if parts else _NOTHING

    def drop(self, count: int) -> _Place:
        """Let ``count`` tokens go; return the place of the next one."""
        self._skip += count
        while len(self._held) > 1 and self._skip >= len(self._held[0].text.ids):
            self._skip -= len(self._held.popleft().text.ids)
        first = self._held[0]
        return _Place(self._epoch, first.document, first.offset, self._skip)


_NOTHING = Encoded(np.zeros(0, np.int32), np.zeros(0, np.uint16), np.zeros(0, np.int32))


def _slice(text: Encoded, start: int, stop: int) -> Encoded:
    return Encoded(text.ids[start:stop], text.byte_counts[start:stop], text.words[start:stop])


@dataclass(frozen=True)
class _Window:
    """Neighbouring blocks in the order that they are drawn in."""

    place: _Place
    after: _Place
    number: int
    length: int
    text: Encoded
    starts: Any

    def block(self, index: int, overlap: int) -> tuple[Encoded, int]:
        """Return the tokens of a block, and how many of its first ones other blocks predict."""
        wanted, length = int(self.starts[index]), min(self.length, len(self.text.ids))
        start = min(wanted, len(self.text.ids) - length)
        return _slice(self.text, start, start + length), wanted - start + overlap


class BlockStream(IterableDataset[dict[str, Tensor]]):
    """Batches without end, pass after pass, of the rows that one process trains on.

    Args:
        source: the text.
        length_at: tokens per block by the number of optimizer steps done.
        rows: blocks per batch and process, of the longest length; shorter ones come in proportionally more.
        longest: that length.
        accumulation: batches per step.
        seed: of the order.
        shuffle_tokens: size of a window.
        overlap: tokens that neighbouring blocks share: 1 where each predicts the next, else 0.
        make_row: makes a row of a block.
    """

    def __init__(
        self,
        source: TokenSource,
        *,
        length_at: Callable[[int], int],
        rows: int,
        longest: int,
        accumulation: int,
        seed: int,
        shuffle_tokens: int,
        overlap: int = 1,
        make_row: MakeRow = causal_row,
    ) -> None:
        self.source = source
        self.length_at = length_at
        self.rows = rows
        self.longest = longest
        self.accumulation = accumulation
        self.seed = seed
        self.shuffle_tokens = shuffle_tokens
        self.overlap = overlap
        self.make_row = make_row
        self._share = (0, 1)
        self._first_step = 0
        self._window: _Window | None = None
        self._reader: _Reader | None = None
        self._taken = 0
        self._seen = (0, 0)
        self._positions: dict[int, dict[str, Any]] = {}

    # --- what a run asks ---------------------------------------------------------------------------------------------

    def share(self, rank: int, ranks: int) -> "BlockStream":
        """Say which process of how many this is; without that there is one."""
        assert 0 <= rank < ranks
        self._share = (rank, ranks)
        return self

    def rows_at(self, step: int) -> int:
        """Return the rows of a batch: so many that they have about as many tokens at every length."""
        return self.rows * max(1, self.longest // self.length_at(step))

    def tokens_of(self, steps: int) -> int:
        """Return the tokens that one process trains on in its first ``steps`` steps."""
        total, step = 0, 0
        while step < steps:
            # Lengths change a few times in a run; between, steps are alike.
            length, more = self.length_at(step), 1
            while step + more < steps and self.length_at(step + more) == length:
                more += 1
            total += more * self.accumulation * self.rows_at(step) * length
            step += more
        return total

    @property
    def blocks_per_pass(self) -> int | None:
        """Blocks of the first length in a pass over the text, or None where that takes reading it."""
        if self.source.tokens is None:
            return None
        length = min(self.length_at(0), self.source.tokens)
        return max(1, math.ceil((self.source.tokens - 1) / (length - self.overlap)))

    def longest_batches(self, count: int) -> tuple[list[dict[str, Tensor]], float]:
        """Return the first batches of a stream whose blocks are all of the longest length, and seconds for each.

        The stream itself stays where it is. Reading a window counts for all of its batches, not for the first alone.
        """
        stream = copy.copy(self)
        stream.length_at = lambda _: self.longest
        stream._rewind()
        batches, times = [], []
        start = time.perf_counter()
        for batch in itertools.islice(stream, count):
            batches.append(batch)
            times.append(time.perf_counter() - start)
            start = time.perf_counter()
        assert stream._window is not None
        drawing = min(times)
        per_window = max(1.0, len(stream._window.starts) / self.rows)
        return batches, drawing + (times[0] - drawing) / per_window

    def _rewind(self) -> None:
        self._window = self._reader = None
        self._first_step, self._taken, self._positions = 0, 0, {}

    @property
    def epoch(self) -> int:
        """Passes that are done."""
        return 0 if self._window is None else self._window.place.epoch

    def bits_per_byte(self, loss: float) -> float:
        """Turn a mean loss in nats per token into bits per byte of the text, of what was drawn so far."""
        tokens, count = self._seen
        return loss / math.log(2) * tokens / max(1, count)

    # --- where it stands ---------------------------------------------------------------------------------------------

    def position(self, step: int) -> dict[str, Any]:
        """Return where the stream stands after ``step`` steps, one of the last few: numbers for a checkpoint."""
        return self._positions[step] if step else {}

    def start_at(self, step: int, position: Mapping[str, Any]) -> None:
        """Go on from a position, as the process that noted it would have; ``step`` steps are done."""
        place = _Place(*position["place"])
        self._first_step = step
        self._open(place, position["window"], position["length"])
        self._taken = position["taken"]
        self._seen = tuple(position["seen"])
        self._note(step)

    def _note(self, step: int) -> None:
        window = self._window
        assert window is not None
        place = window.place
        self._positions[step] = {
            "place": [place.epoch, place.document, place.offset, place.skip],
            "window": window.number,
            "length": window.length,
            "taken": self._taken,
            "seen": list(self._seen),
        }
        self._positions.pop(step - 4, None)

    # --- drawing -----------------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield batches, each tensor ``[rows, length]``, from where :meth:`start_at` said, or from the beginning."""
        rank, ranks = self._share
        step = self._first_step
        while True:
            for _ in range(self.accumulation):
                count = self.rows_at(step)
                drawn = [self._draw(self.length_at(step)) for _ in range(count * ranks)]
                mine = [self.make_row(*block) for block in drawn[rank * count : (rank + 1) * count]]
                self._note(step + 1)
                yield {name: torch.stack([row[name] for row in mine]) for name in mine[0]}
            step += 1

    def _draw(self, wanted: int) -> tuple[Encoded, int]:
        """Return the next block of the window, or of a new one where it is used up or of another length."""
        window = self._window
        if window is None:
            self._open(_Place(), 0, wanted)
        elif self._taken == len(window.starts) or wanted != window.length:
            self._open(window.after, window.number + 1, wanted)
        window = self._window
        assert window is not None
        text, done = window.block(self._taken, self.overlap)
        self._taken += 1
        tokens, count = self._seen
        self._seen = (tokens + len(text.ids) - done, count + int(text.byte_counts[done:].sum()))
        return text, done

    def _open(self, place: _Place, number: int, wanted: int) -> None:
        """Make the window that begins at a place; at the end of a pass, the first of the next one."""
        if self._reader is None or self._window is None or self._window.after != place:
            self._reader = _Reader(self.source, place)
        stride = wanted - self.overlap
        count = max(1, self.shuffle_tokens // wanted)
        # What follows the window is read, too: the last block of a pass reaches back to be as long as the others.
        whole = count * stride + self.overlap
        text = self._reader.fill(whole + wanted)
        begins = place == _Place(place.epoch)
        if len(text.ids) < wanted and not begins:
            # Blocks became longer than what is left of the pass.
            return self._open(_Place(place.epoch + 1), number, wanted)
        if len(text.ids) < 2:
            raise ValueError("the text is empty: there is nothing to train on")
        if len(text.ids) < whole + wanted:
            after, self._reader = _Place(place.epoch + 1), None
            starts = np.arange(0, len(text.ids) - 1, min(stride, len(text.ids) - self.overlap))
        else:
            after = self._reader.drop(count * stride)
            starts = np.arange(count) * stride
            text = _slice(text, 0, whole)
        order = np.random.default_rng([self.seed, 1, number]).permutation(len(starts))
        self._window = _Window(place, after, number, wanted, text, starts[order])
        self._taken = 0
        return None
