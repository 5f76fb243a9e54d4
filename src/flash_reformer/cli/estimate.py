"""A dry run as it looks on a terminal."""

from collections.abc import Iterator

from flash_reformer.cli.progress import clock
from flash_reformer.training.estimate import Estimate

_MB = 2**20


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if abs(size) >= 2**30 else f"{size / _MB:,.1f} MiB"


def describe_estimate(found: Estimate) -> Iterator[str]:
    """Say in lines what a run will take."""
    yield f"parameters: {sum(found.parameters.values()):,}"
    for name, count in found.parameters.items():
        yield f"  {name:<42}{count:>14,}"
    where = "of the GPU" if found.on_gpu else "above the process after its imports"
    yield f"memory, {where}, at the peak of a step: {_bytes(found.memory_peak)}"
    for name, size in found.memory.items():
        yield f"  {name:<42}{_bytes(size):>14}"
    if not found.on_gpu:
        yield f"  with the {_bytes(found.baseline)} of the process: {_bytes(found.memory_peak + found.baseline)}"
    yield f"calibration, {found.calibration_seconds:.1f} s in a process of its own: {'; '.join(found.calibrated)}"
    if found.length < found.seq_len:
        yield f"  a step of {found.seq_len:,} tokens per row does not fit into that: it is extrapolated"
    yield f"time: {clock(found.seconds)} in all, but for reading the data and writing a sample"
    parts = (
        (f"{found.steps:,} steps", found.seconds_per_step, found.steps),
        (f"{found.evaluations:,} evaluations", found.seconds_per_evaluation, found.evaluations),
        (f"{found.saves:,} checkpoints", found.seconds_per_save, found.saves),
    )
    for name, seconds, count in parts:
        yield f"  {name:<26}{seconds:>12,.3f} s each{clock(seconds * count):>12}"
