"""``flash-reformer generate``: text from a trained model."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flash_reformer.cli.errors import readable_errors
from flash_reformer.training.sampling import generate_text, load_language_model, load_vocabulary


def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", show_default=False)],
    prompt: Annotated[str | None, typer.Option(help="Text to go on from.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to go on from.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="Below 1 is safer, above 1 is wilder.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Choose among the k likeliest tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Choose among the likeliest tokens that hold this share.")] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the choices and of the hashing.")] = 0,
    num_hashes: Annotated[int | None, typer.Option(help="Rounds of hashing, in place of the model's own.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print a prompt and how a trained language model goes on from it, to the end of the text at most."""
    with readable_errors(debug):
        if prompt is not None and prompt_file is not None:
            raise ValueError("--prompt and --prompt-file contradict each other: give one")
        if prompt_file is not None and not prompt_file.is_file():
            raise ValueError(f"--prompt-file {prompt_file}: there is no such file")
        start = prompt_file.read_bytes() if prompt_file is not None else (prompt or "").encode("utf-8")
        network = load_language_model(model)
        written = generate_text(
            network,
            start,
            vocabulary=load_vocabulary(model, network.config.vocab_size),
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            num_hashes=num_hashes,
        )
        # Bare, not through rich: this may be piped on, and must not be wrapped or styled.
        sys.stdout.write((start + written).decode("utf-8", errors="replace") + "\n")
