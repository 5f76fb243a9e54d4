"""How fast and how lean is it on a CPU, against transformers, reformer-pytorch and exact attention?

Run ``python -m benchmarks.speed`` (about 25 minutes on 2 cores) or with ``--quick`` (about 10). Each workload is raced
in a fresh process (``race.py``) that first checks parity; if it is red, this ends without a report. Each peak of memory
is that of a fresh process, too, and so is each profile (``stages.py``). Prints the table of requirements and one JSON
line last, and draws plots: into ``docs/plots/``, or in other modes than the full one into ``runs/bench/``.

A contestant that is not installed, fails or is left out by the mode stays in the report, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import plots, stages, table
from benchmarks.contestants import Entry
from benchmarks.facts import cpu_model
from benchmarks.race import RED, THREADS
from benchmarks.workloads import MODES, Mode, counted, memory_entries, profiled_entries, workloads

ROOT = Path(__file__).parent.parent
#: How the C library gives memory back: as it comes (what a user's process holds), or every freed tensor at once, so
#: that the peak is what tensors take.
ALLOCATORS = {"default": {}, "hand back at once": {"MALLOC_MMAP_THRESHOLD_": "262144"}}

Row = dict[str, Any]


def _environment(threads: int) -> dict[str, str]:
    """Return what the processes of this benchmark run with: the threads, and waiting ones that soon give way."""
    return {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}


def in_fresh_process(module: str, *arguments: str, threads: int, more: dict[str, str] | None = None) -> Row:
    """Run a module of this folder and return the JSON of its last line, or ``{"error": ...}``; the rest is printed.

    Raises:
        SystemExit: its parity gate was red.
    """
    command = [sys.executable, "-m", f"benchmarks.{module}", "--threads", str(threads), *arguments]
    environment = {**os.environ, **_environment(threads), **(more or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode == RED:
        raise SystemExit(done.stderr.strip())
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        complaint = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"error": f"exit code {done.returncode}: {complaint}"}
    for line in lines[:-1]:
        print(line, flush=True)
    return json.loads(lines[-1])


def races(mode: Mode, threads: int) -> list[Row]:
    """Run all workloads. One whose process died keeps its entries, each with the reason."""
    found = []
    for name, workload in workloads(mode).items():
        print(f"-- {name}", flush=True)
        race = in_fresh_process("race", name, "--mode", mode.name, threads=threads)
        if "error" in race:
            print(race["error"], flush=True)
            race = {"workload": name, **race, "rows": [{**asdict(e), **race} for e in workload.entries]}
        found.append(race)
    return found


def _peak(entry: Entry, mode: Mode, allocator: str, threads: int) -> Row:
    arguments = ("--memory", json.dumps(asdict(entry)), "--steps", str(mode.memory_steps))
    found = in_fresh_process("race", *arguments, threads=threads, more=ALLOCATORS[allocator])
    row = {**asdict(entry), **found, "allocator": allocator}
    what = f"{entry.who:<13} {entry.kind:<6} {entry.length:>6} {counted(entry.rounds)}, dropout {entry.dropout:<8}"
    says = f"{row['peak_mb']:>8.0f} MB above {row['baseline_mb']:.0f}" if "peak_mb" in row else row["error"]
    print(f"{what} {says}, allocator: {allocator}", flush=True)
    return row


def peaks(mode: Mode, threads: int) -> list[Row]:
    """Measure the memory of models and layers; in the full mode models without dropout also by tensors alone."""
    print("-- peak memory", flush=True)
    found = [_peak(entry, mode, "default", threads) for entry in memory_entries(mode)]
    if mode.name == "full":
        bare = [entry for entry in memory_entries(mode) if entry.kind == "model" and entry.dropout == "none"]
        found += [_peak(entry, mode, "hand back at once", threads) for entry in bare]
    return found


def profiles(mode: Mode, threads: int) -> list[Row]:
    """Take our layer and our model apart by stage."""
    print(f"-- stages ({stages.REST}: residual sums, the walk back, what has no label)", flush=True)
    entries = profiled_entries(mode)
    found = [in_fresh_process("stages", json.dumps(asdict(entry)), threads=threads) for entry in entries]
    return [{**asdict(entry), **row} for entry, row in zip(entries, found, strict=True)]


def measure(mode: Mode, threads: int, folder: Path) -> Row:
    """Run everything and return the result."""
    start = time.perf_counter()
    raced = races(mode, threads)
    rows = [row for race in raced if race["workload"] != "tokens" for row in race["rows"]]
    (tokens,) = (race["rows"] for race in raced if race["workload"] == "tokens")
    result: Row = {
        "benchmark": "speed",
        "mode": mode.name,
        "threads": threads,
        "environment": _environment(threads),
        "ends": list(mode.ends),
        "races": raced,
        "memory": peaks(mode, threads),
        "stages": profiles(mode, threads),
        "crossovers": table.crossovers(rows, mode),
        "tokens": table.growth(tokens, mode),
    }
    parts = (result["tokens"], result["memory"], result["crossovers"])
    result["table"] = table.requirements(rows, *parts, mode)
    result["plots"] = plots.draw(result, folder, cpu_model())
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def report(result: Row) -> None:
    """Print what the times come to."""
    print("-- where the LSH layer overtakes exact attention, in tokens")
    for row in result["crossovers"]:
        print(f"{row['against']:<11} {counted(row['rounds']):<8} {row['passes']:<9} {row['says']}")
    print("-- microseconds per token of the LSH layer, 1 round, training")
    costs = result["tokens"]["us_per_token"]
    print(", ".join(f"{T}: {'not measured' if cost is None else f'{cost:.2f}'}" for T, cost in costs.items()))
    every = [row for race in result["races"] for row in race["rows"]] + result["memory"] + result["stages"]
    for reason, count in _count(row.get("error") or row.get("skipped") for row in every).items():
        print(f"without a number: {count} entries, {reason}")
    print("-- the table; a star marks a required number that was missed")
    for line in table.describe(result["table"]):
        print(line)


def _count(reasons: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=MODES, default="full", help="tiny only shows that the machinery runs")
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick", help="the same as --mode quick")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--plots", type=Path, help="where the plots go")
    arguments = parser.parse_args()
    mode = MODES[arguments.mode]
    folder = arguments.plots or ROOT / ("docs/plots" if mode.name == "full" else "runs/bench")
    result = measure(mode, arguments.threads, folder)
    report(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
