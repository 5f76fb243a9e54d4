"""The command ``flash-reformer``: one file per verb."""

import typer

from flash_reformer.cli.generate import generate
from flash_reformer.cli.train import train

app = typer.Typer(
    name="flash-reformer",
    help="Train and use Reformers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command()(generate)


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["app", "main"]
