"""The text of a run that is streamed: what is learnt from, a piece at a time, and what is held out."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from flash_reformer.training.data import MIN_DOCUMENTS_TO_SPLIT, Document, choose_held_out, tail_start
from flash_reformer.training.settings import TextSettings
from flash_reformer.training.sources import check_columns, check_files, read_rows, standard_library_files
from flash_reformer.training.stream_pieces import FilePart, FileSource, RowSource, TokenSource
from flash_reformer.training.vocabulary import Vocabulary

#: Held-out text is read up to so many bytes for each token that evaluations look at, and at least up to so many.
_BYTES_PER_TOKEN, _MIN_BYTES = 8, 2**20


@dataclass(frozen=True)
class StreamedText:
    """What a streamed run learns from, and the part of the held-out text that fits its evaluations."""

    train: TokenSource
    held_out: tuple[Document, ...]


def stream_text(settings: TextSettings, vocabulary: Vocabulary) -> StreamedText:
    """Open the text that the settings name without reading more of it than what is judged.

    Of files the same bytes are held out as by :func:`flash_reformer.training.data.hold_out`. With 20 files or more that
    takes one pass over them at the start, for hashes. Of a dataset, a row is held out if a hash of its text says so:
    copies go together, and nothing has to be counted first.
    """
    limit = max(_MIN_BYTES, settings.eval_sequences * settings.seq_len * _BYTES_PER_TOKEN)
    if settings.dataset is not None:
        return _stream_rows(settings, vocabulary, limit)
    train, held_out = _hold_out_files(_files(settings), settings.held_out)
    return StreamedText(FileSource(train, vocabulary, settings.seed), tuple(_documents(held_out, limit)))


def held_out_files(settings: TextSettings) -> list[FilePart]:
    """Return what of the files that the settings name is held out, streamed or not."""
    return _hold_out_files(_files(settings), settings.held_out)[1]


def _files(settings: TextSettings) -> list[FilePart]:
    if settings.text:
        paths = check_files(settings.text)
    else:
        root, names = standard_library_files()
        paths = [root / name for name in names]
    files = [FilePart(path, 0, path.stat().st_size) for path in paths]
    files = [file for file in files if file.size]
    if not files:
        raise ValueError(f"--text {', '.join(settings.text)}: nothing to train on, no byte in it")
    return files


def _hold_out_files(files: Sequence[FilePart], fraction: float) -> tuple[list[FilePart], list[FilePart]]:
    chosen = None
    if len(files) >= MIN_DOCUMENTS_TO_SPLIT:  # hashes of fewer decide nothing
        chosen = choose_held_out([file.digest() for file in files], [file.size for file in files], fraction)
    if chosen is not None:
        train, held_out = ([files[index] for index in side] for side in chosen)
        return train, held_out
    cuts = [tail_start(file.size, fraction, str(file.path)) for file in files]
    train = [FilePart(file.path, 0, cut) for file, cut in zip(files, cuts, strict=True)]
    return train, [FilePart(file.path, cut, file.size) for file, cut in zip(files, cuts, strict=True)]


def _documents(parts: Sequence[FilePart], limit: int) -> Iterable[Document]:
    """Read parts whole where they fit the limit, or else the beginnings of some that are spread over them."""
    size = sum(part.size for part in parts)
    if size > limit:
        count = min(len(parts), 64)
        parts = [parts[index * len(parts) // count] for index in range(count)]
        parts = [FilePart(part.path, part.start, min(part.stop, part.start + limit // count)) for part in parts]
    for part in parts:
        yield Document(str(part.path), part.read(0, part.size))


def is_held_out(fraction: float) -> Callable[[bytes], bool]:
    """Return the rule that says of a row's text whether it is held out: by its hash."""
    border = math.floor(fraction * 2**64)
    return lambda text: int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") < border


def _stream_rows(settings: TextSettings, vocabulary: Vocabulary, limit: int) -> StreamedText:
    name, column = str(settings.dataset), settings.text_column
    rows: Any = read_rows(name, settings.dataset_split, streaming=True)
    check_columns(rows, name, text_column=column)
    rule = is_held_out(settings.held_out)
    train = RowSource(rows, column, name, vocabulary, lambda text: not rule(text))
    documents, size = [], 0
    for number, text in RowSource(rows, column, name, vocabulary, rule).texts():
        documents.append(Document(f"{name}[{number}]", text[:limit]))
        size += len(documents[-1].data)
        if size >= limit:
            break
    if not documents:
        raise ValueError(
            f"held_out {settings.held_out} holds no row of {name} out: with --streaming the hash of a row decides; "
            "raise --held-out, or leave --streaming out"
        )
    if next(iter(train.texts()), None) is None:
        raise ValueError(f"--text-column {column!r} of {name} holds no text to train on beside what is held out")
    return StreamedText(train, tuple(documents))
