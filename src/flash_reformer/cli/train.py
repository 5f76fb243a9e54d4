"""``flash-reformer train clm|mlm|classify|qa``: a model from text or examples."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from flash_reformer.cli.errors import TERMINATED, readable_errors
from flash_reformer.cli.estimate import describe_estimate
from flash_reformer.cli.options import (
    flag,
    given_model_fields,
    given_settings,
    model_parameters,
    settings_parameters,
    with_flags,
)
from flash_reformer.cli.progress import ProgressBar
from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.training import ranks, recipes
from flash_reformer.training.presets import PRESETS, check_effect
from flash_reformer.training.results import TrainingResult
from flash_reformer.training.signals import Terminated
from flash_reformer.training.tasks import TASKS, Task

# Written by `save_pretrained` into every config; they say what wrote it, not what the model is.
_BOOKKEEPING = frozenset({"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"})


class _ByTask(TyperGroup):
    """Lets `train --text ...` mean `train clm --text ...`, the first task there was."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        """Put the task in where flags come first."""
        if args and args[0].startswith("-") and args[0] != "--help":
            args = ["clm", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=_ByTask, no_args_is_help=True, help="Train a Reformer for a task; without one, clm.")


def _add(task: type[Task], says: str, example: str) -> None:
    presets = [name for name, preset in PRESETS.items() if preset.task == task.name]

    @with_flags(*settings_parameters(task), *model_parameters(task))
    def command(
        files: Annotated[
            list[Path] | None, typer.Argument(help="More files for --text.", show_default=False, hidden=True)
        ] = None,
        preset: Annotated[
            str | None, typer.Option(help=f"Starting point: {', '.join(presets)}.", hidden=not presets)
        ] = None,
        config: Annotated[Path | None, typer.Option(help="ReformerConfig as JSON; flags come on top of it.")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
        resume_from: Annotated[str | None, typer.Option(help="Go on from this checkpoint.")] = None,
        auto_resume: Annotated[
            bool,
            typer.Option("--auto-resume", help="Go on with this run if --output holds it, or start it."),
        ] = False,
        overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in --output.")] = False,
        dry_run: Annotated[
            bool,
            typer.Option("--dry-run", help="Say what the run would take in memory and time, and write nothing."),
        ] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
        **given: Any,
    ) -> None:
        console = Console(quiet=not ranks.is_main())
        left: dict[type[Exception], int] = {Terminated: TERMINATED}
        with readable_errors(debug, on_interrupt="interrupted; --resume goes on from the last checkpoint", left=left):
            if files and not given.get("text"):
                hint = "name text files after --text" if "text" in given else "name examples after --dataset"
                raise ValueError(f"unexpected argument {str(files[0])!r}: {hint}")
            if files:
                given["text"] = [*given["text"], *map(str, files)]
            if dry_run:
                _refuse_on_dry_run(resume=resume, resume_from=resume_from, auto_resume=auto_resume, overwrite=overwrite)
            if resume or resume_from is not None:
                others = {"preset": preset, "config": config, "auto_resume": auto_resume, "overwrite": overwrite}
                _refuse_on_resume(resume, resume_from, given, **others)
                with ProgressBar(console) as bar:
                    _show(console, _resume(task, given, resume_from, bar))
                return
            fields = _fields(given, config)
            start = PRESETS[preset].model if preset in PRESETS else {}
            sizes = {**task.model_defaults, **start, **fields}
            check_effect(given_model_fields(given), sizes.get("attn_layers", ReformerConfig().attn_layers))
            settings = given_settings(task, given)
            if dry_run:
                for line in describe_estimate(recipes.dry_run(task.name, settings, fields, preset=preset)):
                    console.print(line, highlight=False, markup=False, soft_wrap=True)
                return
            more: dict[str, Any] = {"preset": preset, "overwrite": overwrite, "auto_resume": auto_resume}
            with ProgressBar(console) as bar:
                result = recipes.train(task.name, settings, fields, **more, report=bar)
            _show(console, result)

    command.__doc__ = f"{says}\n\nFor example: flash-reformer train {task.name} {example}"
    app.command(task.name)(command)


_add(
    TASKS["clm"],
    "Train a causal language model on text: it goes on with what it is given.",
    "--text book.txt --max-steps 500 --output runs/book",
)
_add(
    TASKS["mlm"],
    "Train a masked language model on text: it fills in words.",
    "--text book.txt --output runs/book",
)
_add(
    TASKS["classify"],
    "Train a classifier on texts with labels (JSONL, CSV, parquet or a dataset's name).",
    "--dataset reviews.jsonl --output runs/reviews",
)
_add(
    TASKS["qa"],
    "Train a model that finds answers in texts (SQuAD-style JSON, JSONL or a dataset's name).",
    "--dataset questions.json --output runs/answers",
)


def _resume(task: type[Task], given: Mapping[str, Any], resume_from: str | None, bar: ProgressBar) -> TrainingResult:
    settings = given_settings(task, given)
    if resume_from is not None and "output" not in settings:
        settings["output"] = str(Path(resume_from).parent)
    return recipes.resume(settings, resume_from=resume_from, task=task.name, report=bar)


def _fields(given: Mapping[str, Any], config: Path | None) -> dict[str, Any]:
    fields = given_model_fields(given)
    if config is None:
        return fields
    base = _read_config(config)
    if "attn_layers" in fields:
        base.pop("num_hidden_layers", None)  # it counts the layers that --layers replaces
    return {**base, **fields}


def _refuse_on_dry_run(**others: Any) -> None:
    for name, value in others.items():
        if value:
            raise ValueError(f"--dry-run is about a new run, and writes nothing: it contradicts {flag(name)}")


def _refuse_on_resume(resume: bool, resume_from: str | None, given: Mapping[str, Any], **others: Any) -> None:
    if resume and resume_from is not None:
        raise ValueError("--resume and --resume-from contradict each other: the last checkpoint, or the one named?")
    word = "--resume" if resume else "--resume-from"
    for name, value in others.items():
        if value:
            raise ValueError(f"{word} goes on with a run as it was set up: it contradicts {flag(name)}")
    if given_model_fields(given) or given.get("init_from") is not None:
        named = [flag(each) for each in given if given[each] is not None and given_model_fields({each: given[each]})]
        raise ValueError(f"{word} brings its own model: it contradicts {', '.join(named) or '--init-from'}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--config {path} must hold a JSON object, got {type(fields).__name__}")
    if fields.get("model_type", "reformer") != "reformer":
        raise ValueError(f"--config {path} must be of model_type 'reformer', got {fields['model_type']!r}")
    fields = {name: value for name, value in fields.items() if name not in _BOOKKEEPING}
    unknown = sorted(set(fields) - set(ReformerConfig().to_dict()))
    if unknown:
        raise ValueError(f"--config {path} has fields that ReformerConfig does not know: {', '.join(unknown)}")
    return fields


def _show(console: Console, result: TrainingResult) -> None:
    metrics = result.metrics
    if any(result.sample):
        console.rule("a held-out text, and how the model goes on")
        console.print(result.sample[0], style="dim", end="", markup=False, highlight=False)
        console.print(result.sample[1], markup=False, highlight=False)
        console.rule()
    measure = result.task.measure
    console.print(
        f"{metrics['parameters']:,} parameters, {metrics['steps']} steps, {metrics['tokens']:,} tokens in "
        f"{metrics['seconds']:.0f} s; held-out {measure.name} {metrics[f'held_out_{measure.key}_at_start']:.3f} -> "
        f"{metrics[f'held_out_{measure.key}']:.3f}",
        highlight=False,
        soft_wrap=True,
    )
    for name, path in result.paths.items():
        console.print(f"{name + ':':<18}{path}", highlight=False, markup=False, soft_wrap=True)
