"""Documents, and the part of them that is held out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

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
    digests = [hashlib.blake2b(document.data, digest_size=16).digest() for document in documents]
    chosen = choose_held_out(digests, [len(document.data) for document in documents], fraction)
    if chosen is None:
        return _hold_out_tails(documents, fraction)
    return Split(*(tuple(documents[index] for index in side) for side in chosen))


def choose_held_out(
    digests: Sequence[bytes], sizes: Sequence[int], fraction: float
) -> tuple[list[int], list[int]] | None:
    """Choose documents by the hashes of their contents; return the numbers of those to learn from and of the others.

    None where there are too few to split: their tails are to be held out (:func:`tail_start`).
    """
    groups: dict[bytes, list[int]] = {}
    for index, digest in enumerate(digests):
        groups.setdefault(digest, []).append(index)
    if len(groups) < MIN_DOCUMENTS_TO_SPLIT:
        return None
    wanted = fraction * sum(sizes)
    chosen: set[bytes] = set()
    size = 0
    for digest in sorted(groups)[:-1]:
        if size >= wanted:
            break
        chosen.add(digest)
        size += sum(sizes[index] for index in groups[digest])
    held_out = [index for digest in sorted(chosen) for index in groups[digest]]
    train = [index for digest, group in groups.items() if digest not in chosen for index in group]
    return train, held_out


def tail_start(size: int, fraction: float, name: str) -> int:
    """Return the byte at which the part begins that is held out of a document of ``size`` bytes."""
    cut = size - max(1, round(fraction * size))
    if cut < 1:
        raise ValueError(f"{name} holds {size} byte(s): too few to hold a part out")
    return cut


def _hold_out_tails(documents: Sequence[Document], fraction: float) -> Split:
    train, held_out = [], []
    for document in documents:
        cut = tail_start(len(document.data), fraction, document.name)
        train.append(Document(document.name, document.data[:cut]))
        held_out.append(Document(document.name, document.data[cut:]))
    return Split(tuple(train), tuple(held_out))
