"""``flash-reformer evaluate``: how well a trained language model predicts whole texts."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.status import Status

from flash_reformer.cli.errors import readable_errors
from flash_reformer.training.evaluation import TextScore, evaluate_text, held_out_texts, tail_of
from flash_reformer.training.sampling import load_language_model, load_vocabulary
from flash_reformer.training.sources import check_files


def evaluate(
    model: Annotated[Path, typer.Argument(help="Folder of a trained model.", show_default=False)],
    texts: Annotated[
        list[Path] | None, typer.Argument(metavar="TEXT...", help="Text files, each judged whole.", show_default=False)
    ] = None,
    held_out_of: Annotated[Path | None, typer.Option(help="Judge the text that this run holds out.")] = None,
    tail: Annotated[float | None, typer.Option(help="Judge the last so much of each file only, such as 0.1.")] = None,
    context: Annotated[
        str | None,
        typer.Option(
            help="Tokens that are read at once: a number, 'full' for the whole text, or several with commas between; "
            "by default all that the model has positions for."
        ),
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens from one window to the next; else half of them.")] = None,
    num_hashes: Annotated[int | None, typer.Option(help="Rounds of hashing, in place of the model's own.")] = None,
    precision: Annotated[str, typer.Option(help="Precision of the arithmetic: fp32, bf16 or fp16.")] = "fp32",
    seed: Annotated[int, typer.Option(help="Seed of the hashing.")] = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Stay on the CPU even where there is a GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of JSON objects, one per context.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Print bits per byte, bits per token and perplexity of whole texts under a trained language model.

    A text that is longer than the context is read in windows that overlap; each token is predicted once.

    For example: flash-reformer evaluate runs/book book.txt --tail 0.1 --context 4096,full
    """
    with readable_errors(debug):
        found = _read(texts or [], held_out_of, tail)
        network = load_language_model(model)
        vocabulary = load_vocabulary(model, network.config.vocab_size)
        if torch.cuda.is_available() and not cpu:
            network = network.to("cuda")
        progress = Console(stderr=True, highlight=False, soft_wrap=True)
        scores = []
        for each in _contexts(context):
            with progress.status("starting") as status:
                score = evaluate_text(
                    network,
                    found,
                    vocabulary=vocabulary,
                    context=each,
                    stride=None if each == "full" and "," in str(context) else stride,
                    num_hashes=num_hashes,
                    precision=precision,
                    seed=seed,
                    report=partial(_show, status),
                )
            scores.append(score)
            if not as_json:
                Console(highlight=False, soft_wrap=True).print(_line(score))
        if as_json:
            rounds = network.config.num_hashes if num_hashes is None else num_hashes
            record = [{**_record(score), "num_hashes": rounds, "precision": precision} for score in scores]
            Console(highlight=False, soft_wrap=True).print(json.dumps(record, indent=2), markup=False)


def _show(status: Status, done: int, total: int) -> None:
    status.update(f"{done:,} of {total:,} tokens")


def _read(texts: list[Path], run: Path | None, tail: float | None) -> list[bytes]:
    if texts and run is not None:
        raise ValueError("TEXT and --held-out-of contradict each other: give one")
    if run is not None and tail is not None:
        raise ValueError("--held-out-of and --tail contradict each other: the run says what it holds out")
    if run is not None:
        return held_out_texts(run)
    if not texts:
        raise ValueError("no text to evaluate on: name text files after the model, or a run with --held-out-of")
    return [path.read_bytes() if tail is None else tail_of(path, tail) for path in check_files(texts, flag="TEXT")]


def _contexts(text: str | None) -> list[int | str | None]:
    if text is None:
        return [None]
    parts = [part.strip() for part in text.split(",")]
    if not all(part == "full" or part.isdecimal() for part in parts):
        raise ValueError(f"--context must be numbers of tokens or 'full', with commas between, got {text!r}")
    return [part if part == "full" else int(part) for part in parts]


def _record(score: TextScore) -> dict[str, Any]:
    sums = {name: getattr(score, name) for name in ("bits_per_byte", "bits_per_token", "perplexity")}
    return {**sums, **dataclasses.asdict(score)}


def _line(score: TextScore) -> str:
    windows = "1 window" if score.windows == 1 else f"{score.windows:,} windows, stride {score.stride:,}"
    return (
        f"context {score.context:,}: {score.bits_per_byte:.4f} bits per byte, {score.bits_per_token:.4f} bits per "
        f"token, perplexity {score.perplexity:.3f} ({score.bytes:,} bytes, {score.tokens:,} tokens, {windows}, "
        f"{score.seconds:.1f} s)"
    )
