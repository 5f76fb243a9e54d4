"""``flash-reformer train``: a byte-level causal language model from text."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flash_reformer.cli.errors import readable_errors
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
from flash_reformer.training.recipes import TrainingResult, resume_clm, train_clm
from flash_reformer.training.settings import PRESETS

# Written by `save_pretrained` into every config; they say what wrote it, not what the model is.
_BOOKKEEPING = frozenset({"model_type", "architectures", "transformers_version", "dtype", "_name_or_path"})


@with_flags(*settings_parameters(), *model_parameters())
def train(
    files: Annotated[list[Path] | None, typer.Argument(help="More files for --text.", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option(help=f"Starting point: {', '.join(PRESETS)}.")] = None,
    config: Annotated[Path | None, typer.Option(help="ReformerConfig as JSON; flags come on top of it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    resume_from: Annotated[str | None, typer.Option(help="Go on from this checkpoint.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Remove an earlier run in --output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    **given: Any,
) -> None:
    """Train a byte-level causal Reformer on text, and save it.

    For example: flash-reformer train --preset demo --output runs/demo
    """
    console = Console()
    with readable_errors(debug, on_interrupt="interrupted; --resume goes on from the last checkpoint"):
        if files and not given["text"]:
            raise ValueError(f"unexpected argument {str(files[0])!r}: name text files after --text")
        settings = given_settings({**given, "text": [*(given["text"] or []), *map(str, files or [])]})
        fields = given_model_fields(given)
        with ProgressBar(console) as bar:
            if resume or resume_from is not None:
                _refuse_on_resume(resume, resume_from, given, preset=preset, config=config, overwrite=overwrite)
                if resume_from is not None and "output" not in settings:
                    settings["output"] = str(Path(resume_from).parent)
                result = resume_clm(settings, resume_from=resume_from, report=bar)
            else:
                if config is not None:
                    base = _read_config(config)
                    if "attn_layers" in fields:
                        base.pop("num_hidden_layers", None)  # it counts the layers that --layers replaces
                    fields = {**base, **fields}
                result = train_clm(settings, fields, preset=preset, overwrite=overwrite, report=bar)
        _show(console, result)


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
    console.print(
        f"{metrics['parameters']:,} parameters, {metrics['steps']} steps, {metrics['tokens']:,} tokens in "
        f"{metrics['seconds']:.0f} s; held-out bits per byte {metrics['held_out_bits_per_byte_at_start']:.3f} -> "
        f"{metrics['held_out_bits_per_byte']:.3f}",
        highlight=False,
        soft_wrap=True,
    )
    for name, path in result.paths.items():
        console.print(f"{name + ':':<18}{path}", highlight=False, markup=False, soft_wrap=True)
