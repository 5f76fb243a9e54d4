"""Where the time of our LSH layer and of our training step goes, stage by stage.

    python -m benchmarks.stages '{"who": "ours", "kind": "lsh", "length": 4096, "rounds": 1, "passes": "training"}'

One run under torch's profiler, on the main thread. The functions of ``functional`` and some modules are wrapped in
labels; a piece of time belongs to the innermost label around it. In a backward the label is that of the operation
whose gradient is computed, found by autograd's sequence numbers; where a label stands inside of a backward, a
reversible block is computing its forward anew. Profiling slows small operations down, so the shares count, and the
time without it stands beside them. Prints a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.contestants import Entry, build
from benchmarks.race import THREADS
from benchmarks.workloads import counted
from flash_reformer import functional

#: Functions of ``functional`` and what they are part of.
FUNCTIONS = {
    "draw_rotations": "hash",
    "hash_vectors": "hash",
    "sort_positions": "sort",
    "lsh_attention": "LSH attention",
    "local_attention": "local attention",
    "exact_attention": "exact attention",
}
#: Modules, by the end of their name, likewise; the first that fits. A head's loss is a method.
MODULES = {
    "query_key": "projections",
    "query": "projections",
    "key": "projections",
    "value": "projections",
    "attention.output": "projections",
    "feed_forward": "feed-forward",
    "embeddings": "embeddings",
    "layer_norm": "norms",
    "lm_head": "head",
}
REST = "rest"
PHASES = ("forward", "again", "backward")
_MARK = "stage: "
_BACKWARD = "autograd::engine::evaluate_function: "  # as the profiler calls autograd's own events
_CLOCK_US = 1e-6


def _labelled(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(_MARK + label):
            return function(*args, **kwargs)

    return run


def _label_of(name: str) -> str | None:
    return next((label for end, label in MODULES.items() if name == end or name.endswith("." + end)), None)


@contextlib.contextmanager
def labels(module: nn.Module) -> Iterator[None]:
    """Put labels around the stages of a layer or model, and take them off again."""
    undo: list[tuple[Any, str, Any]] = []
    for name, label in FUNCTIONS.items():
        undo.append((functional, name, getattr(functional, name)))
        setattr(functional, name, _labelled(getattr(functional, name), label))
    marked = [(part, label) for name, part in module.named_modules() if (label := _label_of(name)) is not None]
    for part, label in marked:
        for method in ("forward", "_project"):
            if hasattr(part, method):
                setattr(part, method, _labelled(getattr(part, method), label))
    try:
        yield
    finally:
        for owner, name, function in undo:
            setattr(owner, name, function)
        for part, _ in marked:
            for method in ("forward", "_project"):
                part.__dict__.pop(method, None)


def _own_label(event: Any) -> str | None:
    return event.name.removeprefix(_MARK) if event.name.startswith(_MARK) else None


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _owner(event: Any, makers: dict[int, str]) -> tuple[str, str]:
    """Return the stage and the phase that an event's own time belongs to."""
    stage, gradient = None, False
    for each in _ancestors(event):
        label = _own_label(each)
        if each.name.startswith(_BACKWARD):
            if stage is None and each.sequence_nr in makers:
                return makers[each.sequence_nr], "backward"
            gradient = True
        elif stage is None and label is not None:
            stage = label
    if stage is None:
        return REST, "backward" if gradient else "forward"
    return stage, "again" if gradient else "forward"


def _makers(events: list[Any]) -> dict[int, str]:
    """Return the stage in which each node of autograd was made, by its sequence number.

    Operations carry the number that the next node will get, so the last one to start with a number made its node.
    A backward carries the number of its node, and the thread that made it, counted from 1.
    """
    last: dict[int, Any] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not event.fwd_thread:
            last[event.sequence_nr] = event
    found = {}
    for number, event in last.items():
        label = next((label for each in _ancestors(event) if (label := _own_label(each)) is not None), None)
        if label is not None:
            found[number] = label
    return found


def stages(entry: Entry) -> dict[str, Any]:
    """Profile one run of ours and return seconds by stage and phase."""
    runner = build(entry)
    for _ in range(2):
        start = time.perf_counter()
        runner.run()
        seconds = time.perf_counter() - start
        runner.tidy()
    with labels(runner.module), profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        runner.run()
        profiled = time.perf_counter() - start
    every = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CPU]
    main = next(event.thread for event in every if event.name.startswith(_MARK))
    events = [event for event in every if event.thread == main]
    makers = _makers(events)
    spent: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
    for event in events:
        stage, phase = _owner(event, makers)
        spent[stage][phase] += _CLOCK_US * event.self_cpu_time_total
    # What lies between the operations: Python, and whatever is not an operation.
    spent[REST]["forward"] += max(profiled - sum(sum(phases.values()) for phases in spent.values()), 0.0)
    return {**vars(entry), "seconds": seconds, "profiled_s": profiled, "stages": dict(spent)}


def describe(found: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield (
        f"{found['kind']}, {found['length']} tokens, {counted(found['rounds'])}: {1e3 * found['seconds']:.0f} ms a "
        f"training step ({1e3 * found['profiled_s']:.0f} ms profiled)"
    )
    yield f"  {'stage':<16} {'forward':>9} {'again':>9} {'backward':>9} {'ms':>9} {'share':>6}"
    for stage, phases in sorted(found["stages"].items(), key=lambda item: -sum(item[1].values())):
        times = " ".join(f"{1e3 * phases[phase]:>9.1f}" for phase in PHASES)
        total = sum(phases.values())
        yield f"  {stage:<16} {times} {1e3 * total:>9.1f} {total / found['profiled_s']:>6.1%}"


def main() -> None:
    """Profile the entry of the command line in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", type=json.loads, help="fields of an entry, as JSON")
    parser.add_argument("--threads", type=int, default=THREADS)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    found = stages(Entry(**arguments.entry))
    for line in describe(found):
        print(line)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
