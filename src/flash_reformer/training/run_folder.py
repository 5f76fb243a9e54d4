"""The folder of a run: what was asked for, its checkpoints, and whether it may be written to."""

import dataclasses
import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState

from flash_reformer.training.checkpoints import (
    clear_partials,
    damage,
    damaged_checkpoints,
    has_manifest,
    own_checkpoints,
    partials,
    set_aside,
    step_of,
    write_text,
)
from flash_reformer.training.settings import TrainingSettings

SETTINGS_FILE = "run.json"
# Beside the settings: the fields of the model that were asked for, and the step from which on checkpoints are sealed.
_MODEL, _SEALED = "model_fields", "sealed_from"

# What may differ when a run goes on; anything else would make it another run.
CHANGEABLE = frozenset(
    {"output", "max_steps", "max_epochs", "max_minutes", "eval_interval", "save_interval", "save_total_limit"}
    | {"find_unused_parameters", "static_graph", "cpu_offload"}
    | {"log_interval", "eval_sequences", "sample_tokens", "cpu", "early_stopping", "tensorboard", "trackio"}
)

# What a run leaves in its folder, so that starting over knows what is its to remove.
_OWN_FILES = (SETTINGS_FILE, "metrics.json", "loss_curve.png", "loss_curve.svg", "sample.txt", "training_args.bin")
_MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
)


def prepare_folder(output: str, *, overwrite: bool) -> Path:
    """Make the folder of a new run; an earlier run in it is refused, or removed with ``overwrite``."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output {folder} is a file: name a folder")
    # What a run left that died before it wrote anything else is in nobody's way.
    if folder.is_dir() and set(folder.iterdir()) - set(partials(folder)):
        is_run = (folder / SETTINGS_FILE).is_file()
        if not (is_run and overwrite):
            hint = "go on with --resume, start over with --overwrite, or name another" if is_run else "name another"
            raise ValueError(f"--output {folder} already holds {'a run' if is_run else 'other files'}: {hint}")
        for own in (*own_checkpoints(folder), *damaged_checkpoints(folder), folder / "tensorboard"):
            shutil.rmtree(own, ignore_errors=not own.is_dir())
        for name in (*_OWN_FILES, *_MODEL_FILES):
            (folder / name).unlink(missing_ok=True)
    check_writable(folder)
    clear_partials(folder)
    return folder


def check_writable(folder: Path) -> None:
    """Make a folder and write a file into it; ``ValueError`` where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "probe.txt", "May be removed.\n")
        (folder / "probe.txt").unlink()
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written to: {error.strerror or error}") from error


def write_settings(
    task: str, settings: TrainingSettings, model: Mapping[str, Any] | None = None, checkpoint: Path | None = None
) -> Path:
    """Write down what was asked for, so that ``--resume`` needs nothing but the folder.

    Args:
        task: name of the task.
        settings: of the run.
        model: fields of the config that were asked for; unknown where a run goes on.
        checkpoint: what the run goes on from.
    """
    path = Path(settings.output) / SETTINGS_FILE
    notes: dict[str, Any] = {_MODEL: None if model is None else dict(model), _SEALED: 0}
    if checkpoint is not None:
        earlier = _record(checkpoint)
        notes[_MODEL] = earlier.get(_MODEL)
        # Checkpoints of earlier versions have no manifest; later ones without have lost it.
        notes[_SEALED] = earlier.get(_SEALED, checkpoint_state(checkpoint).global_step + 1)
    record = {"task": task, **dataclasses.asdict(settings), **notes}
    write_text(path, json.dumps(record, indent=2) + "\n")
    return path


def find_checkpoint(resume_from: str | None, output: str) -> Path:
    """Return the checkpoint to go on from: the one named, or else the last undamaged one of the run in ``output``.

    Damaged ones are set aside, with a warning. Raises ``ValueError`` where there is none to go on from.
    """
    if resume_from is not None:
        path = Path(resume_from)
        if not path.is_dir():
            raise ValueError(f"--resume-from {path}: there is no such folder")
        if not (path / "trainer_state.json").is_file() and not has_manifest(path):
            raise ValueError(f"--resume-from {path} is no checkpoint: there is no trainer_state.json in it")
        fault = _fault(path)
        if fault is not None:
            raise ValueError(f"--resume-from {path} is damaged: {fault}; --resume takes the last undamaged one")
        return path
    if not output:
        raise ValueError("--resume needs --output: the folder of the run to go on with")
    folder = Path(output)
    if folder.is_dir():
        clear_partials(folder)
    faults = []
    for checkpoint in reversed(own_checkpoints(folder)):
        fault = _fault(checkpoint)
        if fault is None:
            return checkpoint
        faults.append(f"{checkpoint.name}: {fault}")
        _put_aside(checkpoint, "", fault)
    if faults:
        raise ValueError(
            f"--resume: no checkpoint in {output} is undamaged ({'; '.join(faults)}); --overwrite starts over"
        )
    raise ValueError(f"--resume: there is no checkpoint in {output}")


def check_best(checkpoint: Path) -> None:
    """Set the best checkpoint aside that a run which is to go on has found so far, with a warning, if it is damaged."""
    step = checkpoint_state(checkpoint).best_global_step
    best = checkpoint.with_name(f"checkpoint-{step}")
    if best != checkpoint and best.is_dir() and (fault := _fault(best)) is not None:
        _put_aside(best, "the best checkpoint so far ", f"{fault}. What is best from here on counts")


def _put_aside(checkpoint: Path, what: str, fault: str) -> None:
    try:
        now = f"is now {set_aside(checkpoint).name}"
    except OSError as error:
        now = f"cannot be renamed ({error.strerror})"
    warnings.warn(f"{what}{checkpoint} is damaged and {now}: {fault}", stacklevel=3)


def _fault(checkpoint: Path) -> str | None:
    """Say what is wrong with a checkpoint; warn where it is too old to tell."""
    path = checkpoint.parent / SETTINGS_FILE
    record = _record(checkpoint) if path.is_file() else {}
    since = record.get(_SEALED)
    needed = since is not None and (
        checkpoint not in own_checkpoints(checkpoint.parent) or step_of(checkpoint) >= since
    )
    fault = damage(checkpoint, manifest_needed=needed)
    if fault is None and not has_manifest(checkpoint):
        warnings.warn(
            f"{checkpoint} was written by an earlier version: whether it is damaged is not known", stacklevel=3
        )
    return fault


def _record(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint.parent / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{checkpoint} cannot be resumed: {path} is missing, so its settings are unknown")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: it must hold a JSON object, not {type(record).__name__}")
    return record


def recorded_task(checkpoint: Path) -> str:
    """Return the task of the run that ``checkpoint`` belongs to; runs of older versions were language models."""
    return str(_record(checkpoint).get("task", "clm"))


def resumed_settings(checkpoint: Path, kind: type[TrainingSettings], given: Mapping[str, Any]) -> TrainingSettings:
    """Return the settings of the run that ``checkpoint`` belongs to, with what may change changed as ``given``."""
    recorded = {name: value for name, value in _record(checkpoint).items() if name not in ("task", _MODEL, _SEALED)}
    if "text" in recorded:
        recorded["text"] = tuple(recorded["text"])
    try:
        settings = kind(**recorded)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{checkpoint.parent / SETTINGS_FILE} is damaged: {error}") from error
    for name, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        if name not in CHANGEABLE and value != getattr(settings, name, None):
            raise ValueError(f"{name} cannot change on resume: the run has {getattr(settings, name, None)!r}")
    changes = {name: value for name, value in given.items() if name in CHANGEABLE}
    return dataclasses.replace(settings, **changes)


def holds_run(output: str) -> bool:
    """Say whether a folder holds what a run was asked for."""
    return (Path(output) / SETTINGS_FILE).is_file()


def has_ended(output: str, checkpoint: Path) -> bool:
    """Say whether the run that wrote a checkpoint, its last one, has also written what comes after training."""
    try:
        metrics = json.loads((Path(output) / "metrics.json").read_text(encoding="utf-8"))
        return int(metrics["steps"]) >= checkpoint_state(checkpoint).global_step
    except (OSError, ValueError, TypeError, KeyError):
        return False


def recorded_cpu(resume_from: str | None, output: str) -> bool:
    """Say whether a run that is to go on was asked to stay on the CPU; False where nothing says so."""
    folder = Path(output) if resume_from is None else Path(resume_from).parent
    try:
        return bool(json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))["cpu"])
    except (OSError, ValueError, TypeError, KeyError):
        return False


def check_same_run(task: str, settings: TrainingSettings, model: Mapping[str, Any], usual: Mapping[str, Any]) -> bool:
    """Say whether the run in ``settings.output`` has a checkpoint to go on from.

    Raises ``ValueError`` where it is another run, by its task, its settings or the fields of its model, or where it
    has damaged checkpoints only.

    Args:
        task: name of the task.
        settings: of the run that is to go on.
        model: fields of its model that are asked for.
        usual: what fields have that are not asked for.
    """
    folder = Path(settings.output)
    clear_partials(folder)
    anywhere = folder / "checkpoint"  # all checkpoints share one record
    if recorded_task(anywhere) != task:
        raise ValueError(f"--auto-resume: {folder} holds a run of {recorded_task(anywhere)}, not of {task}")
    resumed_settings(anywhere, type(settings), dataclasses.asdict(settings))
    before: Any = _record(anywhere).get(_MODEL)
    asked = json.loads(json.dumps(dict(model)))
    for name in sorted({*asked, *before}) if before is not None else ():
        old, new = before.get(name, usual.get(name)), asked.get(name, usual.get(name))
        if old != json.loads(json.dumps(new)):
            raise ValueError(f"{name} cannot change on resume: the run's model has {old!r}, got {new!r}")
    if not own_checkpoints(folder) and damaged_checkpoints(folder):
        raise ValueError(f"--auto-resume: all checkpoints in {folder} are damaged; --overwrite starts over")
    return bool(own_checkpoints(folder))


def checkpoint_state(checkpoint: Path) -> TrainerState:
    """Read how far a checkpoint is."""
    try:
        return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint} is damaged: {error}") from error
