"""Training recipes: from data to a saved model, on `transformers.Trainer`."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainerCallback

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.training.budget import Budget
from flash_reformer.training.checkpoints import own_checkpoints, step_of
from flash_reformer.training.presets import PRESETS, axial_shape
from flash_reformer.training.progress import ProgressCallback, Report
from flash_reformer.training.quiet import quiet_transformers
from flash_reformer.training.ranks import joined, on_main, rank, world_size
from flash_reformer.training.results import TrainingResult, finish, left_by
from flash_reformer.training.run_folder import (
    check_best,
    check_same_run,
    check_writable,
    checkpoint_state,
    find_checkpoint,
    has_ended,
    holds_run,
    prepare_folder,
    recorded_cpu,
    recorded_task,
    resumed_settings,
    write_settings,
)
from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.signals import Terminated, stop_on_sigterm
from flash_reformer.training.sources import is_missing_folder
from flash_reformer.training.tasks import TASKS, Task
from flash_reformer.training.trainer import TaskTrainer, bad_evaluations, seconds_spent, uses_gpu
from flash_reformer.training.vocabulary import Vocabulary


class LostRankError(RuntimeError):
    """Another rank of the run has died or is out of reach, so this one cannot go on."""


def train(
    task: str,
    training: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    overwrite: bool = False,
    auto_resume: bool = False,
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
        auto_resume: go on with the run in the output folder, if it is this one; where it has ended, return what it
            left. So one command line starts a run and, given again after any failure, goes on with it.
        report: is told how the run goes.
        callbacks: more `transformers` callbacks.

    A first SIGTERM lets the run finish its step, save and raise `Terminated`. Raises `DivergedError` where a loss or
    gradient is not finite, ``OSError`` where the model cannot be saved, ``ValueError`` for bad settings and bad data
    before anything is written. Seeds torch's, numpy's and Python's default generators, as the Trainer does.
    """
    kind = task_class(task)
    given, fields = dict(training), dict(model or {})
    if preset is not None:
        given, fields = _on_top_of_preset(task, preset, given, fields)
    settings = kind.settings_class(**kind.settings_class.with_end(given))
    settings.check_complete()
    with joined(uses_gpu(settings)):
        if auto_resume and overwrite:
            raise ValueError("auto_resume and overwrite contradict each other: go on with a run, or remove it?")
        if auto_resume and on_main(lambda: _is_to_go_on(task, settings, fields)):
            return _go_on(settings, task, report, callbacks)
        network, prepared = _prepared(kind, settings, fields)
        on_main(lambda: _open_folder(task, settings, fields, overwrite or auto_resume))
        return _run(prepared, network, None, report, callbacks)


def _prepared(kind: type[Task], settings: TrainingSettings, fields: Mapping[str, Any]) -> tuple[Any, Task]:
    """Return a new run's model and task."""
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
    return network, prepared


def _open_folder(task: str, settings: TrainingSettings, fields: Mapping[str, Any], overwrite: bool) -> None:
    prepare_folder(settings.output, overwrite=overwrite)
    write_settings(task, settings, fields)


def _is_to_go_on(task: str, settings: TrainingSettings, fields: Mapping[str, Any]) -> bool:
    """Say whether this very run has left something to go on from."""
    if not holds_run(settings.output):
        return False
    usual = {**ReformerConfig().to_dict(), **task_class(task).model_defaults}
    return check_same_run(task, settings, fields, usual)


def _go_on(
    settings: TrainingSettings, task: str, report: Report | None, callbacks: Sequence[TrainerCallback]
) -> TrainingResult:
    asked = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    return _resume(asked, None, task, report, callbacks, again=True)


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
    on_cpu = training.get("cpu", recorded_cpu(resume_from, training.get("output", "")))
    with joined(torch.cuda.is_available() and not on_cpu):
        return _resume(training, resume_from, task, report, callbacks, again=False)


def _resume(
    training: Mapping[str, Any],
    resume_from: str | None,
    task: str | None,
    report: Report | None,
    callbacks: Sequence[TrainerCallback],
    *,
    again: bool,
) -> TrainingResult:
    checkpoint = on_main(lambda: find_checkpoint(resume_from, training.get("output", "")))
    recorded = recorded_task(checkpoint)
    if task is not None and recorded != task:
        raise ValueError(f"{checkpoint} belongs to a run of {recorded}, not of {task}")
    kind = task_class(recorded)
    settings = resumed_settings(checkpoint, kind.settings_class, training)
    settings.check_complete()
    uses_gpu(settings)
    prepared = kind(settings, find_vocabulary(settings))
    if Path(settings.output).resolve() != checkpoint.parent.resolve():
        on_main(lambda: prepare_folder(settings.output, overwrite=False))
    else:
        on_main(lambda: check_writable(Path(settings.output)))
    network = _load(prepared, str(checkpoint), "checkpoint")
    if settings.keep == "best":
        on_main(lambda: check_best(checkpoint))
    if again and _is_over(prepared, checkpoint) and has_ended(settings.output, checkpoint):
        return left_by(prepared)
    on_main(lambda: write_settings(recorded, settings, checkpoint=checkpoint))
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
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        per_step = settings.batch_size * settings.gradient_accumulation * processes
        by_epochs = max(1, math.ceil(settings.max_epochs * len(task.train) / per_step))  # type: ignore[arg-type]
        steps = by_epochs if steps is None else min(steps, by_epochs)
    before = 0.0 if checkpoint is None else seconds_spent(checkpoint_state(checkpoint))
    return Budget(steps, settings.max_minutes, before)


def _is_over(task: Task, checkpoint: Path) -> bool:
    """Say whether a run had nothing left to train when it wrote this checkpoint."""
    state, patience = checkpoint_state(checkpoint), task.settings.early_stopping
    stopped_early = patience is not None and bad_evaluations(state) >= patience
    return stopped_early or _budget(task, checkpoint).fraction(state.global_step) >= 1.0


def _run(
    task: Task,
    network: Any,
    checkpoint: Path | None,
    report: Report | None,
    callbacks: Sequence[TrainerCallback],
) -> TrainingResult:
    settings: TrainingSettings = task.settings
    budget = _budget(task, checkpoint)
    over = checkpoint is not None and _is_over(task, checkpoint)
    if checkpoint is not None and over and has_ended(settings.output, checkpoint):
        raise ValueError(
            f"{checkpoint} is already at the end of its run: raise --max-steps or --max-minutes (or --early-stopping, "
            "if it has stopped early) to go on"
        )
    tokens_per_step = settings.batch_size * settings.gradient_accumulation * task.tokens_per_row
    watchers = [] if report is None else [ProgressCallback(report, budget, tokens_per_step, task.measure)]
    with stop_on_sigterm() as request, quiet_transformers():
        trainer = TaskTrainer(
            task,
            budget,
            request,
            model=network,
            callbacks=[*watchers, *callbacks],
            processing_class=task.vocabulary.tokenizer,
        )
        trainer.args.eval_on_start = checkpoint is None
        trainer.over = over
        # Where `truncation=True` cuts and the pipeline lays windows: what was trained on, or all that fits.
        limit = settings.seq_len if task.cuts_texts else network.config.max_length_of_positions
        task.vocabulary.tokenizer.model_max_length = limit
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except RuntimeError as error:
            lost = _lost_rank(error, trainer)
            if lost is None:
                raise
            raise lost from error
        if trainer.rhythm.terminated:
            raise Terminated(_where(trainer, "SIGTERM"))
        seconds = budget.seconds
        trainer.save_model()
        return finish(task, trainer, {"seconds": round(seconds, 1), "tokens_per_step": tokens_per_step})


def _where(trainer: TaskTrainer, what: str) -> str:
    kept = own_checkpoints(Path(trainer.settings.output))
    has = f"{kept[-1].name} has the run up to step {step_of(kept[-1])}" if kept else "there is no checkpoint yet"
    return f"{what} at step {trainer.state.global_step}: {has}; --resume or --auto-resume goes on"


def _lost_rank(error: RuntimeError, trainer: TaskTrainer) -> LostRankError | None:
    """Say what an error of the ranks' network means, if it is one."""
    words = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    of_network = isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)
    if world_size() == 1 or not of_network:
        return None
    line = str(error).split("\n")[0]
    return LostRankError(f"rank {rank()} has lost another rank ({line}). {_where(trainer, 'It stopped')}")
