"""The timer of the speed benchmark: one workload, its contestants in turn, after its parity gate; or one peak memory.

    python -m benchmarks.race attention-4096 --mode quick
    python -m benchmarks.race --memory '{"who": "ours", "kind": "lsh", "length": 512, "rounds": 1, "passes": "forward"}'

Each contestant has a process of its own, so that nobody's heap is another's, and only one of them runs at a time.
Every entry runs once. That first run is a warm-up, unless it takes over ``LONG`` seconds: then it counts. After that
they take turns, in another order each time, until the workload's time is spent; in a turn a quick one runs several
times. So whatever disturbs the machine disturbs all. Prints a table and one JSON line last; exits with ``RED`` and
no report if the parity gate is red.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import statistics
import sys
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import torch
import transformers

from benchmarks import gate
from benchmarks.contestants import Entry, Runner, build
from benchmarks.depth_memory import peak_rss
from benchmarks.workloads import MODES, Mode, Workload, counted, workloads

THREADS = 2
#: The exit code of a red parity gate.
RED = 3
#: Seconds. A run longer than LONG needs no warm-up; one longer than VERY_LONG happens once.
LONG, VERY_LONG = 5.0, 20.0
#: In a turn, what is quick runs again until so many seconds are over, but not more often than MOST times.
TURN, MOST = 0.2, 10
MOST_TURNS = 40


def _timed(runner: Runner) -> float:
    start = time.perf_counter()
    runner.run()
    seconds = time.perf_counter() - start
    runner.tidy()
    return seconds


def _failure(error: BaseException) -> str:
    text = str(error).strip()
    return text if isinstance(error, ModuleNotFoundError) and text else f"{type(error).__name__}: {text}"


class Racer:
    """One entry in its contestant's process: its times, or why there are none."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.first = 0.0
        self.times: list[float] = []
        self.error: str | None = None
        self._runner: Runner | None = None
        self._try(self._build)

    def _build(self) -> None:
        self._runner = build(self.entry)

    def _try(self, act: Any) -> None:
        try:
            act()
        except Exception as error:  # whatever it is, it goes into the report
            self.error, self._runner, self.times = _failure(error), None, []

    def begin(self) -> float | None:
        """Run for the first time and return the seconds, or None if that failed."""

        def act() -> None:
            assert self._runner is not None
            self.first = _timed(self._runner)
            self.times = [self.first] if self.first > LONG else []

        if self._runner is not None:
            self._try(act)
        return self.first if self._runner is not None else None

    def turn(self) -> None:
        """Run once, or several times if that is quick."""

        def act() -> None:
            assert self._runner is not None
            for _ in range(max(1, min(MOST, int(TURN / max(self.first, 1e-9))))):
                self.times.append(_timed(self._runner))

        if self._runner is not None:
            self._try(act)
            gc.collect()

    def row(self) -> dict[str, Any]:
        """Return what to report."""
        if self.error is not None:
            return {**asdict(self.entry), "error": self.error}
        facts = {"median_s": statistics.median(self.times), "min_s": min(self.times), "runs": len(self.times)}
        return {**asdict(self.entry), **facts}


def _serve(entries: list[Entry], threads: int, pipe: Connection) -> None:
    """Be a contestant's process: do as the pipe says until it closes."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    racers = [Racer(entry) for entry in entries]
    gc.collect()
    gc.freeze()
    pipe.send(len(racers))
    while True:
        try:
            index, action = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(racers[index], action)())


class Contestant:
    """A contestant's process, seen from the race."""

    def __init__(self, entries: list[Entry], threads: int) -> None:
        # Forked from a process that has only imported things, so that each need not do that again.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.workloads"])
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(entries, threads, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self.error: str | None = None
        self._hear()  # once all is built, so that no building disturbs a race

    def _hear(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            self.error = f"its process ended with exit code {self._process.exitcode}"
            return None

    def ask(self, index: int, action: str) -> Any:
        """Let it do something with one of its entries; None once it has died."""
        if self.error is not None:
            return None
        with contextlib.suppress(OSError):  # a dead one is heard of below
            self._pipe.send((index, action))
        return self._hear()

    def stop(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join()


class Lane:
    """One entry, seen from the race."""

    def __init__(self, entry: Entry, contestant: Contestant, index: int) -> None:
        self._entry, self._contestant, self._index = entry, contestant, index
        self._first: float | None = None

    def begin(self) -> None:
        """Let it run for the first time."""
        self._first = self._contestant.ask(self._index, "begin")

    def turn(self, number: int, least: int) -> None:
        """Let it take its turn; of those that all take, one whose first run counts sits out the last."""
        counted = self._first is not None and self._first > LONG
        if self._first is None or self._first > VERY_LONG or (number == least - 1 and counted):
            return
        self._contestant.ask(self._index, "turn")

    def row(self) -> dict[str, Any]:
        """Return what to report."""
        row = self._contestant.ask(self._index, "row")
        return row or {**asdict(self._entry), "error": self._contestant.error}


def race(workload: Workload, mode: Mode, threads: int) -> list[dict[str, Any]]:
    """Time a workload's entries in turn and return a row for each."""
    contestants: dict[str, Contestant] = {}
    lanes = []
    for who in dict.fromkeys(entry.who for entry in workload.entries):
        entries = [entry for entry in workload.entries if entry.who == who]
        contestants[who] = Contestant(entries, threads)
        lanes += [Lane(entry, contestants[who], index) for index, entry in enumerate(entries)]
    start, longest = time.perf_counter(), 0.0
    for lane in lanes:
        lane.begin()
    for number in range(MOST_TURNS):
        begin = time.perf_counter()
        if number >= mode.turns and begin - start + longest > workload.seconds:
            break
        for i in range(len(lanes)):
            lanes[(i + number) % len(lanes)].turn(number, mode.turns)
        longest = max(longest, time.perf_counter() - begin)
    rows = [lane.row() for lane in lanes]
    for contestant in contestants.values():
        contestant.stop()
    return rows + [{**asdict(entry), "skipped": reason} for entry, reason in workload.skipped]


def memory(entry: Entry, steps: int) -> dict[str, Any]:
    """Run an entry in this process and return the peak of resident memory above that of the imports alone."""
    baseline = peak_rss()
    runner = build(entry)
    for _ in range(steps):
        runner.run()
        runner.tidy()
    peak = peak_rss()
    return {**asdict(entry), "peak_mb": (peak - baseline) / 1e6, "baseline_mb": baseline / 1e6, "steps": steps}


def _describe(row: dict[str, Any]) -> str:
    what = f"{row['who']:<17} {row['kind']:<6} {row['length']:>7} {counted(row['rounds']):<9} {row['passes']:<9}"
    what += f"dropout {row['dropout']:<8}"
    if "median_s" in row:
        return f"{what} {1e3 * row['median_s']:>10.2f} ms (min {1e3 * row['min_s']:.2f}, {row['runs']} runs)"
    return f"{what} {row.get('error') or 'not run: ' + row['skipped']}"


def main() -> None:
    """Run what the command line names, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload", nargs="?", help="of those that the mode has")
    parser.add_argument("--mode", choices=MODES, default="full")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--memory", type=json.loads, metavar="ENTRY", help="measure the memory of this entry instead")
    parser.add_argument("--steps", type=int, default=1, help="with --memory: how often the entry runs")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print(json.dumps(memory(Entry(**arguments.memory), arguments.steps)))
        return
    mode = MODES[arguments.mode]
    registry = workloads(mode)
    if arguments.workload not in registry:
        parser.error(f"no workload {arguments.workload!r} in mode {mode.name}; there are {', '.join(registry)}")
    workload = registry[arguments.workload]
    try:
        errors = gate.check(workload)
    except gate.ParityError as error:
        print(f"parity is red: {error}; nothing is measured", file=sys.stderr)
        raise SystemExit(RED) from None
    rows = race(workload, mode, arguments.threads)
    for row in rows:
        print(_describe(row))
    print(json.dumps({"workload": workload.name, "threads": arguments.threads, "parity": errors, "rows": rows}))


if __name__ == "__main__":
    main()
