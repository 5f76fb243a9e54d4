"""The command ``flash-reformer``: one file per verb."""

import sys
import time

import typer

from flash_reformer.cli.convert import convert
from flash_reformer.cli.errors import GRACE
from flash_reformer.cli.evaluate import evaluate
from flash_reformer.cli.generate import generate
from flash_reformer.cli.tokenizer import tokenizer
from flash_reformer.cli.train import app as train
from flash_reformer.training import ranks

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
    """Run the command line; on several ranks, rank 0 alone says what is wrong with it."""
    if ranks.is_main():
        app()
    else:
        _follow()


def _follow() -> None:
    try:
        code = app(standalone_mode=False)
    except Exception as error:  # of the flags: whatever happens in a command has been said there
        time.sleep(GRACE)
        code = getattr(error, "exit_code", 1)
    sys.exit(code or 0)


__all__ = ["app", "main"]
