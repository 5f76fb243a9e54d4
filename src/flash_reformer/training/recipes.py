"""Training recipes: from data to a saved model, on `transformers.Trainer`."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.training import ranks
from flash_reformer.training.budget import Budget
from flash_reformer.training.building import (
    check_processes,
    find_vocabulary,
    load_model,
    on_top_of_preset,
    prepare,
    task_class,
)
from flash_reformer.training.checkpoints import own_checkpoints, step_of
from flash_reformer.training.estimate import Estimate, data_memory, estimate
from flash_reformer.training.lengths import StreamPosition, grow_positions
from flash_reformer.training.memory import memory_of_process
from flash_reformer.training.progress import ProgressCallback, Report
from flash_reformer.training.quiet import quiet_transformers
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
from flash_reformer.training.sharding import views_between_layers
from flash_reformer.training.sharing import check_sharing, replicas, stop_sharing
from flash_reformer.training.signals import Terminated, stop_on_sigterm
from flash_reformer.training.tasks import Task
from flash_reformer.training.trainer import (
    TaskTrainer,
    bad_evaluations,
    check_reporters,
    seconds_spent,
    tokens_of,
    uses_gpu,
)


class LostRankError(RuntimeError):
    """Another rank of the run has gone, and this one cannot go on without it."""


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
    kind, settings, fields = _asked(task, training, model, preset)
    with _on_ranks(settings):
        with ranks.together():
            if auto_resume and overwrite:
                raise ValueError("auto_resume and overwrite contradict each other: go on with a run, or remove it?")
        if auto_resume and ranks.on_main(lambda: _is_to_go_on(task, settings, fields)):
            asked = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
            return _resume(asked, None, task, report, callbacks, again=True)
        with ranks.together():
            prepared, network = prepare(kind, settings, fields)
            check_sharing(settings, network.config.num_attention_heads)
        ranks.on_main(lambda: _open_folder(prepared, fields, overwrite or auto_resume))
        return _run(prepared, network, None, report, callbacks)


def _asked(
    task: str, training: Mapping[str, Any], model: Mapping[str, Any] | None, preset: str | None
) -> tuple[type[Task], TrainingSettings, dict[str, Any]]:
    """Return the task, its settings and the fields of the model that were asked for."""
    kind = task_class(task)
    given, fields = dict(training), dict(model or {})
    if preset is not None:
        given, fields = on_top_of_preset(task, preset, given, fields)
    return kind, kind.settings_class(**kind.settings_class.with_end(given)), fields


def _open_folder(task: Task, fields: Mapping[str, Any], overwrite: bool) -> None:
    task.warn()
    prepare_folder(task.settings.output, overwrite=overwrite)
    write_settings(task.name, task.settings, fields)


def _is_to_go_on(task: str, settings: TrainingSettings, fields: Mapping[str, Any]) -> bool:
    """Say whether this very run has left something to go on from."""
    if not holds_run(settings.output):
        return False
    usual = {**ReformerConfig().to_dict(), **task_class(task).model_defaults}
    return check_same_run(task, settings, fields, usual)


@contextmanager
def _on_ranks(settings: TrainingSettings) -> Iterator[None]:
    """Join the ranks of the run, if there are several."""
    on_gpu = torch.cuda.is_available() and not settings.cpu
    with ranks.own_environment(), ranks.joined(on_gpu):
        with ranks.together():
            ranks.check_launcher()
            _check_devices(settings)
        yield


def _check_devices(settings: TrainingSettings) -> None:
    settings.check_ranks(ranks.is_launched())
    uses_gpu(settings)
    check_reporters(settings)


def dry_run(
    task: str,
    training: Mapping[str, Any],
    model: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
) -> Estimate:
    """Return what :func:`train` would take with these arguments: parameters, memory by part, time.

    Reads the data, makes the model, and runs calibrating steps for up to ten seconds in a process of its own. Writes
    nothing: ``output`` may be left out. Raises ``ValueError`` for what :func:`train` would refuse, but for the state
    of the output folder.
    """
    before = memory_of_process()
    training = {**training, "output": training.get("output") or "nowhere"}
    kind, settings, fields = _asked(task, training, model, preset)
    about = "ranks, and a dry run is of one process: leave it out"
    settings.refuse_without(False, "parallel find_unused_parameters static_graph cpu_offload sequence_parallel", about)
    _check_devices(settings)
    prepared, network = prepare(kind, settings, fields)
    if getattr(settings, "grow_positions", False):
        grow_positions(network, settings.seq_len, settings.seed)  # what the run ends with
    return estimate(prepared, network, _budget(prepared, None), data_memory(before))


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
    with ranks.own_environment(), ranks.joined(torch.cuda.is_available() and not on_cpu):
        with ranks.together():
            ranks.check_launcher()
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
    checkpoint = ranks.on_main(lambda: find_checkpoint(resume_from, training.get("output", "")))
    with ranks.together():
        recorded = recorded_task(checkpoint)
        if task is not None and recorded != task:
            raise ValueError(f"{checkpoint} belongs to a run of {recorded}, not of {task}")
        kind = task_class(recorded)
        settings = resumed_settings(checkpoint, kind.settings_class, training)
        settings.check_complete()
        check_processes(settings)
        _check_devices(settings)
        prepared = kind(settings, find_vocabulary(settings))

    def open_folder() -> None:
        if Path(settings.output).resolve() != checkpoint.parent.resolve():
            prepare_folder(settings.output, overwrite=False)
        else:
            check_writable(Path(settings.output))

    ranks.on_main(open_folder)
    with ranks.together():
        network = load_model(prepared, str(checkpoint), "checkpoint")
        check_sharing(settings, network.config.num_attention_heads)
    if settings.keep == "best":
        ranks.on_main(lambda: check_best(checkpoint))
    if again and _is_over(prepared, checkpoint) and has_ended(settings.output, checkpoint):
        return left_by(prepared)
    ranks.on_main(lambda: write_settings(recorded, settings, checkpoint=checkpoint))
    return _run(prepared, network, checkpoint, report, callbacks)


def train_clm(training: Mapping[str, Any], model: Mapping[str, Any] | None = None, **options: Any) -> TrainingResult:
    """Train a causal language model; see :func:`train`."""
    return train("clm", training, model, **options)


def resume_clm(training: Mapping[str, Any], **options: Any) -> TrainingResult:
    """Go on with the training of a causal language model; see :func:`resume`."""
    return resume(training, task="clm", **options)


def _budget(task: Task, checkpoint: Path | None) -> Budget:
    settings, steps = task.settings, task.settings.max_steps
    if settings.max_epochs is not None:
        per_step = settings.batch_size * settings.gradient_accumulation * replicas(settings)
        by_epochs = max(1, math.ceil(settings.max_epochs * task.rows_per_pass / per_step))
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
    watchers = []
    if report is not None and ranks.is_main():
        watchers.append(ProgressCallback(report, budget, functools.partial(tokens_of, task), task.measure, settings))
    with stop_on_sigterm() as request, quiet_transformers(), views_between_layers():
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
        if checkpoint is not None:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, StreamPosition):
                    callback.restore(checkpoint_state(checkpoint))
        # Where `truncation=True` cuts and the pipeline lays windows: what was trained on, or all that fits.
        limit = settings.seq_len if task.cuts_texts else network.config.max_length_of_positions
        task.vocabulary.tokenizer.model_max_length = limit
        _train_on(trainer, checkpoint)
        seconds = budget.seconds
        trainer.save_final_model()
        # What follows is done by rank 0 alone.
        stop_sharing(network, settings.sequence_parallel)
        steps = trainer.state.global_step
        return finish(task, trainer, {"seconds": round(seconds, 1), "tokens": round(tokens_of(task, steps))})


def _train_on(trainer: TaskTrainer, checkpoint: Path | None) -> None:
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except RuntimeError as error:
        lost = _lost_rank(error, trainer)
        if lost is None:
            raise
        raise lost from error
    if trainer.rhythm.terminated:
        raise Terminated(_where(trainer, "SIGTERM"))


def _where(trainer: TaskTrainer, what: str) -> str:
    kept = own_checkpoints(Path(trainer.settings.output))
    has = f"{kept[-1].name} has the run up to step {step_of(kept[-1])}" if kept else "there is no checkpoint yet"
    return f"{what} at step {trainer.state.global_step}: {has}; --resume or --auto-resume goes on"


def _lost_rank(error: RuntimeError, trainer: TaskTrainer) -> LostRankError | None:
    """Say what an error of the ranks' network means, if it is one."""
    words = ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL")
    of_network = isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in words)
    if ranks.world_size() == 1 or not of_network:
        return None
    line = str(error).split("\n")[0]
    return LostRankError(f"rank {ranks.rank()} has lost another rank ({line}). {_where(trainer, 'It stopped')}")
