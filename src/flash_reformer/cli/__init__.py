"""The command ``flash-reformer``: one file per verb."""

import typer

from flash_reformer.cli.convert import convert
from flash_reformer.cli.evaluate import evaluate
from flash_reformer.cli.generate import generate
from flash_reformer.cli.tokenizer import tokenizer
from flash_reformer.cli.train import app as train

app = typer.Typer(
    name="flash-reformer",
    help="Train and use Reformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(train, name="train")
app.command()(generate)
app.command()(evaluate)
app.command()(tokenizer)
app.command()(convert)


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
