"""From documents to the fixed-length blocks of tokens that a language model trains on."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from flash_reformer.training.data import Document
from flash_reformer.training.vocabulary import NO_WORD, Encoded, Vocabulary

# The label that torch's cross entropy, and so every loss of the models, leaves out.
IGNORED_LABEL = -100


def pack(documents: Iterable[Document], vocabulary: Vocabulary | None = None) -> Encoded:
    """Lay documents end to end as tokens, with an end-of-text token before the first and after each.

    The leading one gives the very first token something to be predicted from. Words are numbered through. By default
    tokens are bytes.
    """
    vocabulary = vocabulary or Vocabulary.of_bytes()
    end = Encoded(
        np.array([vocabulary.eos_id], dtype=vocabulary.dtype),
        np.zeros(1, dtype=np.uint16),
        np.array([NO_WORD], dtype=np.int32),
    )
    parts, word = [end], 0
    for document in documents:
        part = vocabulary.encode(document.data)
        words = np.where(part.words == NO_WORD, NO_WORD, part.words + word).astype(np.int32)
        word = max(word, int(words.max(initial=NO_WORD)) + 1)
        parts += [Encoded(part.ids, part.byte_counts, words), end]
    joined = zip(*((part.ids, part.byte_counts, part.words) for part in parts), strict=True)
    return Encoded(*map(np.concatenate, joined))


class PackedBlocks(Dataset[dict[str, torch.Tensor]]):
    """Consecutive blocks of ``length`` tokens which together predict every token but the first exactly once.

    The model predicts token ``t + 1`` from tokens up to ``t``, so a block of ``length`` makes ``length - 1``
    predictions, and neighbours share one token. The last block reaches back to be as long as the others; labels of
    what was predicted before are -100 there. A text shorter than ``length`` is a single short block: no block is
    ever padded. The order in which blocks are seen is the sampler's affair.

    Args:
        text: what :func:`pack` returns.
        length: tokens per block, at least 2.
        starts: where each block begins; by default the whole text is covered.
    """

    def __init__(self, text: Encoded, length: int, starts: NDArray[np.int64] | None = None) -> None:
        if length < 2:
            raise ValueError(f"seq_len must be at least 2, got {length}")
        if len(text.ids) < 2:
            raise ValueError("the text is empty: there is nothing to train on")
        self.text = text
        self.length = min(length, len(text.ids))
        stride = self.length - 1
        self.starts = np.arange(0, len(text.ids) - 1, stride, dtype=np.int64) if starts is None else starts

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    def place(self, index: int) -> tuple[slice, int]:
        """Return where a block lies in the text, and how many of its first tokens other blocks predict."""
        wanted = int(self.starts[index])
        start = min(wanted, len(self.text.ids) - self.length)
        # The first token is never predicted: the block has nothing to predict it from.
        return slice(start, start + self.length), wanted - start + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``labels`` of one block, both int64 of shape ``[length]``."""
        place, done = self.place(index)
        input_ids = torch.from_numpy(self.text.ids[place].astype(np.int64))
        labels = input_ids.clone()
        labels[:done] = IGNORED_LABEL
        return {"input_ids": input_ids, "labels": labels}

    def spread(self, count: int) -> "PackedBlocks":
        """Return at most ``count`` whole blocks spread evenly over the text.

        Only whole ones, so the mean over blocks of their mean losses is the mean over tokens.
        """
        if count < 1:
            raise ValueError(f"eval_sequences must be at least 1, got {count}")
        whole = self.starts[self.starts + self.length <= len(self.text.ids)]
        picked = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(np.int64)
        return type(self)(self.text, self.length, whole[picked])

    def bits_per_byte(self, loss: float) -> float:
        """Turn a mean loss in nats per predicted token of these blocks into bits per byte of their text."""
        return loss / math.log(2) * self.predicted_tokens / max(1, self.predicted_bytes)

    @property
    def predicted_tokens(self) -> int:
        """Tokens that these blocks predict, ends of texts included."""
        return int(self._predicted().sum())

    @property
    def predicted_bytes(self) -> int:
        """Bytes of text that these blocks predict."""
        before = np.concatenate([[0], np.cumsum(self.text.byte_counts, dtype=np.int64)])
        return int((before[self._ends()] - before[self.starts + 1]).sum())

    def _ends(self) -> NDArray[np.int64]:
        return np.minimum(self.starts + self.length, len(self.text.ids))

    def _predicted(self) -> NDArray[Any]:
        return self._ends() - self.starts - 1
