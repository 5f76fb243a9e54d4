"""From tokens back to characters: encodings of normalised text that know the text before it was normalised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Encoding

from flash_reformer.tokenization.sentencepiece_model import SentencePieceModel

Span = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """A stretch of text and what the model reads in its place.

    ``text`` stands at character ``start`` of its sequence, and the model reads ``normalized``: the content of an added
    token, whose id is ``added``, or the text as normalised.
    """

    text: str
    start: int
    normalized: str
    added: int | None

    def spans(self, model: SentencePieceModel) -> list[Span]:
        """Return the characters of the sequence that each normalised character stands for."""
        if self.added is not None:
            return [(self.start, self.start + len(self.text))] * len(self.normalized)
        _, starts = model.processor.Normalize(self.text, with_offsets=True)
        spans: list[Span] = []
        # `starts` has one more entry than characters. Where one character became several ("ﬁ" -> "fi"), they all
        # start at it, and each stands for all of it: until the next start that differs.
        end = self.start + starts[-1]
        following = starts[-1]
        for begin in reversed(starts[:-1]):
            if begin != following:
                end, following = self.start + following, begin
            spans.append((self.start + begin, end))
        spans.reverse()
        if spans and model.adds_dummy_space:  # the space that no character stands for
            if model.space_at_end:
                spans[-1] = (spans[-1][1], spans[-1][1])
            else:
                spans[0] = (spans[0][0], spans[0][0])
        return spans


class Alignment:
    """The segments of one sequence, word by word if it came split into words."""

    def __init__(self, words: Sequence[Sequence[Segment]], split_into_words: bool, model: SentencePieceModel) -> None:
        self._words = words
        self._model = model
        self._split = split_into_words
        self._spans: dict[int, list[Span]] = {}

    def span(self, word: int | None, start: int, end: int) -> Span:
        """Return the original characters behind normalised characters ``start`` to ``end``, counted in their word."""
        index = (word or 0) if self._split else 0
        if index not in self._spans:
            self._spans[index] = [span for segment in self._words[index] for span in segment.spans(self._model)]
        spans = self._spans[index][start:end]
        return (spans[0][0], spans[-1][1]) if spans else (0, 0)


class AlignedEncoding:
    """An ``Encoding`` whose offsets are those of the original text; everything else is the encoding's own.

    Offsets are computed when asked for: most callers want ids only.
    """

    def __init__(self, encoding: Encoding, alignments: Sequence[Alignment], names: dict[int, str]) -> None:
        self._encoding = encoding
        self._alignments = alignments
        self._names = names
        self._offsets: list[Span] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not yet there while a copy is made
            raise AttributeError(name)
        return getattr(self._encoding, name)

    def __len__(self) -> int:
        return len(self._encoding)

    def __repr__(self) -> str:
        return f"AlignedEncoding({self._encoding!r})"

    @property
    def tokens(self) -> list[str]:
        """The vocabulary's name of every token."""
        return [self._names.get(token, "") for token in self._encoding.ids]

    @property
    def overflowing(self) -> list[AlignedEncoding]:
        """What truncation cut off, as more encodings."""
        return [AlignedEncoding(each, self._alignments, self._names) for each in self._encoding.overflowing]

    @property
    def offsets(self) -> list[Span]:
        """For every token the characters it stands for, as (start, end); (0, 0) where it stands for none."""
        if self._offsets is None or len(self._offsets) != len(self._encoding):  # not yet, or padded since
            rows = zip(self._encoding.sequence_ids, self._encoding.word_ids, self._encoding.offsets, strict=True)
            self._offsets = [
                (0, 0) if sequence is None else self._alignments[sequence].span(word, *span)
                for sequence, word, span in rows
            ]
        return self._offsets

    def token_to_chars(self, token_index: int) -> Span | None:
        """Return the characters that a token stands for; None for padding and the like."""
        return None if self._encoding.token_to_sequence(token_index) is None else self.offsets[token_index]

    def char_to_token(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """Return the first token that stands for a character of a sequence; None if there is none."""
        for index, sequence in enumerate(self._encoding.sequence_ids):
            if sequence == sequence_index and self.offsets[index][0] <= char_pos < self.offsets[index][1]:
                return index
        return None

    def char_to_word(self, char_pos: int, sequence_index: int = 0) -> int | None:
        """Return the word that a character of a sequence lies in."""
        token = self.char_to_token(char_pos, sequence_index)
        if token is None:
            return None
        word: int | None = self._encoding.word_ids[token]
        return word

    def word_to_chars(self, word_index: int, sequence_index: int = 0) -> Span | None:
        """Return the characters of a word."""
        tokens = self._encoding.word_to_tokens(word_index, sequence_index)
        if tokens is None:
            return None
        spans = self.offsets[tokens[0] : tokens[1]]
        return (spans[0][0], spans[-1][1])
