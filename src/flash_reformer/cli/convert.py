"""``flash-reformer convert``: a trax checkpoint becomes a folder that ``from_pretrained`` loads."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from flash_reformer.cli.errors import readable_errors
from flash_reformer.models.conversion import convert_trax_checkpoint
from flash_reformer.models.safe_pickle import MAX_BYTES

_GIB = 2**30


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="model.pkl.gz of a trax ReformerLM.", show_default=False)],
    output: Annotated[Path, typer.Option(help="New folder for the model.", show_default=False)],
    config: Annotated[
        Path,
        typer.Option(
            help="ReformerConfig as JSON, or what of it the arrays do not tell: activation, chunk lengths, buckets, "
            "hash rounds.",
            show_default=False,
        ),
    ],
    max_gib: Annotated[float, typer.Option(help="Refuse checkpoints larger than this, decompressed.")] = MAX_BYTES
    / _GIB,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Convert a trax checkpoint. Nothing that it says is run: arrays and plain containers are read, all else refused.

    For example: flash-reformer convert model.pkl.gz --config config.json --output converted
    """
    with readable_errors(debug):
        if not max_gib > 0:
            raise ValueError(f"--max-gib must be above 0; got {max_gib:g}")
        model = convert_trax_checkpoint(checkpoint, output, _read_fields(config), max_bytes=int(max_gib * _GIB))
        layers = ", ".join(model.config.attn_layers)
        text = f"{model.num_parameters():,} parameters ({layers}) written to {output}"
        Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _read_fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    try:
        fields = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"--config {path} is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"--config {path} must hold a JSON object; it holds a {type(fields).__name__}")
    return fields
