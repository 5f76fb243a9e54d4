"""Text in pieces: files and rows that are read, cut and tokenized a little at a time, in an order that is known."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flash_reformer.training.sources import check_text
from flash_reformer.training.vocabulary import NO_WORD, Encoded, Vocabulary

#: Bytes that are read and tokenized at a time.
PIECE_BYTES = 2**16
#: Bytes on each side of a cut that are tokenized with and without it, and places that are tried.
_CONTEXT, _TRIES = 256, 32
_SPACES = b" \n"
_WHITE = frozenset(b" \t\n\r\v\f")
#: The offset that stands for the end-of-text token before the first document.
BEFORE_ALL = -1


@dataclass(frozen=True)
class Piece:
    """Tokens of a part of a document, and where they come from: the document in its order, and the byte in it."""

    document: int
    offset: int
    text: Encoded


class TokenSource(Protocol):
    """Documents as tokens, end to end, pass after pass."""

    def pieces(self, epoch: int, document: int, offset: int) -> Iterator[Piece]:
        """Yield the pieces of a pass from one of them on; a pass begins at document 0, offset ``BEFORE_ALL``."""
        ...

    @property
    def tokens(self) -> int | None:
        """Tokens of a pass, ends of texts included, or None where that takes reading them."""
        ...


def _end_of_text(vocabulary: Vocabulary) -> Encoded:
    ids = np.array([vocabulary.eos_id], dtype=vocabulary.dtype)
    return Encoded(ids, np.zeros(1, np.uint16), np.array([NO_WORD], np.int32))


def join(parts: Sequence[Encoded]) -> Encoded:
    """Lay tokens end to end, their words numbered through."""
    words, base = [], 0
    for part in parts:
        words.append(np.where(part.words == NO_WORD, NO_WORD, part.words + base).astype(np.int32))
        base = max(base, int(words[-1].max(initial=NO_WORD)) + 1)
    ids, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "byte_counts"))
    return Encoded(ids, counts, np.concatenate(words))


def cut_text(
    read: Callable[[int, int], bytes], size: int, offset: int, vocabulary: Vocabulary, piece_bytes: int = PIECE_BYTES
) -> Iterator[tuple[int, Encoded]]:
    """Yield offsets and tokens of the pieces of one document, from a piece's offset on.

    The tokens are those of the whole document wherever a tokenizer reads word by word, as those of bytes and of this
    package do: pieces end before white space, where the tokens of both sides together are those of each side alone.
    Without such a place in the second half of a piece, as in text without spaces, it ends between two characters, and
    a token or two there may be others.

    Args:
        read: returns the bytes from an offset on, as many as asked for or all that are left.
        size: bytes of the document.
        offset: where to begin: 0, or what was yielded before.
        vocabulary: the tokenizer.
        piece_bytes: bytes of a piece, at most.
    """
    while offset < size:
        data = read(offset, min(piece_bytes, size - offset))
        if not data:
            raise ValueError(f"the text ends at byte {offset}, but had {size} bytes before: it changed during the run")
        if offset + len(data) < size:
            data = data[: _find_cut(data, vocabulary)]
        yield offset, vocabulary.encode(data)
        offset += len(data)


def _find_cut(data: bytes, vocabulary: Vocabulary) -> int:
    last = min(max(len(data) // 2 + 1, len(data) - _CONTEXT), len(data) - 1)
    tries = 0
    for place in range(last, len(data) // 2, -1):
        single = data[place] in _SPACES and data[place - 1] not in _WHITE and data[place + 1 : place + 2] != b""
        if single and data[place + 1] not in _WHITE:
            if _is_seam(data, place, vocabulary):
                return place
            tries += 1
            if tries == _TRIES:
                break
    places = [place for place in range(last, max(0, last - 4 * _TRIES), -1) if _is_start(data, place)]
    return next((place for place in places if _is_seam(data, place, vocabulary)), places[0] if places else last)


def _is_start(data: bytes, place: int) -> bool:
    """Say whether a character begins at a place: what follows a first byte in UTF-8 is 10xxxxxx."""
    return data[place] & 0xC0 != 0x80


def _is_seam(data: bytes, place: int, vocabulary: Vocabulary) -> bool:
    """Say whether the tokens around a place are the same with a cut there."""
    if vocabulary.is_bytes:
        return True
    begin, end = max(0, place - _CONTEXT), min(len(data), place + _CONTEXT)
    while begin > 0 and not _is_start(data, begin):
        begin -= 1
    while end < len(data) and not _is_start(data, end):
        end -= 1
    left, right, both = (vocabulary.encode(part).ids for part in (data[begin:place], data[place:end], data[begin:end]))
    return np.array_equal(np.concatenate([left, right]), both)


@dataclass(frozen=True)
class FilePart:
    """Bytes of a file, from ``start`` up to ``stop``."""

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.stop - self.start

    def read(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset`` on, or as many as there are."""
        with self.path.open("rb") as file:
            file.seek(self.start + offset)
            return file.read(min(count, self.size - offset))

    def digest(self) -> bytes:
        """Return a hash of the bytes, read a little at a time; that of equal documents in memory."""
        state = hashlib.blake2b(digest_size=16)
        for offset in range(0, self.size, 16 * PIECE_BYTES):
            state.update(self.read(offset, 16 * PIECE_BYTES))
        return state.digest()


class FileSource:
    """Files, in an order that ``seed`` and the number of the pass decide."""

    def __init__(self, parts: Sequence[FilePart], vocabulary: Vocabulary, seed: int) -> None:
        self.parts = parts
        self.vocabulary = vocabulary
        self.seed = seed

    @property
    def tokens(self) -> int | None:
        """Tokens of a pass, known where they are bytes."""
        return sum(part.size + 1 for part in self.parts) + 1 if self.vocabulary.is_bytes else None

    def pieces(self, epoch: int, document: int, offset: int) -> Iterator[Piece]:
        """Yield the pieces of a pass; see :class:`TokenSource`."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.parts))
        documents = (
            (number, self.parts[order[number]].size, self.parts[order[number]].read)
            for number in range(document, len(order))
        )
        return _pieces_of(documents, document, offset, self.vocabulary)


class RowSource:
    """Rows of a dataset that come one after the other, in its order.

    Args:
        rows: an iterable with ``skip``, such as ``datasets.IterableDataset``.
        column: where the text is.
        name: what messages call the dataset.
        vocabulary: the tokenizer.
        wanted: says of a text whether it belongs.
    """

    def __init__(
        self, rows: Any, column: str, name: str, vocabulary: Vocabulary, wanted: Callable[[bytes], bool]
    ) -> None:
        self.rows = rows
        self.column = column
        self.name = name
        self.vocabulary = vocabulary
        self.wanted = wanted

    @property
    def tokens(self) -> int | None:
        """Tokens of a pass: unknown."""
        return None

    def texts(self, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yield numbers and texts of the rows that belong, from row ``first`` on."""
        for number, row in enumerate(self.rows.skip(first) if first else self.rows, first):
            text = check_text(row[self.column], "text_column", self.column, f"row {number} of {self.name}")
            data = text.encode("utf-8", errors="replace")
            if data and self.wanted(data):
                yield number, data

    def pieces(self, epoch: int, document: int, offset: int) -> Iterator[Piece]:
        """Yield the pieces of a pass; see :class:`TokenSource`."""
        documents = (
            (number, len(data), lambda start, count, data=data: data[start : start + count])
            for number, data in self.texts(document)
        )
        return _pieces_of(documents, document, offset, self.vocabulary)


def _pieces_of(
    documents: Iterable[tuple[int, int, Callable[[int, int], bytes]]],
    first: int,
    offset: int,
    vocabulary: Vocabulary,
) -> Iterator[Piece]:
    end = _end_of_text(vocabulary)
    if first == 0 and offset == BEFORE_ALL:
        yield Piece(0, BEFORE_ALL, end)
    for number, size, read in documents:
        start = max(0, offset) if number == first else 0
        waiting: tuple[int, Encoded] | None = None
        for place, text in cut_text(read, size, start, vocabulary):
            if waiting is not None:
                yield Piece(number, *waiting)
            waiting = (place, text)
        if waiting is not None:
            yield Piece(number, waiting[0], join([waiting[1], end]))


class MemorySource:
    """A text that is in memory as tokens, as :func:`flash_reformer.training.packing.pack` makes it."""

    def __init__(self, text: Encoded) -> None:
        self.text = text

    @property
    def tokens(self) -> int | None:
        """Tokens of a pass."""
        return len(self.text.ids)

    def pieces(self, epoch: int, document: int, offset: int) -> Iterator[Piece]:
        """Yield the whole text."""
        yield Piece(0, BEFORE_ALL, self.text)
