"""Command-line flags made from the settings that they set, so each is named, explained and defaulted in one place."""

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.training.presets import MODEL_OPTIONS, parse_model_option
from flash_reformer.training.tasks import Task

# Values that a shell gives as they are; all other kinds are text that is parsed.
_PLAIN_KINDS: Mapping[str, type] = {"int": int, "float": float}


def flag(name: str) -> str:
    """Return the flag that sets ``name``: ``seq_len`` becomes ``--seq-len``."""
    return "--" + name.replace("_", "-")


def settings_parameters(task: type[Task]) -> list[inspect.Parameter]:
    """Make one optional flag per setting of a task."""
    hints = typing.get_type_hints(task.settings_class)
    parameters = []
    for field in dataclasses.fields(task.settings_class):
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(choice for choice in kind.__args__ if choice is not types.NoneType)
        if typing.get_origin(kind) is tuple:
            kind = list[str]
        default = None if field.default in (None, "", ()) else str(field.default)
        parameters.append(_parameter(field.name, kind, field.metadata["help"], field.metadata["panel"], default))
    return parameters


def model_parameters(task: type[Task]) -> list[inspect.Parameter]:
    """Make one optional flag per model size in ``MODEL_OPTIONS``; the defaults are the task's."""
    plain = ReformerConfig()
    parameters = []
    for name, (field, kind, help_text) in MODEL_OPTIONS.items():
        if field.startswith("classifier_") and task.name != "classify":
            continue  # it would have no effect
        value = None if name.startswith("axial_pos_") else task.model_defaults.get(field, getattr(plain, field))
        if isinstance(value, list | tuple):
            value = ",".join(map(str, value))
        default = None if value is None else str(value)
        parameters.append(_parameter(name, _PLAIN_KINDS.get(kind, str), help_text, "Model", default))
    return parameters


def _parameter(name: str, kind: Any, help_text: str, panel: str, default: str | None) -> inspect.Parameter:
    # The value is None unless the flag is given: presets, config files and saved runs lie between it and the default.
    if kind is bool:
        declarations: Sequence[str] = (f"{flag(name)}/--no-{flag(name)[2:]}",)
        default = None
    else:
        declarations = (flag(name),)
    shown = help_text if default is None else f"{help_text} [default: {default}]"
    # Square brackets are markup to the help printer.
    option = typer.Option(*declarations, help=shown.replace("[", r"\["), rich_help_panel=panel, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def with_flags(*parameters: inspect.Parameter) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command that takes ``**given`` these flags beside those that it names itself."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        named = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in named]
        command.__signature__ = signature.replace(parameters=[*named, *parameters])  # type: ignore[attr-defined]
        return command

    return decorate


def given_settings(task: type[Task], given: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the settings of the run out of the flags given."""
    names = [field.name for field in dataclasses.fields(task.settings_class)]
    picked = {name: given[name] for name in names if given.get(name) not in (None, [])}
    if "text" in picked:
        picked["text"] = tuple(picked["text"])
    return picked


def given_model_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the sizes of the model out of the flags given, under the names of the config's fields."""
    return {
        field: parse_model_option(name, given[name])
        for name, (field, _, _) in MODEL_OPTIONS.items()
        if given.get(name) is not None
    }
