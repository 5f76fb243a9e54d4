"""Whole numbers that change as a run goes: rounds of hashing, lengths of sequences."""

import itertools
import re
from dataclasses import dataclass

_POINT = re.compile(r"\s*(\d+|\d*\.\d+)\s*:\s*(\d+)\s*")


@dataclass(frozen=True)
class Schedule:
    """A value from the start of a run, and others from later points on.

    Attributes:
        starts: where each value begins: steps, or fractions of the run below 1. The first is 0.
        values: as many whole numbers.
        by_fraction: whether the starts are fractions of the run.
    """

    starts: tuple[float, ...]
    values: tuple[int, ...]
    by_fraction: bool

    @classmethod
    def parse(cls, text: str, name: str, *, low: int) -> "Schedule":
        """Read ``START:VALUE,START:VALUE,...``; ``ValueError`` names the setting ``name``.

        Starts with a decimal point are fractions of the run, others are steps. The values are at least ``low``.

        >>> Schedule.parse("0:1,0.5:2", "num_hashes_schedule", low=1)
        Schedule(starts=(0.0, 0.5), values=(1, 2), by_fraction=True)
        """
        form = f"{name} must be START:VALUE pairs separated by commas, such as '0:1,0.5:2', got {text!r}"
        points = [_POINT.fullmatch(part) for part in text.split(",")]
        if not all(points):
            raise ValueError(form)
        starts = [point.group(1) for point in points if point]
        values = tuple(int(point.group(2)) for point in points if point)
        numbers = tuple(map(float, starts))
        by_fraction = any("." in start for start in starts)
        if numbers[0] != 0:
            raise ValueError(f"{name} must begin at 0, got {text!r}")
        if any(later <= earlier for earlier, later in itertools.pairwise(numbers)):
            raise ValueError(f"{name} must have rising starts, got {text!r}")
        if by_fraction and any("." not in start for start in starts[1:]):
            raise ValueError(f"{name} must have starts that are all steps or all fractions of the run, got {text!r}")
        if by_fraction and numbers[-1] >= 1:
            raise ValueError(f"{name} must have fractions of the run below 1, got {text!r}")
        if min(values) < low:
            raise ValueError(f"{name} must have values of at least {low}, got {text!r}")
        return cls(numbers, values, by_fraction)

    def at(self, step: int, fraction: float) -> int:
        """Return the value for the step after ``step`` steps, when ``fraction`` of the run is done."""
        done = fraction if self.by_fraction else step
        return [value for start, value in zip(self.starts, self.values, strict=True) if start <= done][-1]

    def shares(self, steps: int | None) -> list[float]:
        """Return the part of a run of ``steps`` steps that each value has; with their number unknown, the last has all.

        >>> Schedule.parse("0:1,30:2", "num_hashes_schedule", low=1).shares(40)
        [0.75, 0.25]
        """
        if not self.by_fraction and steps is None:
            return [0.0] * (len(self.values) - 1) + [1.0]
        starts = [min(1.0, start if self.by_fraction else start / (steps or 1)) for start in self.starts]
        return [later - earlier for earlier, later in itertools.pairwise([*starts, 1.0])]
