"""``flash-reformer tokenizer``: a vocabulary from text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flash_reformer.cli.errors import readable_errors
from flash_reformer.tokenization.training import MODEL_TYPES, NORMALIZATIONS, train_vocabulary


def tokenizer(
    texts: Annotated[list[Path], typer.Argument(metavar="TEXT...", help="UTF-8 text files.", show_default=False)],
    output: Annotated[Path, typer.Option(help="Folder to save the tokenizer in.", show_default=False)],
    vocab_size: Annotated[int, typer.Option(help="Number of entries, special tokens included.")] = 320,
    model_type: Annotated[str, typer.Option("--type", help=f"One of {', '.join(MODEL_TYPES)}.")] = "bpe",
    character_coverage: Annotated[float, typer.Option(help="Share of the characters that get entries.")] = 0.9995,
    byte_fallback: Annotated[bool, typer.Option("--byte-fallback", help="Write other characters as bytes.")] = False,
    normalization: Annotated[str, typer.Option(help=f"One of {', '.join(NORMALIZATIONS)}.")] = "nmt_nfkc",
    mask_token: Annotated[str | None, typer.Option(help="For masked language models, such as '[MASK]'.")] = None,
    symbol: Annotated[list[str] | None, typer.Option(help="Another special token; may be repeated.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a tokenizer in --output.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train a SentencePiece vocabulary on text, and save it for ReformerTokenizer and ReformerTokenizerFast.

    For example: flash-reformer tokenizer novel.txt --vocab-size 320 --type bpe --output runs/vocabulary
    """
    with readable_errors(debug):
        trained = train_vocabulary(
            texts,
            output,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            byte_fallback=byte_fallback,
            normalization=normalization,
            mask_token=mask_token,
            additional_special_tokens=symbol or (),
            overwrite=overwrite,
        )
        special = ", ".join(f"{name} {trained.convert_tokens_to_ids(name)}" for name in trained.all_special_tokens)
        console = Console()
        console.print(
            f"{len(trained)} entries ({model_type}), special tokens {special}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        console.print(f"saved in {output}", markup=False, highlight=False, soft_wrap=True)
