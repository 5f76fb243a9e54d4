"""What the times and peaks of the speed benchmark come to: ratios, crossovers, growth, and the table of requirements.

Ratios are of medians in the same race. ``None`` is a ratio that lacks one of its two, and the rows say why.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.workloads import PASSES, SHORT, Mode, counted

Row = dict[str, Any]
DROPOUTS = ("none", "default")
#: What a crossover is where we are ahead at every measured length, and where we are behind at the longest.
ALWAYS, NEVER = 0.0, math.inf


def pick(rows: list[Row], **wanted: Any) -> list[Row]:
    """Return the rows with these fields."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _value(rows: list[Row], field: str, **wanted: Any) -> float | None:
    found = [row[field] for row in pick(rows, **wanted) if field in row]
    assert len(found) <= 1, f"{wanted} names {len(found)} rows"
    return found[0] if found else None


def ratio(rows: list[Row], field: str, over: dict[str, Any], under: dict[str, Any], **both: Any) -> float | None:
    """Return ``field`` of the row ``over`` divided by that of the row ``under``, which share the fields ``both``."""
    upper, lower = _value(rows, field, **both, **over), _value(rows, field, **both, **under)
    return None if upper is None or lower is None else upper / lower


def speedup(rows: list[Row], other: dict[str, Any], ours: dict[str, Any], **both: Any) -> float | None:
    """Return how many times as long ``other`` takes as ``ours``."""
    return ratio(rows, "median_s", other, {"who": "ours", **ours}, **both)


def crossover(points: list[tuple[int, float]]) -> float | None:
    """Return the length from which a speed-up, given at lengths, stays above 1: straight lines on log axes between."""
    if not points:
        return None
    points = sorted(points)
    behind = [i for i, (_, gain) in enumerate(points) if gain < 1]
    if not behind:
        return ALWAYS
    last = behind[-1]
    if last == len(points) - 1:
        return NEVER
    (left, low), (right, high) = points[last], points[last + 1]
    share = -math.log(low) / (math.log(high) - math.log(low))
    return left * (right / left) ** share


def crossovers(rows: list[Row], mode: Mode) -> list[Row]:
    """Return where our LSH layer overtakes exact attention, by rounds and passes, and the gains it is read from."""
    found = []
    for other in ("sdpa", "ours-exact"):
        for rounds in mode.rounds:
            for passes in PASSES:
                both = {"kind": "lsh", "passes": passes, "dropout": "none"}
                gains = [
                    (T, speedup(rows, {"who": other, "rounds": 0}, {"rounds": rounds}, length=T, **both))
                    for T in mode.lengths
                ]
                points = [(T, gain) for T, gain in gains if gain is not None]
                tokens = crossover(points)
                found.append(
                    {
                        "against": other,
                        "rounds": rounds,
                        "passes": passes,
                        "tokens": None if tokens == NEVER else tokens,
                        "says": say_crossover(tokens, mode),
                        "gains": points,
                    }
                )
    return found


def say_crossover(tokens: float | None, mode: Mode) -> str:
    """Return a crossover in words."""
    if tokens is None:
        return "not measured"
    if tokens == ALWAYS:
        return f"ahead from {mode.lengths[0]} on"
    return "not reached" if tokens == NEVER else f"{tokens:.0f}"


def growth(rows: list[Row], mode: Mode) -> Row:
    """Return the cost per token at each length, in microseconds, and the longest's over the shortest's."""
    costs = {}
    for T in mode.token_lengths:
        seconds = _value(rows, "median_s", who="ours", length=T)
        costs[T] = None if seconds is None else 1e6 * seconds / T
    first, last = costs[mode.token_lengths[0]], costs[mode.token_lengths[-1]]
    return {"us_per_token": costs, "growth": None if first is None or last is None else last / first}


@dataclass(frozen=True)
class Line:
    """A line of the table: what was measured, by setting, and the bounds that it is held to.

    ``sense`` is 1 where more is better, -1 where less is.
    """

    what: str
    sense: int
    required: float
    aim: float
    measured: dict[str, float | None]
    unit: str = "x"

    def reaches(self, bound: float) -> bool | None:
        """Whether every setting reaches a bound; None where one was not measured."""
        if any(value is None for value in self.measured.values()):
            return None
        return all(self.sense * value >= self.sense * bound for value in self.measured.values() if value is not None)

    def row(self, judged: bool) -> Row:
        """Return the line for the report. ``judged`` is whether these sizes are those that the bounds are meant for."""
        return {
            "what": self.what,
            "required": self._bound(self.required),
            "aim": self._bound(self.aim),
            "measured": {k: None if v in (None, NEVER) else round(v, 3) for k, v in self.measured.items()},
            "says": {k: self._say(v) for k, v in self.measured.items()},
            "met": self.reaches(self.required) if judged else None,
            "aim_met": self.reaches(self.aim) if judged else None,
        }

    def _bound(self, bound: float) -> str:
        if self.unit == "tokens" and bound == ALWAYS:
            return "always ahead"
        return ("<= " if self.sense < 0 else ">= ") + self._say(bound)

    def _say(self, value: float | None) -> str:
        if value is None:
            return "not measured"
        if self.unit == "tokens":
            return {ALWAYS: "always ahead", NEVER: "not reached"}.get(value, f"{value:.0f}")
        return f"{value:.3g}x" if value >= 1 else f"{value:.2f}x"


def _layer_lines(rows: list[Row], mode: Mode, crossed: list[Row]) -> Iterator[Line]:
    T, lsh = mode.long, {"kind": "lsh", "dropout": "none"}
    for rounds, required, aim in ((mode.ends[1], 4, 7), (mode.ends[0], 2.5, 4)):
        gains = {
            p: speedup(rows, {"who": "transformers"}, {}, length=T, rounds=rounds, passes=p, **lsh) for p in PASSES
        }
        yield Line(f"LSH layer, {T} tokens, {counted(rounds)}, against transformers", 1, required, aim, gains)
    local = {"kind": "local", "length": T}
    gains = {
        f"{passes}, dropout {dropout}": speedup(
            rows, {"who": "transformers"}, {}, passes=passes, dropout=dropout, **local
        )
        for passes, dropout in (("forward", "none"), ("training", "none"), ("training", "default"))
    }
    yield Line(f"local layer, {T} tokens, against transformers", 1, 3, 5, gains)
    for rounds, required, aim in ((mode.ends[0], 1024, ALWAYS), (mode.ends[1], 4096, 2048)):
        found = pick(crossed, against="sdpa", rounds=rounds)
        tokens = {row["passes"]: NEVER if row["says"] == "not reached" else row["tokens"] for row in found}
        yield Line(f"LSH layer, {counted(rounds)}, overtakes exact attention", -1, required, aim, tokens, "tokens")
    for length, required, aim in ((mode.long, 4, 8), (mode.far, 15, 30)):
        ours = {"rounds": mode.ends[1]}
        gains = {p: speedup(rows, {"who": "sdpa"}, ours, length=length, passes=p, **lsh) for p in PASSES}
        what = f"LSH layer, {length} tokens, {counted(mode.ends[1])}, against exact attention"
        yield Line(what, 1, required, aim, gains)


def _model_lines(rows: list[Row], peaks: list[Row], mode: Mode) -> Iterator[Line]:
    their, our = {"who": "transformers"}, {"who": "ours"}
    for rounds, required, aim in ((mode.ends[0], 1.8, 2.5), (mode.ends[1], 3.5, 5)):
        both = {"kind": "model", "length": mode.long, "rounds": rounds}
        gains = {f"dropout {d}": speedup(rows, their, {}, dropout=d, **both) for d in DROPOUTS}
        yield Line(f"model, training step, {mode.long} tokens, {counted(rounds)}", 1, required, aim, gains)
    shares = {
        f"{counted(rounds)}, dropout {d}": ratio(
            peaks, "peak_mb", our, their, kind="model", rounds=rounds, dropout=d, allocator="default"
        )
        for rounds in mode.ends
        for d in DROPOUTS
    }
    yield Line("its peak memory over that of transformers", -1, 1 / 3, 1 / 5, shares)
    gains = {
        f"{counted(rounds)}, dropout {d}": speedup(
            rows, their, {}, kind="model", length=SHORT, batch=mode.short_batch, rounds=rounds, dropout=d
        )
        for rounds in mode.short_rounds
        for d in DROPOUTS
    }
    yield Line(f"model, training step, {SHORT} tokens, batch {mode.short_batch}", 1, 1, 1.5, gains)


def requirements(rows: list[Row], tokens: Row, peaks: list[Row], crossed: list[Row], mode: Mode) -> list[Row]:
    """Return the table of requirements, aims and what was measured."""
    first, last = mode.token_lengths[0], mode.token_lengths[-1]
    what = f"LSH layer, 1 round, training: cost per token at {last} over that at {first}"
    lines = [*_layer_lines(rows, mode, crossed), *_model_lines(rows, peaks, mode)]
    lines.append(Line(what, -1, 1.3, 1.0, {"growth": tokens["growth"]}))
    return [line.row(judged=mode.name != "tiny") for line in lines]


def describe(table: list[Row]) -> Iterator[str]:
    """Yield the table's lines for people; a star marks a required number that was missed."""
    yield f"{'':1} {'what':<68} {'required':>10} {'aim':>13}  measured"
    for row in table:
        says = "; ".join(f"{setting}: {value}" for setting, value in row["says"].items())
        star = "*" if row["met"] is False else " "
        yield f"{star} {row['what']:<68} {row['required']:>10} {row['aim']:>13}  {says}"
