"""The folder of a run: what was asked for, its checkpoints, and whether it may be written to."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import get_last_checkpoint

from flash_reformer.training.settings import TrainingSettings

SETTINGS_FILE = "run.json"

# What may differ when a run goes on; anything else would make it another run.
CHANGEABLE = frozenset(
    {"output", "max_steps", "max_epochs", "max_minutes", "eval_interval", "save_interval", "save_total_limit"}
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
    if folder.is_dir() and any(folder.iterdir()):
        is_run = (folder / SETTINGS_FILE).is_file()
        if not (is_run and overwrite):
            hint = "go on with --resume, start over with --overwrite, or name another" if is_run else "name another"
            raise ValueError(f"--output {folder} already holds {'a run' if is_run else 'other files'}: {hint}")
        for own in (*own_checkpoints(folder), folder / "tensorboard"):
            shutil.rmtree(own, ignore_errors=not own.is_dir())
        for name in (*_OWN_FILES, *_MODEL_FILES):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def own_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first: folders with the number of a step, and no other folder."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in found if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def prune_checkpoints(folder: Path, limit: int, best: str | None) -> None:
    """Remove the oldest checkpoints beyond ``limit``, but neither the last nor the best one.

    transformers' own rotation goes by times of modification and takes any folder whose name begins like that of a
    checkpoint.
    """
    kept = own_checkpoints(folder)
    protected = {kept[-1].name, *([] if best is None else [Path(best).name])} if kept else set()
    for checkpoint in [path for path in kept if path.name not in protected]:
        if len(kept) <= max(limit, len(protected)):
            return
        kept.remove(checkpoint)
        shutil.rmtree(checkpoint)


def write_settings(task: str, settings: TrainingSettings) -> Path:
    """Write down what was asked for, so that ``--resume`` needs nothing but the folder."""
    path = Path(settings.output) / SETTINGS_FILE
    record = {"task": task, **dataclasses.asdict(settings)}
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def find_checkpoint(resume_from: str | None, output: str) -> Path:
    """Return the checkpoint to go on from: the one named, or else the last one of the run in ``output``."""
    if resume_from is None:
        if not output:
            raise ValueError("--resume needs --output: the folder of the run to go on with")
        last = get_last_checkpoint(output) if Path(output).is_dir() else None
        if last is None:
            raise ValueError(f"--resume: there is no checkpoint in {output}")
        return Path(last)
    path = Path(resume_from)
    if not (path / "trainer_state.json").is_file():
        raise ValueError(f"--resume-from {path} is no checkpoint: there is no trainer_state.json in it")
    return path


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
    recorded = {name: value for name, value in _record(checkpoint).items() if name != "task"}
    if "text" in recorded:
        recorded["text"] = tuple(recorded["text"])
    try:
        settings = kind(**recorded)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{checkpoint.parent / SETTINGS_FILE} is damaged: {error}") from error
    for name, value in given.items():
        if name not in CHANGEABLE and value != getattr(settings, name, None):
            raise ValueError(f"{name} cannot change on resume: the run has {getattr(settings, name, None)!r}")
    changes = {name: value for name, value in given.items() if name in CHANGEABLE}
    return dataclasses.replace(settings, **changes)


def checkpoint_state(checkpoint: Path) -> TrainerState:
    """Read how far a checkpoint is."""
    try:
        return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{checkpoint} is damaged: {error}") from error
