"""Training recipes: from data to a saved model, on `transformers.Trainer`."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.training.budget import Budget
from flash_reformer.training.curve import save_loss_curve
from flash_reformer.training.presets import PRESETS, axial_shape
from flash_reformer.training.progress import ProgressCallback, Report, peak_memory
from flash_reformer.training.quiet import quiet_transformers
from flash_reformer.training.run_folder import (
    checkpoint_state,
    find_checkpoint,
    prepare_folder,
    recorded_task,
    resumed_settings,
    write_settings,
)
from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.sharing import check_sharing, stop_sharing
from flash_reformer.training.sources import is_missing_folder
from flash_reformer.training.tasks import TASKS, Task
from flash_reformer.training.trainer import TaskTrainer, seconds_spent, uses_gpu
from flash_reformer.training.vocabulary import Vocabulary


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


def train(
    task: str,
    training: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    overwrite: bool = False,
    report: Report | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train a model for a task and save it, with its tokenizer, so that the pipelines load the folder.

    Args:
        task: ``"clm"`` (causal language model), ``"mlm"`` (masked), ``"classify"`` or ``"qa"``.
        training: settings by name, see ``TASKS[task].settings_class``.
        model: fields of `ReformerConfig`; what is not given has the task's default, or else its own, except for what
            the vocabulary, the task and ``seq_len`` dictate.
        preset: name of a starting point in ``PRESETS`` which ``training`` and ``model`` come on top of.
        overwrite: remove an earlier run in the output folder.
        report: is told how the run goes.
        callbacks: more `transformers` callbacks.

    Raises ``ValueError`` for bad settings and bad data before anything is written. Seeds torch's, numpy's and
    Python's default generators, as the Trainer does.
    """
    kind = task_class(task)
    given, fields = dict(training), dict(model or {})
    if preset is not None:
        given, fields = _on_top_of_preset(task, preset, given, fields)
    settings = kind.settings_class(**kind.settings_class.with_end(given))
    settings.check_complete()
    uses_gpu(settings)
    if settings.init_from is not None and fields:
        raise ValueError(f"init_from brings its own model: it contradicts {', '.join(sorted(fields))}")
    if settings.init_from is None:
        _check_limit(settings, fields)
    prepared = kind(settings, find_vocabulary(settings))
    if settings.init_from is not None:
        network = _load(prepared, settings.init_from, "init_from")
        prepared.check_model(network)
    else:
        network = build_model(prepared, fields)
    limit = network.config.max_length_of_positions
    if settings.seq_len > limit:
        raise ValueError(f"seq_len must be at most {limit}, the positions of the model; got {settings.seq_len}")
    check_sharing(settings, network.config.num_attention_heads)
    prepare_folder(settings.output, overwrite=overwrite)
    write_settings(task, settings)
    return _run(prepared, network, None, report, callbacks)


def resume(
    training: Mapping[str, Any],
    *,
    resume_from: str | None = None,
    task: str | None = None,
    report: Report | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Go on with a run from its last checkpoint, or from the one named.

    A run that is bounded by steps or epochs ends with the weights of an undisturbed one, bit for bit on a CPU.

    Args:
        training: ``output``, and whatever is to change of the settings in ``CHANGEABLE``; all others are the run's.
        resume_from: a checkpoint folder; by default the last one in ``output``.
        task: refuse a run of any other task.
        report: is told how the run goes.
        callbacks: more `transformers` callbacks.
    """
    checkpoint = find_checkpoint(resume_from, training.get("output", ""))
    recorded = recorded_task(checkpoint)
    if task is not None and recorded != task:
        raise ValueError(f"{checkpoint} belongs to a run of {recorded}, not of {task}")
    kind = task_class(recorded)
    settings = resumed_settings(checkpoint, kind.settings_class, training)
    settings.check_complete()
    uses_gpu(settings)
    if Path(settings.output).resolve() != checkpoint.parent.resolve():
        prepare_folder(settings.output, overwrite=False)
    prepared = kind(settings, find_vocabulary(settings))
    network = _load(prepared, str(checkpoint), "checkpoint")
    check_sharing(settings, network.config.num_attention_heads)
    write_settings(recorded, settings)
    return _run(prepared, network, checkpoint, report, callbacks)


def train_clm(training: Mapping[str, Any], model: Mapping[str, Any] | None = None, **options: Any) -> TrainingResult:
    """Train a causal language model; see :func:`train`."""
    return train("clm", training, model, **options)


def resume_clm(training: Mapping[str, Any], **options: Any) -> TrainingResult:
    """Go on with the training of a causal language model; see :func:`resume`."""
    return resume(training, task="clm", **options)


def task_class(name: str) -> type[Task]:
    """Return a task by its name."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def find_vocabulary(settings: TrainingSettings) -> Vocabulary:
    """Return the tokenizer asked for, or that of the model to start from, or plain bytes."""
    if settings.tokenizer not in (None, "bytes"):
        return Vocabulary.load(str(settings.tokenizer))
    if settings.tokenizer is None and settings.init_from is not None and Vocabulary.stands_in(settings.init_from):
        return Vocabulary.load(settings.init_from)
    return Vocabulary.of_bytes()


def build_model(task: Task, fields: Mapping[str, Any]) -> Any:
    """Build a fresh model for a task; position tables that are not given are made to fit ``seq_len``."""
    dictated = task.dictated_fields()
    for name, value in dictated.items():
        if name in fields and fields[name] != value:
            raise ValueError(f"{name} must be {value!r} for this vocabulary and task, got {fields[name]!r}")
    sizes = {**task.model_defaults, **fields}
    shape = axial_shape(task.settings.seq_len)
    width = sizes.get("hidden_size", ReformerConfig().hidden_size)
    fitting = {
        "axial_pos_shape": shape,
        "axial_pos_embds_dim": [width // 4, width - width // 4],
        "max_position_embeddings": shape[0] * shape[1],
    }
    config = ReformerConfig(**{**fitting, **sizes, **dictated})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(task.settings.seed)
        return task.model_class(config)


def _on_top_of_preset(
    task: str, preset: str, training: dict[str, Any], model: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    names = [name for name, each in PRESETS.items() if each.task == task]
    if preset not in names:
        raise ValueError(f"preset must be one of {', '.join(names) or 'none'} for {task}, got {preset!r}")
    if training.get("init_from") is not None:
        raise ValueError(f"init_from brings its own model: it contradicts preset {preset!r}")
    base = dict(PRESETS[preset].training)
    if training.get("text") or training.get("dataset"):
        base.pop("standard_library", None)
    if training.get("max_steps") is not None or training.get("max_epochs") is not None:
        base.pop("max_minutes", None)
    return {**base, **training}, {**PRESETS[preset].model, **model}


def _check_limit(settings: TrainingSettings, fields: Mapping[str, Any]) -> None:
    """Refuse a position table that is too small before reading data that may take long."""
    limit = math.prod(fields.get("axial_pos_shape", [settings.seq_len]))
    if fields.get("axial_pos_embds", True) and settings.seq_len > limit:
        raise ValueError(f"seq_len must be at most {limit}, the positions of the model; got {settings.seq_len}")


def _load(task: Task, folder: str, name: str) -> Any:
    if is_missing_folder(folder):
        raise ValueError(f"{name} {folder} cannot be loaded: there is no such folder")
    if not (Path(folder) / "config.json").is_file() and Path(folder).exists():
        raise ValueError(f"{name} {folder} is no saved model: there is no config.json in it")
    try:
        with quiet_transformers():
            saved, _ = PreTrainedConfig.get_config_dict(folder)
            if saved.get("model_type") != ReformerConfig.model_type:
                raise ValueError(f"its model_type is {saved.get('model_type')!r}, not 'reformer'")
            architecture = (saved.get("architectures") or [""])[0]
            return task.model_class.from_pretrained(folder, **task.loading_fields(architecture))
    except Exception as error:
        # Loaders raise dozens of kinds; what was to be loaded must be said with each.
        raise ValueError(f"{name} {folder} cannot be loaded: {error}") from error


def _budget(task: Task, checkpoint: Path | None) -> Budget:
    settings, steps = task.settings, task.settings.max_steps
    if settings.max_epochs is not None:
        # Launchers say how many processes there are before any of them has joined the others.
        processes = int(os.environ.get("WORLD_SIZE", "1")) // settings.sequence_parallel
        per_step = settings.batch_size * settings.gradient_accumulation * processes
        by_epochs = max(1, math.ceil(settings.max_epochs * len(task.train) / per_step))  # type: ignore[arg-type]
        steps = by_epochs if steps is None else min(steps, by_epochs)
    before = 0.0 if checkpoint is None else seconds_spent(checkpoint_state(checkpoint))
    return Budget(steps, settings.max_minutes, before)


def _run(
    task: Task,
    network: Any,
    checkpoint: Path | None,
    report: Report | None,
    callbacks: Sequence[TrainerCallback],
) -> TrainingResult:
    settings: TrainingSettings = task.settings
    budget = _budget(task, checkpoint)
    done = 0 if checkpoint is None else checkpoint_state(checkpoint).global_step
    if budget.fraction(done) >= 1.0:
        raise ValueError(f"{checkpoint} is already at the end of its run: raise --max-steps or --max-minutes to go on")
    tokens_per_step = settings.batch_size * settings.gradient_accumulation * task.tokens_per_row
    watchers = [] if report is None else [ProgressCallback(report, budget, tokens_per_step, task.measure)]
    trainer = TaskTrainer(
        task,
        budget,
        model=network,
        callbacks=[*watchers, *callbacks],
        processing_class=task.vocabulary.tokenizer,
    )
    trainer.args.eval_on_start = checkpoint is None
    # Where `truncation=True` cuts and the pipeline lays windows: what was trained on, or all that fits.
    limit = settings.seq_len if task.cuts_texts else network.config.max_length_of_positions
    task.vocabulary.tokenizer.model_max_length = limit
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = budget.seconds
        trainer.save_model()
        stop_sharing(network, settings.sequence_parallel)
        return _finish(task, trainer, {"seconds": round(seconds, 1), "tokens_per_step": tokens_per_step})


def _finish(task: Task, trainer: TaskTrainer, facts: Mapping[str, Any]) -> TrainingResult:
    folder = Path(task.settings.output)
    model: Any = trainer.model
    history = trainer.state.log_history
    judged = [entry for entry in history if f"eval_{task.measure.key}" in entry]
    kept = judged[-1]
    if task.settings.keep == "best":
        better = max if task.measure.greater_is_better else min
        # The first evaluation comes before training: no checkpoint holds its weights.
        after = [entry for entry in judged if entry["step"] > 0]
        kept = better(after, key=lambda entry: entry[f"eval_{task.measure.key}"])
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
        "tokens": round(trainer.state.global_step * facts["tokens_per_step"]),
        "seconds": facts["seconds"],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "peak_memory_bytes": peak_memory(),
        "history": history,
    }
    paths = {
        "model": folder,
        "checkpoint": Path(find_checkpoint(None, task.settings.output)),
        "settings": folder / "run.json",
    }
    paths["metrics"] = folder / "metrics.json"
    paths["metrics"].write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    label, key = (
        (task.measure.name, task.measure.key) if task.measure.training_key != "loss" else ("loss (nats)", "loss")
    )
    paths["loss curve (PNG)"], paths["loss curve (SVG)"] = save_loss_curve(history, folder, key=key, label=label)
    sample, more = task.finish(model, folder)
    return TrainingResult(task, metrics, sample, {**paths, **more})
