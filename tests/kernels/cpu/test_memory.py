"""Memory: nothing reads what nobody wrote, nothing is written that is not its own, threads share nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cpu.every import NAMES, jobs
from tests.kernels.cpu.tools import DTYPES, exact_blocks, same, slab_scores
from tests.ops.tools import untouched

#: Whole rings at once, and one chunk or a few queries at a time.
SCORES = [None, 1, 100]


def spoil(x: Tensor) -> Tensor:
    """Fill fresh memory with what shows if it is read."""
    if x.is_floating_point():
        return x.fill_(torch.nan)
    return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Every empty tensor made from Python is full of NaN; returns the shapes of those made."""
    made: list[torch.Size] = []

    def spoiling(make: Any) -> Any:
        def made_and_spoiled(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            made.append(x.shape)
            return spoil(x)

        return made_and_spoiled

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, spoiling(getattr(owner, name)))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_reads_memory_that_nobody_wrote(
    name: str, dtype: torch.dtype, spoiled: list[torch.Size], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs(dtype)[name]
    for scores in SCORES:
        with slab_scores(scores), exact_blocks(scores):
            before = len(spoiled)
            actual = job()
            used = len(spoiled) - before
            with monkeypatch.context() as clean:
                clean.undo()
                expected = job()
        assert same(actual, expected)
        assert all(torch.isfinite(x).all() for x in actual.values() if x.is_floating_point())
        # Sorting and linear maps leave memory to numpy and oneDNN.
        assert used > 0 or name in ("sort", "sort, wide", "linear")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_written_to_and_outputs_are_new(name: str, dtype: torch.dtype) -> None:
    job = jobs(dtype)[name]
    given = {key: x for key, x in {**job.tensors, **job.options}.items() if isinstance(x, Tensor)}
    for scores in SCORES:
        with slab_scores(scores), exact_blocks(scores), untouched(**given):
            results = job()
        owned = {x.untyped_storage().data_ptr() for x in given.values()}
        for key, x in results.items():
            assert x.untyped_storage().data_ptr() not in owned, f"{key} is a view of an input"
            # Nor of another result: whoever writes to one of them changes nothing else.
            owned.add(x.untyped_storage().data_ptr())


@pytest.mark.parametrize("name", NAMES)
def test_the_same_inputs_give_the_same_results(name: str) -> None:
    for scores in SCORES:
        with slab_scores(scores), exact_blocks(scores):
            first = jobs()[name]()
            assert same(first, jobs()[name]())
            assert not same(first, jobs(start=5)[name]()) or name.startswith("sort")


@pytest.mark.parametrize("scores", SCORES[:2])
def test_threads_share_nothing(scores: int | None) -> None:
    """Two threads, forward and backward at once on different inputs, many times: each as if it were alone."""
    mine, yours = (list(jobs(start=start).values()) for start in (0, 5))

    def run(list_of_jobs: list[Any]) -> list[dict[str, Tensor]]:
        return [job() for _ in range(8) for job in list_of_jobs]

    with slab_scores(scores), exact_blocks(scores), ThreadPoolExecutor(2) as pool:
        alone = [job() for job in mine], [job() for job in yours]
        # Against each other in opposite orders, so that different kernels meet.
        running = pool.submit(run, mine), pool.submit(run, yours[::-1])
        together = running[0].result(), running[1].result()
    for expected, actual in ((alone[0], together[0]), (alone[1][::-1], together[1])):
        for number, results in enumerate(actual):
            assert same(results, expected[number % len(expected)])
