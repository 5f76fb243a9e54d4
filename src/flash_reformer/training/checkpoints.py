"""Checkpoints that are whole or not there: written aside, sealed with digests, moved into place, checked before use.

What is being written carries a name that nobody takes for the real thing, `.NAME.partial`. One rename makes it the real
thing, so whoever looks, also after a power cut, finds the old file or folder, or the new one, or none.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_KIND = {"format": 1, "digest": "blake2b-256"}
_BLOCK = 1 << 20
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = re.compile(r"\.(checkpoint-\d+(\.(old|gone))?|model|[a-z_]+\.(json|txt))\.partial")


def step_of(checkpoint: str | Path) -> int:
    """Return the step that a checkpoint was written after, from its name."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def own_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first: folders with the number of a step, and no other folder."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


# --- writing ----------------------------------------------------------------------------------------------------------


def partial_of(path: Path) -> Path:
    """Return where a file or folder is written before it is complete."""
    return path.with_name(f".{path.name}.partial")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old text or the new one, whenever this process dies."""
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def seal(checkpoint: Path) -> int:
    """Write down size and digest of every file of a finished checkpoint; return the bytes that it takes.

    All of it is on the disk, not only in its queue, when this returns.
    """
    files = {name: (path.stat().st_size, _digest(path)) for name, path in _files(checkpoint).items()}
    for path in _files(checkpoint).values():
        _sync(path)
    manifest = {**_KIND, "files": files}
    write_text(checkpoint / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for folder in (path for path in checkpoint.rglob("*") if path.is_dir()):
        _sync(folder)
    return sum(size for size, _ in files.values())


def move_into_place(written: Path, final: Path) -> None:
    """Let a finished folder become ``final``; one that stood there is removed."""
    old = final.with_name(f".{final.name}.old.partial")
    if final.exists():
        _remove(old)
        os.replace(final, old)
    os.replace(written, final)
    _sync(final.parent)
    _remove(old)


def move_files(written: Path, folder: Path) -> None:
    """Let the files of a finished folder take the place of those of the same name in ``folder``, one by one."""
    for path in _files(written).values():
        _sync(path)
    for name, path in _files(written).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, folder / name)
    _sync(folder)
    _remove(written)


def clear_partials(folder: Path) -> None:
    """Remove what a process that died has left half written; a checkpoint that only lacked its name gets it."""
    for partial in folder.glob(".checkpoint-*.partial"):
        for written in own_checkpoints(partial):
            if not (folder / written.name).exists() and damage(written) is None:
                move_into_place(written, folder / written.name)
    for partial in partials(folder):
        _remove(partial)


def partials(folder: Path) -> list[Path]:
    """Return what a run in this folder did not write to its end."""
    return sorted(path for path in folder.glob(".*.partial") if _PARTIAL.fullmatch(path.name))


def remove_checkpoint(checkpoint: Path) -> None:
    """Remove a checkpoint; never is half of one left under its name."""
    gone = checkpoint.with_name(f".{checkpoint.name}.gone.partial")
    _remove(gone)
    os.replace(checkpoint, gone)
    _remove(gone)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file or folder written to the disk, where the system knows how."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- checking ---------------------------------------------------------------------------------------------------------


def damage(checkpoint: Path, *, manifest_needed: bool = True) -> str | None:
    """Say what is wrong with a checkpoint, or return None where every byte is what was written.

    Args:
        checkpoint: its folder.
        manifest_needed: without, a checkpoint of an earlier version, which has no manifest, is only looked over.
    """
    try:
        if not (checkpoint / MANIFEST).is_file():
            return f"it has no {MANIFEST}" if manifest_needed else _looked_over(checkpoint)
        return _compared(checkpoint)
    except OSError as error:
        return f"it cannot be read: {error}"


def has_manifest(checkpoint: Path) -> bool:
    """Say whether a checkpoint can be checked."""
    return (checkpoint / MANIFEST).is_file()


def _compared(checkpoint: Path) -> str | None:
    try:
        manifest: Any = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        recorded = {str(name): (int(size), str(digest)) for name, (size, digest) in manifest["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {MANIFEST} is damaged: {error}"
    kind = {name: value for name, value in manifest.items() if name != "files"}
    if kind != _KIND:
        return f"its {MANIFEST} is of another kind than this version writes: {kind}"
    found = _files(checkpoint)
    for name in sorted(recorded.keys() - found.keys()):
        return f"{name} is missing"
    for name in sorted(found.keys() - recorded.keys()):
        return f"{name} was not written with it"
    # Sizes of all before digests: a truncated file is found without reading the others.
    for name, (size, _) in recorded.items():
        if found[name].stat().st_size != size:
            return f"{name} has {found[name].stat().st_size} bytes, {size} were written"
    for name, (_, digest) in recorded.items():
        if _digest(found[name]) != digest:
            return f"{name} does not hold the bytes that were written"
    return None


def _looked_over(checkpoint: Path) -> str | None:
    for name in ("trainer_state.json", "config.json", "optimizer.pt", "scheduler.pt"):
        if not (checkpoint / name).is_file() or not (checkpoint / name).stat().st_size:
            return f"{name} is missing or empty"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return f"trainer_state.json is damaged: {error}"
    return None


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for a good one; return its new path."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if aside.exists():
        _remove(aside)
    os.replace(checkpoint, aside)
    return aside


def damaged_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that were set aside."""
    return [path for path in folder.glob("checkpoint-*.damaged") if _NAME.fullmatch(path.stem)]


def _files(folder: Path) -> dict[str, Path]:
    """Return all files by their name within a folder, but the manifest and hidden ones, which others put there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts) and name.parts != (MANIFEST,):
            found[name.as_posix()] = path
    return found


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


# --- keeping ----------------------------------------------------------------------------------------------------------


def prune_checkpoints(folder: Path, limit: int, best: str | None, step: int | None = None) -> None:
    """Remove checkpoints beyond ``limit``: neither the one just written nor the best one, and the oldest first.

    transformers' own rotation goes by times of modification and takes any folder whose name begins like that of a
    checkpoint.

    Args:
        folder: the folder of the run.
        limit: how many to keep.
        best: path of the best one, if there is one.
        step: where the run is. Later checkpoints stem from before it went on from an earlier one; they go first. By
            default the last one is taken for the one just written.
    """
    kept = own_checkpoints(folder)
    if not kept:
        return
    step = step_of(kept[-1]) if step is None else step
    past = [path for path in kept if step_of(path) <= step]
    protected = {*(path.name for path in past[-1:]), *([] if best is None else [Path(best).name])}
    later = [path for path in reversed(kept) if step_of(path) > step]
    for checkpoint in [path for path in (*later, *past) if path.name not in protected]:
        if len(kept) <= max(limit, len(protected)):
            return
        kept.remove(checkpoint)
        remove_checkpoint(checkpoint)
