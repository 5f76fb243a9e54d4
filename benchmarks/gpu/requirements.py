"""The table of requirements: each next to what was measured, with met or missed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.lanes import OUT_OF_MEMORY, Row
from benchmarks.gpu.plan import Plan
from benchmarks.table import ALWAYS, NEVER, crossover

MET, MISSED, UNKNOWN, REHEARSED = "met", "missed", "not measured", "rehearsal, no measurement"
Results = dict[str, Row]


@dataclass(frozen=True)
class Requirement:
    """One number. ``sense`` is 1 where more is better, -1 where less is; ``measured`` has a value per setting.

    ``any_of`` says that one setting that reaches the bound is enough. An infinite value failed or was never reached.
    """

    what: str
    sense: int
    required: float
    measured: dict[str, float | None]
    unit: str = "x"
    aim: float | None = None
    any_of: bool = False

    def reaches(self, bound: float) -> bool | None:
        """Whether what was measured reaches a bound; None where that cannot be said."""
        each = [None if v is None else self.sense * v >= self.sense * bound for v in self.measured.values()]
        decisive = self.any_of
        if decisive in each:
            return decisive
        return None if None in each or not each else not decisive

    def row(self, measures: bool) -> Row:
        """Return the line for the report."""
        verdicts = {True: MET, False: MISSED, None: UNKNOWN}
        verdict = verdicts[self.reaches(self.required)] if measures else REHEARSED
        line: Row = {
            "what": self.what,
            "required": self._bound(self.required),
            "measured": {name: self._say(value) if measures else "-" for name, value in self.measured.items()},
            "verdict": verdict,
        }
        if self.aim is not None:
            line["aim"] = self._bound(self.aim)
            line["aim_verdict"] = verdicts[self.reaches(self.aim)] if measures else REHEARSED
        return line

    def _bound(self, bound: float) -> str:
        return ("<= " if self.sense < 0 else ">= ") + self._say(bound)

    def _say(self, value: float | None) -> str:
        if value is None:
            return UNKNOWN
        if value == NEVER:
            return "not reached" if self.unit == "tokens" else "fails"
        if self.unit == "tokens":
            return "ahead at every length" if value == ALWAYS else f"{value:,.0f} tokens"
        return f"{value:.3g}{self.unit if self.unit == 'x' else ' ' + self.unit}"


def pick(rows: list[Row], **wanted: Any) -> Row | None:
    """Return the first measured row with these fields."""
    for row in rows:
        if "median_s" in row and all(row.get(name) == value for name, value in wanted.items()):
            return row
    return None


def _seconds(rows: list[Row], **wanted: Any) -> float | None:
    row = pick(rows, **wanted)
    return None if row is None else row["median_s"]


def exact_s(rows: list[Row], who: tuple[str, ...], **at: Any) -> float | None:
    """Return the time of the fastest of these peers, None where none ran."""
    times = [s for name in who if (s := _seconds(rows, who=name, **at)) is not None]
    return min(times) if times else None


def speedup(other: float | None, ours: float | None) -> float | None:
    """Return how many times as long the other takes; None where one was not measured."""
    return None if other is None or ours is None else other / ours


def _rows(results: Results, stage: str) -> list[Row]:
    return results.get(stage, {}).get("rows", [])


def _attention(results: Results, plan: Plan) -> Iterator[Requirement]:
    rows, head_size = _rows(results, "attention"), plan.head_sizes[0]
    at = {"head_size": head_size, "passes": "training"}

    def gain(length: int, rounds: int, who: tuple[str, ...]) -> float | None:
        mine = _seconds(rows, who="ours", kind="lsh", length=length, rounds=rounds, **at)
        return speedup(exact_s(rows, who, length=length, **at), mine)

    for rounds, required, aim in ((plan.many, 8, 12), (plan.few, 25, None)):
        what = f"LSH, {plan.long:,} tokens, {_counted(rounds)}, forward and backward, against exact attention"
        yield Requirement(f"{what} (FlashAttention)", 1, required, {"": gain(plan.long, rounds, ("flash",))}, aim=aim)
        both = {"": gain(plan.long, rounds, ("flash", "cudnn"))}
        yield Requirement(f"{what} (faster of flash, cuDNN)", 1, required, both, aim=aim)
    for name, who in (("FlashAttention", ("flash",)), ("faster of flash, cuDNN", ("flash", "cudnn"))):
        points = [(length, g) for length in plan.lengths if (g := gain(length, plan.many, who)) is not None]
        what = f"LSH, {_counted(plan.many)}, forward and backward, overtakes exact attention ({name})"
        yield Requirement(what, -1, 8192, {"": crossover(points)}, "tokens")
    for passes, bound in (("forward", 2.5), ("backward", 3.0)):
        over = {}
        for length in dict.fromkeys((plan.long, plan.far)):
            for rounds in (plan.few, plan.many):
                wanted = {"who": "ours", "kind": "lsh", "head_size": head_size, "passes": passes}
                row = pick(rows, length=length, rounds=rounds, **wanted)
                over[f"{length:,}, {_counted(rounds)}"] = None if row is None else row.get("over_floor")
        yield Requirement(f"LSH, {passes}, over the floor of bytes", -1, bound, over)


def _layers(results: Results, plan: Plan) -> Iterator[Requirement]:
    rows = _rows(results, "layers")
    for dtype, name in (("bfloat16", "ours in bf16, theirs in fp32"), ("float32", "both in fp32")):
        gains = {}
        for rounds in (plan.many, plan.few):
            at = {"kind": "lsh", "length": plan.layer_lengths[0], "rounds": rounds, "passes": "training"}
            mine = _seconds(rows, who="ours", dtype=dtype, **at)
            gains[_counted(rounds)] = speedup(_seconds(rows, who="transformers", **at), mine)
        what = f"LSH layer, {plan.layer_lengths[0]:,} tokens, against transformers' Reformer ({name})"
        yield Requirement(what, 1, 20, gains)


def _unless_failed(row: Row, field: str) -> float | None:
    return NEVER if "error" in row else row.get(field)


def _models(results: Results, plan: Plan) -> Iterator[Requirement]:
    rows = _rows(results, "models")

    def step(name: str, cap: float) -> Row | None:
        return next(
            (row for row in rows if row.get("model") == name and row.get("cap_gb") == cap and "not_run" not in row),
            None,
        )

    novel = step("novel", plan.novel_gb)
    if novel is not None and novel.get("error") == OUT_OF_MEMORY:
        uncapped = next((row for row in rows if row.get("model") == "novel" and row.get("cap_gb") is None), {})
        seconds, memory = _unless_failed(uncapped, "step_s"), uncapped.get("allocated_gb") or NEVER
    else:
        seconds = None if novel is None else _unless_failed(novel, "step_s")
        memory = None if novel is None else _unless_failed(novel, "allocated_gb")
    what = f"novel model, training step of {plan.novel_length:,} tokens"
    yield Requirement(what, -1, 1.0, {"": seconds}, "s")
    yield Requirement(f"{what}, peak memory (run within {plan.novel_gb:g} GB)", -1, plan.novel_gb, {"": memory}, "GB")
    fits: dict[str, float | None] = {}
    for name in ("novel, a million positions", "novel, a million positions, feed-forward in chunks"):
        row = step(name, plan.million_gb)
        label = "feed-forward in chunks" if name.endswith("chunks") else "as it is"
        fits[label] = None if row is None else NEVER if "error" in row else row.get("reserved_gb")
    what = f"novel model, training step of {plan.million[0] * plan.million[1]:,} tokens, memory reserved"
    yield Requirement(what, -1, plan.million_gb, fits, "GB", any_of=True)


def _counted(rounds: int) -> str:
    return f"{rounds} round{'s' * (rounds != 1)}"


def requirements(results: Results, plan: Plan) -> list[Row]:
    """Return the table."""
    lines = [*_attention(results, plan), *_layers(results, plan), *_models(results, plan)]
    return [line.row(plan.measures) for line in lines]


def describe(table: list[Row]) -> Iterator[str]:
    """Yield the table's lines for people."""
    yield f"{'required':>24}  {'verdict':<12}  what: measured"
    for row in table:
        says = "; ".join(f"{name}: {value}" if name else value for name, value in row["measured"].items())
        aim = f" (aim {row['aim']}: {row['aim_verdict']})" if "aim" in row else ""
        yield f"{row['required']:>24}  {row['verdict']:<12}  {row['what']}: {says}{aim}"
