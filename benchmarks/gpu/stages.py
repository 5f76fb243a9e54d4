"""The stages that time attention alone: the race, the pieces, the variants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu import floors
from benchmarks.gpu.attention import PASSES, Case, deterministic_options, runner
from benchmarks.gpu.budget import Share
from benchmarks.gpu.device import Device, Run
from benchmarks.gpu.lanes import OVER, Lane, Prediction, Row, race, spare
from benchmarks.gpu.plan import Plan

WITH_BACKWARD = (*PASSES, "backward")


@dataclass
class Context:
    """What a stage gets. ``speed`` is that of copies, bytes per second, once it is measured."""

    device: Device
    plan: Plan
    backend: str
    share: Share
    say: Callable[[str], None]
    speed: float | None = None
    #: What the stage has found so far, kept if it fails in the middle.
    rows: list[Row] = field(default_factory=list)

    def case(self, length: int, head_size: int, **rest: Any) -> Case:
        """Return a case of the plan's width."""
        sizes = {"heads": self.plan.heads, "chunk": self.plan.chunk, **rest}
        return Case(self.device, self.backend, length=length, head_size=head_size, **sizes)

    def race(self, lanes: list[Lane]) -> list[Row]:
        """Time lanes in turns and print their rows."""
        rows = race(self.device, self.plan, self.share, lanes)
        for row in rows:
            self.say(describe(row, self.plan.measures))
        return rows


def describe(row: Row, measures: bool = True) -> str:
    """Return a row for people."""
    known = ("median_s", "min_s", "runs", "first_s", "error", "not_run", "predicted_s", "floor_s", "over_floor")
    what = " ".join(f"{key}={value}" for key, value in row.items() if key not in known and value != "")
    if "median_s" not in row:
        return f"{what}: {row.get('error') or 'not run: ' + str(row.get('not_run'))}"
    if not measures:
        return f"{what}: ran (rehearsal, no measurement)"
    floor = f", {row['over_floor']:.2f}x its floor" if "over_floor" in row else ""
    return f"{what}: {1e3 * row['median_s']:.3f} ms (min {1e3 * row['min_s']:.3f}, {row['runs']} runs{floor})"


def copy(context: Context) -> Row:
    """Measure the speed of copies, on which the floors rest."""
    speed = context.device.copy_speed()
    context.speed = speed
    context.say(f"copy: {speed / 1e12:.2f} TB/s" if context.plan.measures else "copy: ran (rehearsal, no measurement)")
    return {"bytes_per_s": speed, "rows": context.rows}


def attention(context: Context) -> Row:
    """Time LSH and local attention against exact attention and the floor, over lengths, rounds and head sizes."""
    plan, rows = context.plan, context.rows
    prediction = Prediction(power=2)

    def key(who: Row) -> tuple[Any, ...]:
        return who["who"], who["passes"], who["head_size"]

    for head_size in plan.head_sizes:
        for length in plan.lengths:
            at = {"length": length, "head_size": head_size}
            if context.share.out():
                rows.append({"who": "all", **at, "not_run": OVER})
                continue
            base = context.case(length, head_size)
            kept, told = spare(_contestants(context, base, at), prediction, plan.slow, key)
            found = context.race(kept)
            for row in found:
                if "median_s" in row and row["who"] != "ours":
                    prediction.learn(key(row), length, row["median_s"])
            rows += [_with_floor(context, base, row) for row in found] + told
            for row in told:
                context.say(describe(row))
    return {"rows": rows}


def _contestants(context: Context, base: Case, at: Row) -> list[Lane]:
    lanes = []
    for name in context.device.exact:
        for passes in PASSES:
            who = {"who": name, "kind": "exact", **at, "rounds": 0, "passes": passes}
            lanes.append(Lane(who, lambda name=name, passes=passes: base.exact(name, passes)))
    for rounds in context.plan.rounds:
        for passes in WITH_BACKWARD:
            who = {"who": "ours", "kind": "lsh", **at, "rounds": rounds, "passes": passes}
            lanes.append(Lane(who, lambda rounds=rounds, passes=passes: base.like(rounds=rounds).run("lsh", passes)))
    for passes in WITH_BACKWARD:
        who = {"who": "ours", "kind": "local", **at, "rounds": 0, "passes": passes}
        lanes.append(Lane(who, lambda passes=passes: base.run("local", passes)))
    return lanes


def _with_floor(context: Context, base: Case, row: Row) -> Row:
    if row["who"] != "ours" or "median_s" not in row or context.speed is None:
        return row
    rounds = max(1, row["rounds"])
    floor = floors.floor_s(row["kind"], row["passes"], context.speed, rounds=rounds, **base.shape)
    return {**row, "floor_s": floor, "over_floor": row["median_s"] / floor}


def parts(context: Context) -> Row:
    """Time the pieces of LSH attention, and replays of CUDA graphs, which leave out what Python takes."""
    plan, rows = context.plan, context.rows
    for length in plan.part_lengths:
        for rounds in (plan.few, plan.many):
            case = context.case(length, plan.head_sizes[0], rounds=rounds)
            at = {"who": "ours", "length": length, "rounds": rounds}
            rows += context.race([Lane({**at, "part": name}, build) for name, build in _pieces(case)])
    for length in plan.graph_lengths:
        for rounds in (plan.few, plan.many):
            case = context.case(length, plan.head_sizes[0], rounds=rounds)
            at = {"who": "ours, CUDA graph", "length": length, "rounds": rounds}
            rows += context.race([Lane({**at, "part": name}, build) for name, build in _graphs(context.device, case)])
    return {"rows": rows}


def _pieces(case: Case) -> Iterator[tuple[str, Callable[[], Run]]]:
    def sorted_once() -> tuple[torch.Tensor, torch.Tensor]:
        buckets = case.buckets(case.rotations())
        return case.positions(buckets), buckets

    def hashing() -> Run:
        rotations = case.rotations()
        return lambda: case.buckets(rotations)

    def sorting() -> Run:
        _, buckets = sorted_once()
        return lambda: case.positions(buckets)

    def attending(passes: str) -> Run:
        given = sorted_once()
        return runner(lambda: case.attend(*given), case.inputs_of("lsh"), case.grad, passes)

    yield "rotations", lambda: case.rotations
    yield "hash", hashing
    yield "sort", sorting
    for passes in WITH_BACKWARD:
        yield f"attention, {passes}", lambda passes=passes: attending(passes)


def sorting(context: Context) -> Row:
    """Time the kernels' ways to sort, of which they use one, and check that each gives the one order there is."""
    plan, rows = context.plan, context.rows
    for length in plan.part_lengths:
        for rounds in (plan.few, plan.many):
            case = context.case(length, plan.head_sizes[0], rounds=rounds)
            at = {"length": length, "rounds": rounds}
            lanes = [
                Lane({"who": name, **at}, lambda sort=sort, case=case: _one_way(sort, case))
                for name, sort in ways_to_sort().items()
            ]
            rows += context.race(lanes)
    return {"rows": rows}


def _one_way(sort: Callable[[torch.Tensor], torch.Tensor], case: Case) -> Run:
    buckets = case.buckets(case.rotations())
    if not torch.equal(sort(buckets).long(), torch.sort(buckets, dim=-1, stable=True).indices):
        raise ValueError("it sorts wrongly")
    return lambda: sort(buckets)


def ways_to_sort() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return the kernels' ways to sort, of which they use one."""
    try:
        from flash_reformer.kernels.triton import sorting
    except ImportError:
        return {}
    names = ("_by_torch", "_by_counting")
    return {name.removeprefix("_"): getattr(sorting, name) for name in names if hasattr(sorting, name)}


def _graphs(device: Device, case: Case) -> Iterator[tuple[str, Callable[[], Run]]]:
    inputs, grad = case.inputs_of("lsh"), case.grad

    def whole() -> Run:
        return device.replay(runner(case.lsh, inputs, grad, "training"))

    def attending() -> Run:
        buckets = case.buckets(case.rotations())
        positions = case.positions(buckets)
        return device.replay(runner(lambda: case.attend(positions, buckets), inputs, grad, "training"))

    yield "attention, training", attending
    yield "rotations, hash, sort and attention, training", whole


def variants(context: Context) -> Row:
    """Time each option once, at the length of the requirements and with many rounds."""
    plan, rows = context.plan, context.rows
    base = context.case(plan.long, plan.head_sizes[0], rounds=plan.many)
    dropout = {"dropout_p": 0.1, "dropout_seed": torch.tensor(3, device=context.device.torch)}
    cases = {
        "base": base,
        **{
            f"deterministic={each['deterministic']}": base.like(options=each)
            for each in deterministic_options(context.backend)
        },
        "dropout 0.1": base.like(options=dropout),
        "union": base.like(options={"allow_duplicate_attention": False}),
        "in-bucket": base.like(options={"attend_across_buckets": False}),
        "not causal": base.like(options={"causal": False}),
        **{f"chunk {chunk}": base.like(chunk=chunk) for chunk in plan.variant_chunks},
    }
    for dtype in (torch.float16, torch.float32):
        sizes = {"rounds": plan.many, "dtype": dtype}
        cases[str(dtype).removeprefix("torch.")] = context.case(plan.long, plan.head_sizes[0], **sizes)
    lanes = [
        Lane(
            {"who": "ours", "variant": name, "length": plan.long, "passes": passes},
            lambda c=case, p=passes: c.run("lsh", p),
        )
        for name, case in cases.items()
        for passes in PASSES
    ]
    rows += context.race(lanes)
    if not deterministic_options(context.backend):
        rows.append({"who": "ours", "variant": "deterministic", "not_run": "lsh_attention has no such option"})
        context.say(describe(rows[-1]))
    return {"rows": rows}
