"""DeepSpeed's ZeRO on two ranks trains what one process trains with both batches; stage 3 takes plain layers only."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed.processes import start_ranks
from tests.distributed.test_data_parallel import RANKS, batch_of, build, loss_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

STEPS, RATE = 2, 0.1
#: Stage, and whether layers are reversible.
WAYS = [(1, True), (2, True), (3, False)]


def train_on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    import deepspeed

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    for stage, reversible in [*WAYS, (3, True)]:
        model = build(reversible=reversible)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
                "zero_allow_untested_optimizer": True,
            },
        )
        if (stage, reversible) not in WAYS:
            try:
                loss_of(engine, batch_of(rank))
            except RuntimeError as error:
                Path(folder, f"refused-{rank}.txt").write_text(str(error), encoding="utf-8")
            continue
        for step in range(STEPS):
            engine.backward(loss_of(engine, batch_of(rank, step)))
            engine.step()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
            if rank == 0:
                torch.save({n: p.detach().clone() for n, p in model.named_parameters()}, Path(folder, f"{stage}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    start_ranks(train_on_a_rank, RANKS, str(folder))
    return folder


@pytest.mark.parametrize("stage", [stage for stage, _ in WAYS])
def test_weights_are_those_of_one_process(stage: int, of_ranks: Path) -> None:
    found = torch.load(of_ranks / f"{stage}.pt", weights_only=True)
    start, model = dict(build().named_parameters()), build()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(RANKS):
            (loss_of(model, batch_of(rank, step)) / RANKS).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        moved = (parameter - start[name]).norm()
        assert moved > 0
        assert (found[name] - parameter).norm() <= 1e-4 * moved, name


def test_stage_3_of_reversible_layers_is_refused(of_ranks: Path) -> None:
    for rank in range(RANKS):
        said = (of_ranks / f"refused-{rank}.txt").read_text("utf-8")
        assert said.startswith("DeepSpeed's ZeRO-3 fetches the weights of one module at a time")
