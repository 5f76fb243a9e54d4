"""How much of a run is done: the one quantity that the schedule, the evaluations and the progress bar follow."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Budget:
    """The end of a run, in steps, in minutes of training, or in whichever comes first.

    With steps alone everything that follows the budget is reproducible; with minutes it depends on the machine.

    Attributes:
        max_steps: optimizer steps, or None.
        max_minutes: minutes of training, evaluations included, or None.
        seconds_before: seconds already spent before this process resumed the run.
    """

    max_steps: int | None
    max_minutes: float | None
    seconds_before: float = 0.0
    _started: float | None = field(default=None, repr=False)
    _agreed: float | None = field(default=None, repr=False)

    def start(self) -> None:
        """Let the clock run from now."""
        self._started = time.monotonic()

    def agree(self, from_main: Callable[[float], float]) -> None:
        """Go by rank 0's clock until the next call, so that all ranks decide alike; a collective call if timed."""
        if self.max_minutes is not None:
            self._agreed = from_main(self.seconds)

    @property
    def seconds(self) -> float:
        """Seconds spent so far, over all processes that had a part in the run."""
        return self.seconds_before + (0.0 if self._started is None else time.monotonic() - self._started)

    def fraction(self, step: int) -> float:
        """Part of the run that is done after ``step`` steps, between 0 and 1."""
        by_steps = step / self.max_steps if self.max_steps is not None else 0.0
        seconds = self.seconds if self._agreed is None else self._agreed
        by_time = seconds / (60.0 * self.max_minutes) if self.max_minutes is not None else 0.0
        return min(1.0, max(by_steps, by_time))

    def learning_rate(self, step: int, *, warmup_steps: int, final: float) -> float:
        """Factor on the highest learning rate: a linear rise, then half a cosine down to ``final``."""
        rise = min(1.0, (step + 1) / (warmup_steps + 1))
        decay = final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * self.fraction(step)))
        return rise * decay
