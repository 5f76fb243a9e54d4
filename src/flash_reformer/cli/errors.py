"""How a command ends when something is wrong: one readable line, or the traceback on request."""

import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer
from rich.console import Console

from flash_reformer.training import ranks

INTERRUPTED = 130  # what shells report for a process that Ctrl-C ended
TERMINATED = 143  # and for one that SIGTERM ended, so that schedulers do not take it for finished

# Seconds that other ranks wait before they say what is wrong: where rank 0 has said the same by then, the launcher has
# ended them.
GRACE = 10.0


@contextmanager
def readable_errors(
    debug: bool, *, on_interrupt: str = "interrupted", left: Mapping[type[Exception], int] | None = None
) -> Iterator[None]:
    """Turn whatever is raised inside into one line on stderr and a non-zero exit code.

    Args:
        debug: let exceptions through with their traceback.
        on_interrupt: what to say after Ctrl-C.
        left: exit codes for exceptions that are no mistake of anybody.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        if ranks.is_main():
            _complain(on_interrupt)
        raise typer.Exit(INTERRUPTED) from None
    except ranks.ElsewhereError:
        time.sleep(GRACE)
        raise typer.Exit(1) from None
    except BrokenPipeError:
        # Whoever read the output has enough. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(1) from None
    except Exception as error:
        if left and type(error) in left:
            _complain(str(error))
            raise typer.Exit(left[type(error)]) from None
        if debug:
            raise
        line = " ".join(str(error).split()) or "no message"
        mistakes = (ValueError, TypeError, OSError, ImportError)
        kind = "" if isinstance(error, mistakes) else f"{type(error).__name__}: "
        if not ranks.is_main():
            time.sleep(GRACE)
        where = f"rank {ranks.rank()}: " if ranks.world_size() > 1 else ""
        _complain(f"{where}error: {kind}{line} (--debug shows where)")
        raise typer.Exit(1) from None


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    # What one rank is warned of, all are.
    if ranks.is_main():
        _complain(f"warning: {message}")


def _complain(line: str) -> None:
    # No markup: a path with brackets in it is no style. No wrapping: one line is one line.
    Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
