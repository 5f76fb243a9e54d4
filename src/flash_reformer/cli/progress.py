"""A run as it looks on a terminal: one live line, and a line of its own for each evaluation."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

from flash_reformer.training.progress import Progress

# Where nobody watches a live line (a pipe, a log file), a plain one is written this often.
SECONDS_BETWEEN_PLAIN_LINES = 15.0


def _number(value: float | None, form: str = "{:.3f}") -> str:
    return "–" if value is None else form.format(value)


def clock(seconds: float | None) -> str:
    """Return a time as hours, minutes and seconds."""
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def describe(now: Progress) -> str:
    """Say in one line where a run stands."""
    peak = "–" if now.memory_bytes is None else f"{now.memory_bytes / 2**30:.2f} GiB"
    memory = peak if now.memory_now_bytes is None else f"{now.memory_now_bytes / 2**30:.2f} GiB, at most {peak}"
    quality = f"{now.training_measure} {_number(now.training)} · held-out {now.measure} {_number(now.held_out)} · "
    # What matters most comes first: a narrow terminal cuts the end off.
    return (
        f"{now.tokens_per_second:,.0f} tokens/s · {quality if now.measure else ''}{clock(now.seconds_left)} left · "
        f"step {now.step} · {memory}"
    )


class ProgressBar:
    """Shows the reports of a run; use it as a context manager and pass it as ``report``."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar = Bar(
            SpinnerColumn(),
            BarColumn(bar_width=10),
            TaskProgressColumn(),
            TextColumn("{task.description}", markup=False),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=1.0)
        self._last_line = time.monotonic()

    def __enter__(self) -> "ProgressBar":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._bar.stop()

    def __call__(self, now: Progress) -> None:
        """Show one report."""
        self._bar.update(self._task, completed=now.fraction, description=describe(now))
        waited = time.monotonic() - self._last_line
        if now.event == "evaluate":
            text = f"step {now.step}: held-out {now.measure} {_number(now.held_out)}"
        elif now.event == "step" and not self.console.is_terminal and waited > SECONDS_BETWEEN_PLAIN_LINES:
            text = describe(now)
        else:
            return
        self._last_line = time.monotonic()
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
