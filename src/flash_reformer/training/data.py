"""From documents to the fixed-length blocks of bytes that a language model trains on."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from flash_reformer.tokenization.bytes import BYTE_OFFSET, EOS_ID

Tokens = NDArray[np.uint16]

# The label that torch's cross entropy, and so every loss of the models, leaves out.
IGNORED_LABEL = -100

# With fewer documents than this a split by whole documents would be lopsided; their tails are held out instead.
MIN_DOCUMENTS_TO_SPLIT = 20


@dataclass(frozen=True)
class Document:
    """One text with the name it goes by in messages."""

    name: str
    data: bytes


@dataclass(frozen=True)
class Split:
    """Documents to learn from, and documents to be judged on."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def hold_out(documents: Sequence[Document], fraction: float) -> Split:
    """Set about ``fraction`` of the bytes aside, the same ones on every machine and in every run.

    With 20 documents or more, whole documents are held out, chosen by the hash of their *contents*: copies of one
    text always land on the same side, so nothing that is judged was ever read. With fewer, the last part of every
    document is held out.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"held_out must lie strictly between 0 and 1, got {fraction}")
    documents = [document for document in documents if document.data]
    if not documents:
        raise ValueError("the text is empty: there is nothing to train on")
    groups: dict[bytes, list[Document]] = {}
    for document in documents:
        groups.setdefault(hashlib.blake2b(document.data, digest_size=16).digest(), []).append(document)
    if len(groups) < MIN_DOCUMENTS_TO_SPLIT:
        return _hold_out_tails(documents, fraction)
    wanted = fraction * sum(len(document.data) for document in documents)
    chosen: set[bytes] = set()
    size = 0
    for digest in sorted(groups)[:-1]:
        if size >= wanted:
            break
        chosen.add(digest)
        size += sum(len(document.data) for document in groups[digest])
    held_out = [document for digest in sorted(chosen) for document in groups[digest]]
    train = [document for digest, group in groups.items() if digest not in chosen for document in group]
    return Split(tuple(train), tuple(held_out))


def _hold_out_tails(documents: Sequence[Document], fraction: float) -> Split:
    train, held_out = [], []
    for document in documents:
        cut = len(document.data) - max(1, round(fraction * len(document.data)))
        if cut < 1:
            raise ValueError(f"{document.name} holds {len(document.data)} byte(s): too few to hold a part out")
        train.append(Document(document.name, document.data[:cut]))
        held_out.append(Document(document.name, document.data[cut:]))
    return Split(tuple(train), tuple(held_out))


def pack(documents: Iterable[Document]) -> Tokens:
    """Lay documents end to end as byte tokens, with an end-of-text token before the first and after each.

    The leading one gives the very first byte something to be predicted from. Two bytes are held per byte of text.
    """
    end = np.array([EOS_ID], dtype=np.uint16)
    parts: list[Tokens] = [end]
    for document in documents:
        parts += [np.frombuffer(document.data, dtype=np.uint8).astype(np.uint16) + np.uint16(BYTE_OFFSET), end]
    return np.concatenate(parts)


class PackedBlocks(Dataset[dict[str, torch.Tensor]]):
    """Consecutive blocks of ``length`` tokens which together predict every token but the first exactly once.

    The model predicts token ``t + 1`` from tokens up to ``t``, so a block of ``length`` makes ``length - 1``
    predictions, and neighbours share one token. The last block reaches back to be as long as the others; labels of
    what was predicted before are -100 there. A text shorter than ``length`` is a single short block: no block is
    ever padded. The order in which blocks are seen is the sampler's affair.

    Args:
        tokens: what :func:`pack` returns.
        length: tokens per block, at least 2.
        starts: where each block begins; by default the whole text is covered.
    """

    def __init__(self, tokens: Tokens, length: int, starts: NDArray[np.int64] | None = None) -> None:
        if length < 2:
            raise ValueError(f"seq_len must be at least 2, got {length}")
        if len(tokens) < 2:
            raise ValueError("the text is empty: there is nothing to train on")
        self.tokens = tokens
        self.length = min(length, len(tokens))
        stride = self.length - 1
        self.starts = np.arange(0, len(tokens) - 1, stride, dtype=np.int64) if starts is None else starts

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` and ``labels`` of one block, both int64 of shape ``[length]``."""
        wanted = int(self.starts[index])
        start = min(wanted, len(self.tokens) - self.length)
        input_ids = torch.from_numpy(self.tokens[start : start + self.length].astype(np.int64))
        labels = input_ids.clone()
        # The first label is never used, the model has nothing to predict it from; the rest were predicted before.
        labels[: wanted - start + 1] = IGNORED_LABEL
        return {"input_ids": input_ids, "labels": labels}

    def spread(self, count: int) -> "PackedBlocks":
        """Return at most ``count`` whole blocks spread evenly over the text.

        Only whole ones, so the mean over blocks of their mean losses is the mean over tokens.
        """
        if count < 1:
            raise ValueError(f"eval_sequences must be at least 1, got {count}")
        whole = self.starts[self.starts + self.length <= len(self.tokens)]
        picked = np.linspace(0, len(whole) - 1, min(count, len(whole))).round().astype(np.int64)
        return PackedBlocks(self.tokens, self.length, whole[picked])

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
        is_byte = np.concatenate([[0], np.cumsum(self.tokens >= BYTE_OFFSET)])
        return int((is_byte[self._ends()] - is_byte[self.starts + 1]).sum())

    def _ends(self) -> NDArray[np.int64]:
        return np.minimum(self.starts + self.length, len(self.tokens))

    def _predicted(self) -> NDArray[Any]:
        return self._ends() - self.starts - 1
