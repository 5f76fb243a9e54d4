"""The run: stages one after the other within the time, results written after each, a watchdog behind all."""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.facts import facts
from benchmarks.gpu import layers, models, parity, stages
from benchmarks.gpu.budget import Budget
from benchmarks.gpu.device import Gpu, StandIn
from benchmarks.gpu.lanes import Row, failure, faults
from benchmarks.gpu.plan import FULL, REHEARSAL, SHARES, Plan
from benchmarks.gpu.requirements import REHEARSED, describe, requirements

#: Stages in the order of ``SHARES``.
STAGES: dict[str, Callable[[stages.Context], Row]] = {
    "parity": parity.suite,
    "copy": stages.copy,
    "attention": stages.attention,
    "models": models.models,
    "layers": layers.layers,
    "parts": stages.parts,
    "variants": stages.variants,
    "decode": models.decode,
    "flex": layers.flex,
    "sorting": stages.sorting,
    "longest": models.longest,
}
#: Without these nothing else means anything.
ALWAYS = ("parity", "copy")
#: Seconds after the deadline at which a run that hangs is cut off.
GRACE = 35.0


#: What a rehearsal does not report.
TIMES = ("median_s", "min_s", "first_s", "step_s", "prefill_s", "tokens_per_s", "bytes_per_s", "floor_s", "over_floor")


class Report:
    """The result, written to its file whenever something is added."""

    def __init__(self, path: Path, plan: Plan, head: Row) -> None:
        self._path, self._plan, self._lock = path, plan, threading.Lock()
        self.data: Row = {"plan": plan.name, **head, "stages": {}, "results": {}, "requirements": [], "ok": False}

    def add(self, stage: str, status: Row, result: Row) -> None:
        """Add a stage's result and write."""
        self.data["stages"][stage] = status
        self.data["results"][stage] = result
        try:
            self.data["requirements"] = requirements(self.data["results"], self._plan)
        except Exception as error:  # what is measured matters more than its table
            status["table"] = failure(error)
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        with self._lock:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial = self._path.with_suffix(".partial")
            hidden = () if self._plan.measures else TIMES
            partial.write_text(json.dumps(_plain(self.data, hidden), indent=1) + "\n", encoding="utf-8")
            partial.replace(self._path)

    def finish(self, ok: bool) -> None:
        """Write for the last time; print the table and the last line."""
        self.data["ok"] = ok
        self.write()
        print()
        for line in describe(self.data["requirements"]):
            print(line)
        told = {key: value for key, value in self.data.items() if key != "results"}
        print(json.dumps(_plain(told)), flush=True)


def _plain(x: Any, hidden: tuple[str, ...] = ()) -> Any:
    """Return what JSON can hold, without infinities; what is hidden says that it is no measurement."""
    if isinstance(x, dict):
        return {str(key): REHEARSED if key in hidden else _plain(value, hidden) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(each, hidden) for each in x]
    if isinstance(x, float):
        return float(f"{x:.6g}") if x - x == 0 else str(x)
    return x if isinstance(x, (str, int, bool, type(None))) else str(x)


def _watch(budget: Budget, report: Report, grace: float) -> threading.Event:
    """Cut the run off if it hangs: write what there is and leave."""
    done = threading.Event()

    def watch() -> None:
        if not done.wait(budget.left() + grace):
            report.data["cut_off"] = f"after {budget.passed():.0f} s"
            try:
                report.finish(ok=False)
            finally:
                sys.stdout.flush()
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    return done


def run_stage(name: str, context: stages.Context, report: Report, passed: Callable[[], float]) -> bool:
    """Run one stage, record it, and return whether it went well."""
    begin = passed()
    print(f"== {name} ({context.share.left():.0f} s)", flush=True)
    result: Row = {"rows": context.rows}
    report.data["results"][name] = result
    status: Row = {"status": "ok"}
    try:
        result = STAGES[name](context)
        if bad := faults(result["rows"]):
            status = {"status": "failed", "errors": bad}
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        status = {"status": "failed", "errors": [failure(error)]}
        error.__traceback__ = None
    try:
        context.device.sync()
        context.device.free()
    except Exception as error:
        status = {"status": "failed", "errors": [*status.get("errors", []), f"the device: {failure(error)}"]}
        status["device_lost"] = True
    if name == "parity" and result.get("red"):
        status = {"status": "red", "errors": result["red"]}
    status["seconds"] = passed() - begin
    if skipped := sum("not_run" in row for row in result["rows"]):
        status["not_run"] = skipped
    report.add(name, status, result)
    for error in status.get("errors", []):
        print(f"{name} {status['status']}: {error}", flush=True)
    return status["status"] == "ok"


def run(*, rehearse: bool, backend: str, seconds: float, path: Path, only: list[str] | None = None) -> int:
    """Run all stages and return the exit code."""
    plan, device = (REHEARSAL, StandIn()) if rehearse else (FULL, Gpu())
    unknown = set(only or ()) - set(STAGES)
    if unknown:
        print(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}", file=sys.stderr)
        return 2
    names = [name for name in STAGES if only is None or name in only or name in ALWAYS]
    budget = Budget(seconds, {name: SHARES[name] for name in names})
    head = {"rehearsal": rehearse, "backend": backend, **facts(), **device.facts(), "replaced": device.replaced}
    report = Report(path, plan, head)
    done = _watch(budget, report, GRACE)
    ok, speed = True, None
    for name in names:
        context = stages.Context(device, plan, backend, budget.share(name), lambda line: print(line, flush=True), speed)
        ok = run_stage(name, context, report, budget.passed) and ok
        speed = context.speed
        status = report.data["stages"][name]
        if (name == "parity" and not ok) or status.get("device_lost"):
            print(
                "parity is red; nothing is measured" if name == "parity" else "the device no longer answers", flush=True
            )
            break
    for name in names:
        report.data["stages"].setdefault(name, {"status": "not run"})
    report.data["seconds"] = budget.passed()
    done.set()
    report.finish(ok)
    return 0 if ok else 1
