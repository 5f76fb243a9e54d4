"""What is timed in turns: lanes, each with a row for the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu.budget import Share
from benchmarks.gpu.device import Device, Run
from benchmarks.gpu.plan import Plan

Row = dict[str, Any]
#: What rows say that are not run.
OVER = "the stage's time is spent"
OUT_OF_MEMORY = "out of memory"


def failure(error: BaseException) -> str:
    """Return what went wrong in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


@dataclass
class Lane:
    """One thing to time. ``build`` prepares it and returns the call; ``who`` identifies it in its row."""

    who: Row
    build: Callable[[], Run]
    row: Row = field(default_factory=dict)
    _run: Any = None
    _times: list[float] = field(default_factory=list)
    _calls: int = 1

    @property
    def ours(self) -> bool:
        """Whether its failure is a failure of the run."""
        return self.who["who"] == "ours"

    def begin(self, device: Device, plan: Plan, share: Share) -> None:
        """Build it and call it twice: to warm up, with whatever is compiled, and to see how long it takes."""
        self.row = dict(self.who)
        if share.out():
            self.row["not_run"] = OVER
            return
        try:
            start = time.perf_counter()
            self._run = self.build()
            self._run()
            device.sync()
            self.row["first_s"] = time.perf_counter() - start
            estimate = device.times(self._run, 1)[0] if plan.measures else 1.0
        except Exception as error:  # whatever it is, it goes into the report
            self._drop(device, error)
            return
        self._calls = max(1, min(plan.most, int(plan.lane_s / plan.turns / max(estimate, 1e-9))))

    def turn(self, device: Device) -> None:
        """Call it a few times."""
        if self._run is None:
            return
        try:
            self._times += device.times(self._run, self._calls)
        except Exception as error:
            self._drop(device, error)

    def end(self) -> Row:
        """Return its row and forget the call with all that it holds."""
        if self._times:
            times = self._times
            self.row |= {"median_s": statistics.median(times), "min_s": min(times), "runs": len(times)}
        self._run = None
        return self.row

    def _drop(self, device: Device, error: BaseException) -> None:
        self.row["error"] = failure(error)
        error.__traceback__ = None  # its frames hold tensors
        self._run, self._times = None, []
        device.free()


def race(device: Device, plan: Plan, share: Share, lanes: list[Lane]) -> list[Row]:
    """Time lanes in turns, in another order each time, and return their rows."""
    for lane in lanes:
        lane.begin(device, plan, share)
    for number in range(plan.turns):
        for i in range(len(lanes)):
            lanes[(i + number) % len(lanes)].turn(device)
    rows = [lane.end() for lane in lanes]
    device.free()
    return rows


def faults(rows: list[Row]) -> list[str]:
    """Return what went wrong among our own rows; out of memory is a result."""
    bad = [
        row
        for row in rows
        if str(row.get("who")).startswith("ours") and row.get("error", OUT_OF_MEMORY) != OUT_OF_MEMORY
    ]
    return [f"{ {k: v for k, v in row.items() if k not in ('error', 'first_s')} }: {row['error']}" for row in bad]


class Prediction:
    """What a peer would take at another length, from the nearest length at which it ran."""

    def __init__(self, power: int) -> None:
        self._power = power
        self._seen: dict[tuple[Any, ...], dict[int, float]] = {}

    def learn(self, key: tuple[Any, ...], length: int, seconds: float) -> None:
        """Remember a measured time."""
        self._seen.setdefault(key, {})[length] = seconds

    def seconds(self, key: tuple[Any, ...], length: int) -> float | None:
        """Return the predicted time, None before anything was measured."""
        seen = self._seen.get(key)
        if not seen:
            return None
        nearest = min(seen, key=lambda other: max(length / other, other / length))
        return seen[nearest] * (length / nearest) ** self._power


def spare(lanes: list[Lane], prediction: Prediction, slow: float, key: Callable[[Row], Any]) -> tuple[list[Lane], list]:
    """Return the lanes to run, and rows for the peers that would be too slow."""
    kept, rows = [], []
    for lane in lanes:
        seconds = None if lane.ours else prediction.seconds(key(lane.who), lane.who["length"])
        if seconds is None or seconds <= slow:
            kept.append(lane)
        else:
            told = {"not_run": f"predicted {seconds:.1f} s a call", "predicted_s": seconds}
            rows.append({**lane.who, **told})
    return kept, rows
