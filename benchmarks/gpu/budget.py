"""Time: a deadline for all, and a share of it for every stage."""

from __future__ import annotations

import time
from collections.abc import Callable


class Share:
    """A stage's time."""

    def __init__(self, end: float, clock: Callable[[], float]) -> None:
        self._end, self._clock = end, clock

    def left(self) -> float:
        """Return the seconds left; negative once they are over."""
        return self._end - self._clock()

    def out(self, needed: float = 0.0) -> bool:
        """Return whether fewer than ``needed`` seconds are left."""
        return self.left() <= needed


class Budget:
    """The run's time. A stage may use its share and whatever the stages before it left.

    A stage that begins late, because one before it took longer, still gets ``LEAST`` of its share, within the deadline.
    Shares are relative numbers.
    """

    LEAST = 0.5

    def __init__(self, seconds: float, shares: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start, self.seconds = clock, clock(), seconds
        total = sum(shares.values())
        self._shares = {name: seconds * share / total for name, share in shares.items()}
        self._upto, reached = {}, 0.0
        for name, share in self._shares.items():
            reached += share
            self._upto[name] = reached

    def share(self, stage: str) -> Share:
        """Return the time of a stage that begins now."""
        least = self.passed() + self.LEAST * self._shares[stage]
        return Share(self._start + min(self.seconds, max(self._upto[stage], least)), self._clock)

    def passed(self) -> float:
        """Return the seconds since the start."""
        return self._clock() - self._start

    def left(self) -> float:
        """Return the seconds to the deadline."""
        return self.seconds - self.passed()
