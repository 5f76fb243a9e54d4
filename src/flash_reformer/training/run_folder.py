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
    {"output", "max_steps", "max_minutes", "eval_interval", "save_interval", "save_total_limit", "log_interval"}
    | {"eval_sequences", "sample_tokens", "cpu"}
)

# What a run leaves in its folder, so that starting over knows what is its to remove.
_OWN_FILES = (SETTINGS_FILE, "metrics.json", "loss_curve.png", "loss_curve.svg", "sample.txt", "training_args.bin")
_MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")


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
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        for name in (*_OWN_FILES, *_MODEL_FILES):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_settings(settings: TrainingSettings) -> Path:
    """Write down what was asked for, so that ``--resume`` needs nothing but the folder."""
    path = Path(settings.output) / SETTINGS_FILE
    path.write_text(json.dumps(dataclasses.asdict(settings), indent=2) + "\n", encoding="utf-8")
    return path


def find_checkpoint(resume_from: str | None, output: str) -> Path:
    """Return the checkpoint to go on from: the one named, or else the last one of the run in ``output``."""
    if resume_from is None:
        last = get_last_checkpoint(output) if Path(output).is_dir() else None
        if last is None:
            raise ValueError(f"--resume: there is no checkpoint in {output}")
        return Path(last)
    path = Path(resume_from)
    if not (path / "trainer_state.json").is_file():
        raise ValueError(f"--resume-from {path} is no checkpoint: there is no trainer_state.json in it")
    return path


def resumed_settings(checkpoint: Path, given: Mapping[str, Any]) -> TrainingSettings:
    """Return the settings of the run that ``checkpoint`` belongs to, with what may change changed as ``given``."""
    path = checkpoint.parent / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{checkpoint} cannot be resumed: {path} is missing, so its settings are unknown")
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        recorded["text"] = tuple(recorded.get("text", ()))
        settings = TrainingSettings(**recorded)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
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
