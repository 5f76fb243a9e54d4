"""Where text comes from: files, the standard library of the running Python, or a dataset."""

import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flash_reformer.training.data import Document

# Folders of the standard library that hold tests or other people's packages.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})

_SPLITS = ("train", "validation", "test")

# What `datasets` calls the readers of the files that we accept.
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def read_text_files(paths: Sequence[str | Path]) -> list[Document]:
    """Read files as raw bytes, whatever their encoding, one document each."""
    documents = [Document(str(path), path.read_bytes()) for path in check_files(paths)]
    if not any(document.data for document in documents):
        raise ValueError(f"--text {', '.join(map(str, paths))}: nothing to train on, no byte in it")
    return documents


def check_files(paths: Sequence[str | Path], *, flag: str = "--text") -> list[Path]:
    """Return paths that must be files, or raise ``ValueError`` that names the ``flag``."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            raise ValueError(f"{flag} {path} is a folder: name the files in it")
        if not path.is_file():
            raise ValueError(f"{flag} {path}: there is no such file")
        found.append(path)
    return found


def read_standard_library() -> list[Document]:
    """Read the source of the running Python's standard library, without its tests, in order of path."""
    root, paths = standard_library_files()
    return [Document(path.as_posix(), (root / path).read_bytes()) for path in paths]


def standard_library_files() -> tuple[Path, list[Path]]:
    """Return the folder of the running Python's standard library and its files without tests, in order."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    paths = sorted((path for path in paths if not _LEFT_OUT & set(path.parts)), key=lambda path: path.as_posix())
    if not paths:
        raise ValueError(f"this Python has no source of its standard library under {root}: use --text FILE instead")
    return root, paths


def read_rows(name: str, split: str, *, flag: str = "--dataset", streaming: bool = False) -> Any:
    """Read one part of a dataset as a table of the package `datasets`.

    Args:
        name: a file (.jsonl, .json, .csv, .parquet, .txt), a folder of such files or one that
            ``datasets.save_to_disk`` wrote, or else the name of a dataset on the hub.
        split: the part of the dataset to read; a file is all of it.
        flag: what asked for it, for messages.
        streaming: return rows that are read one after the other, a ``datasets.IterableDataset``.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{flag} needs the package `datasets`: pip install datasets") from error
    had_bars = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return _load(datasets, name, split, streaming)
    except Exception as error:
        # `datasets` raises dozens of kinds, the telling one inside another; its first line says what was wrong.
        told = error.__cause__ or error
        reason = str(told).strip().splitlines() or [type(told).__name__]
        raise ValueError(f"{flag} {name} (split {split!r}) cannot be read: {reason[0]}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def check_columns(rows: Any, name: str, **columns: str) -> None:
    """Refuse columns that a table does not have; ``columns`` are names of flags and what they say."""
    # Rows that are streamed may not know their columns before the first is read.
    names = rows.column_names or list(next(iter(rows), {}))
    for option, column in columns.items():
        if column not in names:
            flag = "--" + option.replace("_", "-")
            raise ValueError(f"{flag} {column!r} is no column of {name}; it has {', '.join(names)}")


def is_missing_folder(name: str) -> bool:
    """Say whether a name can only be a folder's, and there is none; other names may be on the hub."""
    return (Path(name).is_absolute() or name.startswith((".", "~"))) and not Path(name).exists()


def check_text(value: Any, option: str, column: str, place: str) -> str:
    """Return a cell that must hold text; ``place`` is where it stands."""
    if not isinstance(value, str):
        flag = "--" + option.replace("_", "-")
        raise ValueError(f"{flag} {column!r} must hold text; {place} holds {type(value).__name__}")
    return value


def read_dataset(name: str, *, column: str = "text", split: str = "train") -> list[Document]:
    """Read one text column of a dataset (see :func:`read_rows`), one document per row; empty rows are left out."""
    rows = read_rows(name, split)
    check_columns(rows, name, text_column=column)
    documents = []
    for index, value in enumerate(rows[column]):
        text = check_text(value, "text_column", column, f"row {index} of {name}")
        if text:
            # Lone surrogates can come out of JSON; they have no UTF-8 form of their own.
            documents.append(Document(f"{name}[{index}]", text.encode("utf-8", errors="replace")))
    if not documents:
        raise ValueError(f"--text-column {column!r} of {name} holds no text")
    return documents


def _load(datasets: Any, name: str, split: str, streaming: bool) -> Any:
    path = Path(name)
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        loaded = datasets.load_from_disk(str(path))
        rows = loaded[split] if isinstance(loaded, dict) else loaded
        return rows.to_iterable_dataset() if streaming else rows
    if path.exists():
        reader, files = _reader_of(path, split)
        options = {"sample_by": "document"} if reader == "text" else {}
        return datasets.load_dataset(reader, data_files={split: files}, split=split, streaming=streaming, **options)
    if path.suffix in _READERS or path.is_absolute() or name.startswith("."):
        raise ValueError("there is no such file")
    return datasets.load_dataset(name, split=split, streaming=streaming)


def files_of_split(path: Path, split: str) -> list[Path]:
    """Return the files of a path that make up a split.

    A file is all ``train``. In a folder, files named after splits (``test.jsonl``, ``train-00001.parquet``) are those
    splits; where none is, all are ``train``.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _READERS)
    named = {file: _named_split(file) for file in files if path.is_dir()}
    present = sorted({each for each in named.values() if each is not None})
    if present:
        if split not in present:
            raise ValueError(f"its files are the splits {', '.join(present)}")
        return [file for file in files if named[file] == split]
    if split != "train":
        raise ValueError(f"{'a file' if path.is_file() else 'a folder without files of that name'} is all 'train'")
    return files


def _named_split(file: Path) -> str | None:
    word = re.split(r"[^a-z]", file.stem.lower())[0]
    return {"valid": "validation", "dev": "validation", "val": "validation"}.get(
        word, word if word in _SPLITS else None
    )


def _reader_of(path: Path, split: str) -> tuple[str, list[str]]:
    files = files_of_split(path, split)
    readers = {_READERS.get(file.suffix, file.suffix) for file in files}
    if len(readers) != 1 or not readers <= set(_READERS.values()):
        found = ", ".join(sorted(readers)) or "nothing of the kind"
        raise ValueError(f"expected files of one kind among {', '.join(_READERS)}, found {found}")
    return readers.pop(), [str(file) for file in files]
