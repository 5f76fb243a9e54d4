"""Text to token arrays, with what belongs to each token: its bytes of text, and the word it is of."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from flash_reformer.tokenization.byte_tokenizer import ReformerByteTokenizer
from flash_reformer.tokenization.bytes import BYTE_OFFSET
from flash_reformer.training.quiet import quiet_transformers
from flash_reformer.training.sources import is_missing_folder

#: The word of a token that is of none: white space, ends of texts.
NO_WORD = -1

#: How SentencePiece writes the bytes of characters that it has no piece for.
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")

_WHITE_BYTES = np.zeros(256, dtype=bool)
_WHITE_BYTES[list(b" \t\n\r\v\f")] = True


@dataclass(frozen=True)
class Encoded:
    """A text as tokens; all arrays have one entry per token.

    Attributes:
        ids: token ids.
        byte_counts: bytes of the text that each token stands for; they sum to the text's.
        words: number of the word within the text that a token is a part of, or -1.
    """

    ids: NDArray[Any]
    byte_counts: NDArray[Any]
    words: NDArray[np.int32]


class Vocabulary:
    """A tokenizer as training uses it: whole documents of bytes, an end-of-text token between them.

    Args:
        tokenizer: a tokenizer with an end-of-text token and offsets, that is, a fast one.
        name: what messages call it.
    """

    def __init__(self, tokenizer: Any, name: str = "the tokenizer") -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(f"tokenizer {name} has no eos_token, which texts are separated by")
        if not tokenizer.is_fast:
            raise ValueError(f"tokenizer {name} gives no offsets: use the fast class, ReformerTokenizerFast")
        self.tokenizer = tokenizer
        self.name = name

    @classmethod
    def of_bytes(cls) -> "Vocabulary":
        """Return the plain byte scheme."""
        return cls(ReformerByteTokenizer(), "bytes")

    @classmethod
    def load(cls, name: str) -> "Vocabulary":
        """Load the tokenizer of a folder or of the hub; ``ValueError`` says why it cannot be."""
        if is_missing_folder(name):
            raise ValueError(f"tokenizer {name} cannot be loaded: there is no such folder")
        try:
            with quiet_transformers():
                return cls(AutoTokenizer.from_pretrained(name), name)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"tokenizer {name} cannot be loaded: {error}") from error

    @staticmethod
    def stands_in(folder: str | Path) -> bool:
        """Say whether a folder holds a tokenizer."""
        return (Path(folder) / "tokenizer_config.json").is_file()

    @property
    def is_bytes(self) -> bool:
        """Whether a token is a byte."""
        return isinstance(self.tokenizer, ReformerByteTokenizer)

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return int(max(self.tokenizer.get_vocab().values())) + 1

    @property
    def eos_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def pad_id(self) -> int:
        """What short rows are filled up with; masked, so that any token will do."""
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else int(pad)

    @property
    def dtype(self) -> Any:
        """The smallest integers that hold every id."""
        return np.uint16 if self.size <= 2**16 else np.int32

    def add_mask_token(self) -> int:
        """Return the id of the mask token; a tokenizer without one gets one, at the end of its vocabulary."""
        if self.tokenizer.mask_token_id is None:
            self.tokenizer.add_special_tokens({"mask_token": "<mask>"})
        return int(self.tokenizer.mask_token_id)

    def ordinary_ids(self) -> NDArray[np.int64]:
        """Return every id that text can turn into."""
        ids = np.array(sorted(self.tokenizer.get_vocab().values()), dtype=np.int64)
        return ids[~np.isin(ids, self.tokenizer.all_special_ids)]

    def encode(self, data: bytes) -> Encoded:
        """Encode one document; bytes that are not UTF-8 stay bytes in the byte scheme, else become U+FFFD."""
        if self.is_bytes:
            # Raw bytes, so that text in any encoding comes back as it is.
            raw = np.frombuffer(data, dtype=np.uint8)
            words = _number_words(~_WHITE_BYTES[raw])
            return Encoded(raw.astype(self.dtype) + self.dtype(BYTE_OFFSET), np.ones(len(raw), np.uint16), words)
        text = data.decode("utf-8", errors="replace")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return Encoded(np.array(found["input_ids"], self.dtype), *_place(text, offsets))

    def is_piece_of_character(self, token_id: int) -> bool:
        """Say whether a token is a byte among tokens of text, so that its neighbours decide what it stands for."""
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        return not self.is_bytes and token is not None and _BYTE_PIECE.fullmatch(token) is not None

    def decode(self, ids: list[int]) -> bytes:
        """Return the text of ids; special tokens stand for none."""
        if self.is_bytes:
            return bytes(each - BYTE_OFFSET for each in ids if BYTE_OFFSET <= each < BYTE_OFFSET + 256)
        return self.tokenizer.decode(ids, skip_special_tokens=True).encode("utf-8", errors="replace")


def _number_words(inside: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number runs of places inside words; others get -1."""
    starts = inside & ~np.concatenate([[False], inside[:-1]])
    return np.where(inside, np.cumsum(starts) - 1, NO_WORD).astype(np.int32)


def _place(text: str, offsets: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Return bytes and words of tokens that stand at these characters ``[tokens, 2]`` of a text."""
    codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    starts, ends = offsets.T
    # What the tokenizer left out, such as doubled spaces, belongs to the token after it, or else to the last one.
    reached = np.maximum.accumulate(bytes_before[ends])
    if len(reached):
        reached[-1] = bytes_before[-1]
    counts = np.diff(reached, prepend=0)
    inside = np.array([not character.isspace() for character in text], dtype=bool)
    words = _number_words(inside)
    # The first place at or after each one that is inside a word; a token's word is that of its first such place.
    places = np.where(inside, np.arange(len(inside)), len(inside))
    after = np.concatenate([np.minimum.accumulate(places[::-1])[::-1], [len(inside)]])
    first = after[np.minimum(starts, len(inside))]
    words = np.concatenate([words, np.array([NO_WORD], dtype=np.int32)])
    return counts.astype(np.uint32), np.where(first < ends, words[first], NO_WORD).astype(np.int32)
