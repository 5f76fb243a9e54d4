"""The engine of the fast tokenizer: ``tokenizers`` segments, SentencePiece normalises."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tokenizers import Encoding, PreTokenizedString, Token, Tokenizer

from flash_reformer.tokenization.added_tokens import AddedTokens
from flash_reformer.tokenization.alignment import AlignedEncoding, Alignment, Segment
from flash_reformer.tokenization.backend import make_segmenter
from flash_reformer.tokenization.sentencepiece_model import SPACE, SentencePieceModel

#: id, name, and where it starts and ends in the normalised text
Piece = tuple[int, str, int, int]


class ExactTokenizer:
    """A ``tokenizers.Tokenizer`` that segments as SentencePiece does, to the last id, with offsets of the original.

    Whatever is not encoding (vocabulary, added tokens, truncation, padding, post-processing, decoding) is the
    ``backend``'s, and so is everything that is saved. Encoding takes four steps: added tokens are found in the text;
    SentencePiece normalises what is between them, each stretch as a text of its own; the backend's model segments it;
    the backend truncates, adds special tokens and pads.
    """

    def __init__(self, model: SentencePieceModel, backend: Tokenizer) -> None:
        self.__dict__.update(sp=model, backend=backend, _segmenter=make_segmenter(model, backend), _cache={})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "backend" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.backend, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.backend, name, value)

    def __reduce__(self) -> tuple[Callable[..., ExactTokenizer], tuple[SentencePieceModel, Tokenizer, bool]]:
        return _rebuild, (self.sp, self.backend, self.backend.encode_special_tokens)

    def add_tokens(self, tokens: list[Any]) -> int:
        """Add tokens; returns how many are new."""
        self._cache.clear()
        return int(self.backend.add_tokens(tokens))

    def add_special_tokens(self, tokens: list[Any]) -> int:
        """Add special tokens; returns how many are new."""
        self._cache.clear()
        return int(self.backend.add_special_tokens(tokens))

    def encode(
        self, sequence: Any, pair: Any = None, is_pretokenized: bool = False, add_special_tokens: bool = True
    ) -> AlignedEncoding:
        """Encode a text or a pair."""
        given = sequence if pair is None else (sequence, pair)
        return self.encode_batch([given], add_special_tokens, is_pretokenized)[0]

    def encode_batch(
        self, inputs: Sequence[Any], add_special_tokens: bool = True, is_pretokenized: bool = False
    ) -> list[AlignedEncoding]:
        """Encode texts, or pairs as tuples; with ``is_pretokenized``, lists of words in place of texts."""
        rows = [_sequences(each, is_pretokenized) for each in inputs]
        segmented = [[[self._segments(word) for word in words] for words in row] for row in rows]
        encodings = iter(self._encode_sequences([words for row in segmented for words in row], is_pretokenized))
        encoded = []
        for row in segmented:
            own = [next(encodings) for _ in row]
            alignments = [Alignment(words, is_pretokenized, self.sp) for words in row]
            final = self.backend.post_process(own[0], own[1] if len(own) > 1 else None, add_special_tokens)
            encoded.append(AlignedEncoding(final, alignments, self._names()))
        self._pad_to_longest(encoded)
        return encoded

    # --- what stands in the text --------------------------------------------------------------------------------------

    def _names(self) -> dict[int, str]:
        if "names" not in self._cache:
            self._cache["names"] = {index: name for name, index in self.backend.get_vocab().items()}
        names: dict[int, str] = self._cache["names"]
        return names

    def _segments(self, text: str) -> list[Segment]:
        if self.backend.encode_special_tokens:
            return self._normalized(text, 0)
        if "added" not in self._cache:
            self._cache["added"] = AddedTokens(self.backend.get_added_tokens_decoder(), self.sp.user_defined)
        segments: list[Segment] = []
        for found in self._cache["added"].split(text):
            if found.index is None:
                segments += self._normalized(found.content, found.start)
            else:
                segments.append(Segment(text[found.start : found.end], found.start, found.content, found.index))
        return segments

    def _normalized(self, text: str, start: int) -> list[Segment]:
        normalized = self.sp.processor.Normalize(text)
        return [Segment(text, start, normalized, None)] if normalized else []

    # --- segmentation -------------------------------------------------------------------------------------------------

    def _encode_sequences(self, sequences: list[list[list[Segment]]], split_into_words: bool) -> list[Encoding]:
        """Encode sequences of words (one "word", the whole text, unless they came split) of segments."""
        done = self._segmented([segment for words in sequences for word in words for segment in word])
        results = []
        for words in sequences:
            if not split_into_words and len(words[0]) == 1 and id(words[0][0]) in done:
                results.append(done[id(words[0][0])])
            else:
                parts = [
                    self._assemble(word, done, index if split_into_words else None) for index, word in enumerate(words)
                ]
                results.append(parts[0] if len(parts) == 1 else Encoding.merge(parts, growing_offsets=False))
        return results

    def _segmented(self, segments: list[Segment]) -> dict[int, Encoding]:
        """Return the encodings of segments by their Python id, without those that the backend's model gets wrong.

        Merging ranked pairs gives one answer. Unigram takes the split with the best total, and totals are rounded:
        SentencePiece adds scores up from the start of the text in 32 bits, `tokenizers` word by word in 64. They part
        where totals are nearly equal: the same entries in another order ("...." as ". ..." or "... ."), and in long
        texts, where the sum loses bits. `tokenizers` also takes "<s>" in a text for the entry of that name. So
        SentencePiece has the last word there; it takes a sixth of the time.
        """
        texts = [segment for segment in segments if segment.added is None]
        encodings = self._segmenter.encode_batch([segment.normalized for segment in texts])
        if self.sp.merges_by_rank:
            return {id(segment): encoding for segment, encoding in zip(texts, encodings, strict=True)}
        judged = self.sp.processor.Encode([segment.text for segment in texts], out_type=int)
        rows = zip(texts, encodings, judged, strict=True)
        return {id(segment): encoding for segment, encoding, ids in rows if encoding.ids == ids}

    def _assemble(self, word: list[Segment], done: dict[int, Encoding], index: int | None) -> Encoding:
        """Make one encoding of several segments, words counted through."""
        splits: list[str] = []
        tokens: list[list[Token]] = []
        for segment in word:
            text = segment.normalized
            cuts = [0, len(text)]
            if segment.added is not None:
                pieces: Iterable[Piece] = [(segment.added, text, 0, len(text))]
            else:
                own = done.get(id(segment))
                pieces = self._by_sentencepiece(segment) if own is None else _pieces(own)
                if self.sp.splits_at_spaces:
                    offset = 1 if self.sp.space_at_end else 0
                    found = (place.start() + offset for place in re.finditer(SPACE, text))
                    cuts = sorted({*cuts, *found})
            for start, end in itertools.pairwise(cuts):
                splits.append(text[start:end])
            tokens += _tokens(pieces, text, cuts)
        given = iter(tokens)
        pre_tokenized = PreTokenizedString("".join(splits))
        ends = list(itertools.accumulate(map(len, splits), initial=0))
        pre_tokenized.split(lambda _, whole: [whole.slice(cut) for cut in itertools.pairwise(ends)])
        pre_tokenized.tokenize(lambda _: next(given))
        return pre_tokenized.to_encoding(word_idx=index)

    def _by_sentencepiece(self, segment: Segment) -> Iterable[Piece]:
        ids = self.sp.processor.Encode(segment.text, out_type=int)
        surfaces = self.sp.processor.Encode(segment.text, out_type=str)
        start = 0
        pending = 0  # bytes of a character that are still to come
        for token, surface in zip(ids, surfaces, strict=True):
            if self.sp.processor.IsByte(token):
                value = int(surface[3:5], 16)
                pending = pending - 1 if pending else _following_bytes(value)
                yield token, surface, start, start + 1
                start += 0 if pending else 1
            else:
                yield token, surface, start, start + len(surface)
                start += len(surface)

    def _pad_to_longest(self, encodings: list[AlignedEncoding]) -> None:
        padding = self.backend.padding
        if not padding or padding["length"] is not None or not encodings:
            return
        length = max(map(len, encodings))
        for encoding in encodings:
            encoding.pad(
                length,
                direction=padding["direction"],
                pad_id=padding["pad_id"],
                pad_type_id=padding["pad_type_id"],
                pad_token=padding["pad_token"],
            )


def _rebuild(model: SentencePieceModel, backend: Tokenizer, encode_special_tokens: bool) -> ExactTokenizer:
    backend.encode_special_tokens = encode_special_tokens  # it is no part of what is saved
    return ExactTokenizer(model, backend)


def _sequences(given: Any, is_pretokenized: bool) -> list[list[str]]:
    """Return one or two sequences of words; a text is a sequence of one."""
    if is_pretokenized:
        pair = len(given) == 2 and all(isinstance(each, list | tuple) for each in given)
        return [list(each) for each in given] if pair else [list(given)]
    if isinstance(given, str):
        return [[given]]
    if len(given) != 2 or not all(isinstance(each, str) for each in given):
        raise TypeError(f"text must be a str or a pair of them, got {given!r:.200}")
    return [[each] for each in given]


def _pieces(encoding: Encoding) -> Iterable[Piece]:
    rows = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
    return ((index, name, start, end) for index, name, (start, end) in rows)


def _tokens(pieces: Iterable[Piece], text: str, cuts: list[int]) -> list[list[Token]]:
    """Sort pieces into the splits that they lie in, their places counted in bytes from the split's start."""
    places = [0, *itertools.accumulate(len(char.encode()) for char in text)]
    splits: list[list[Token]] = [[] for _ in cuts[1:]]
    split = 0
    for index, name, start, end in pieces:
        while start >= cuts[split + 1]:
            split += 1
        origin = places[cuts[split]]
        splits[split].append(Token(index, name, (places[start] - origin, places[end] - origin)))
    return splits


def _following_bytes(first: int) -> int:
    return 0 if first < 0x80 else 1 if first < 0xE0 else 2 if first < 0xF0 else 3
