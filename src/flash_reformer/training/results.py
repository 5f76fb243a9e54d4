"""What a run leaves behind: measures, curves and a sample."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash_reformer.training.checkpoints import own_checkpoints, step_of, write_text
from flash_reformer.training.curve import save_loss_curve
from flash_reformer.training.memory import peak_memory
from flash_reformer.training.ranks import is_main, together
from flash_reformer.training.tasks import Task
from flash_reformer.training.trainer import TaskTrainer


@dataclass(frozen=True)
class TrainingResult:
    """What a run leaves behind.

    Attributes:
        task: the kind of training.
        metrics: the content of ``metrics.json``.
        sample: the prompt and the text that the model wrote after it; empty where none was asked for.
        paths: everything written, by what it is.
    """

    task: Task
    metrics: dict[str, Any]
    sample: tuple[str, str]
    paths: dict[str, Path]


def left_by(task: Task) -> TrainingResult:
    """Return what a run has left that has ended."""
    folder = Path(task.settings.output)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return TrainingResult(task, metrics, ("", ""), _paths(folder))


def _paths(folder: Path) -> dict[str, Path]:
    checkpoints = own_checkpoints(folder)
    last = {"checkpoint": checkpoints[-1]} if checkpoints else {}
    return {"model": folder, **last, "settings": folder / "run.json", "metrics": folder / "metrics.json"}


def finish(task: Task, trainer: TaskTrainer, facts: Mapping[str, Any]) -> TrainingResult:
    """Write what comes after training, and return it; ``facts`` are ``seconds`` and ``tokens``."""
    model: Any = trainer.final_model() if is_main() else trainer.model
    history = trainer.state.log_history
    judged = [entry for entry in history if f"eval_{task.measure.key}" in entry]
    kept = judged[-1]
    if task.settings.keep == "best":
        # What the weights are that were gone back to; where none could be, they are the last ones.
        best = trainer.state.best_model_checkpoint
        kept = next((entry for entry in judged if best is not None and entry["step"] == step_of(best)), kept)
    left_out = ("runtime", "samples_per_second", "steps_per_second")
    qualities = {
        name.removeprefix("eval_"): value
        for name, value in kept.items()
        if name.startswith("eval_") and not name.endswith(left_out)
    }
    metrics = {
        "task": task.name,
        **{f"held_out_{name}": value for name, value in qualities.items()},
        f"held_out_{task.measure.key}_at_start": judged[0][f"eval_{task.measure.key}"],
        "kept_step": kept["step"],
        "steps": trainer.state.global_step,
        "tokens": facts["tokens"],
        "seconds": facts["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_bytes": peak_memory(),
        "history": history,
    }
    label, key = (
        (task.measure.name, task.measure.key) if task.measure.training_key != "loss" else ("loss (nats)", "loss")
    )
    with together():
        return _write_results(task, model, metrics, {"key": key, "label": label})


def _write_results(task: Task, model: Any, metrics: dict[str, Any], curve: dict[str, str]) -> TrainingResult:
    """Write what is not the model, on rank 0; ``metrics.json`` comes last and so says that all is there."""
    folder = Path(task.settings.output)
    if not is_main():
        return TrainingResult(task, metrics, ("", ""), _paths(folder))
    drawn = save_loss_curve(metrics["history"], folder, **curve)
    curves = dict(zip(("loss curve (PNG)", "loss curve (SVG)"), drawn, strict=True))
    sample, more = task.finish(model, folder)
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    return TrainingResult(task, metrics, sample, {**_paths(folder), **curves, **more})
