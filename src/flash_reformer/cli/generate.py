"""``flash-reformer generate``: text from a trained model."""

import codecs
import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flash_reformer.cli.errors import readable_errors
from flash_reformer.training.sampling import load_language_model, load_vocabulary, write_text


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
    prefill_chunk_size: Annotated[
        int | None, typer.Option(help="Read a long prompt by so many tokens at a time: less memory, other values.")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print a prompt and how a trained language model goes on from it, token by token, to the end of the text at most.

    Tokens per second go to stderr.
    """
    with readable_errors(debug):
        if prompt is not None and prompt_file is not None:
            raise ValueError("--prompt and --prompt-file contradict each other: give one")
        if prompt_file is not None and not prompt_file.exists():
            raise ValueError(f"--prompt-file {prompt_file}: there is no such file")
        if prompt_file is not None and prompt_file.is_dir():
            raise ValueError(f"--prompt-file {prompt_file} is a folder")
        start = prompt_file.read_bytes() if prompt_file is not None else (prompt or "").encode("utf-8")
        network = load_language_model(model)
        vocabulary = load_vocabulary(model, network.config.vocab_size)
        screen = _Screen()
        written = write_text(
            network,
            start,
            vocabulary=vocabulary,
            max_new_tokens=max_new_tokens,
            greedy=greedy,
            temperature=1.0 if temperature is None else temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            num_hashes=num_hashes,
            prefill_chunk_size=prefill_chunk_size,
            stream=lambda piece: screen.show(piece if screen.shown else start + piece),
        )
        screen.show(b"" if screen.shown else start, last=True)
        rate = "" if written.tokens_per_second is None else f" ({written.tokens_per_second:,.0f} tokens/s)"
        # Not on stdout, which is the text's.
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"{written.prompt_tokens} tokens read in {written.prompt_seconds:.2f} s, "
            f"{written.new_tokens} written in {written.seconds:.2f} s{rate}"
        )


class _Screen:
    """Writes text bare, not through rich: it may be piped on, and must not be wrapped or styled."""

    def __init__(self) -> None:
        self.shown = False
        # A terminal that cannot show a character gets another one for it, not a crash.
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def show(self, piece: bytes, *, last: bool = False) -> None:
        """Write a piece of UTF-8 as far as its characters are whole, at the ``last`` all of it and an end of line."""
        self.shown = True
        sys.stdout.write(self._decoder.decode(piece, final=last) + ("\n" if last else ""))
        sys.stdout.flush()
