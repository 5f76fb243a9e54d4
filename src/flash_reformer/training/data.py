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
