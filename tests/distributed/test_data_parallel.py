"""Data parallelism by torch's own engines: on two and four ranks the gradients and losses are those of one process
with all batches.

Ranks are processes that talk by gloo. Rotations are fixed and nothing is dropped, so that a sequence means the same on
every rank; what is left is the order in which numbers are added.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from tests.distributed.processes import start_ranks

RANKS, MORE_RANKS = 2, 4
LOSS = "the loss"
FIELDS: dict[str, Any] = {
    "attn_layers": ["local", "lsh", "local", "lsh"],
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "feed_forward_size": 48,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "num_hashes": 2,
    "num_buckets": 4,
    "hash_seed": 5,
    "axial_pos_shape": (8, 16),
    "axial_pos_embds_dim": (16, 16),
    "max_position_embeddings": 128,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "vocab_size": 30,
    "is_decoder": True,
}
Gradients = dict[str, Tensor]


def build(*, tied: bool = False, reversible: bool = True) -> ReformerModelWithLMHead:
    """The same model on every rank; ``tied`` shares one block's weights among two layers."""
    torch.manual_seed(0)
    model = ReformerModelWithLMHead(ReformerConfig(**FIELDS, reversible=reversible)).train()
    if tied:
        layers = model.reformer.encoder.layers
        layers[2].feed_forward = layers[0].feed_forward
    return model


def batch_of(rank: int, step: int = 0) -> Tensor:
    return torch.randint(30, (2, 70), generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, labels=ids, return_logits=False).loss


def alone(ranks: int, steps: int = 1, **changes: Any) -> Gradients:
    """What one process computes that sees the batches of all ranks: the mean over ranks, and the last loss."""
    model = build(**changes)
    for step in range(steps):
        total = torch.zeros(())
        for rank in range(ranks):
            loss = loss_of(model, batch_of(rank, step)) / ranks
            loss.backward()
            total += loss.detach()
    return {LOSS: total, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def whole(model: nn.Module, loss: Tensor) -> Gradients:
    """Gradients by the name that they have in an unwrapped model, shards put together, and the mean of the losses."""
    total = loss.detach().clone()
    dist.all_reduce(total)
    found = {LOSS: total / dist.get_world_size()}
    for name, parameter in model.named_parameters():
        grad: Any = parameter.grad
        if grad is not None:
            found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def ddp(options: dict[str, Any], tied: bool, steps: int) -> Callable[[int], Gradients]:
    def run(rank: int) -> Gradients:
        model = DistributedDataParallel(build(tied=tied), **options)
        # Twice: static graphs and the search for unused parameters change what happens the second time.
        for _ in range(2):
            model.zero_grad()
            for step in range(steps):
                waiting = model.no_sync() if step < steps - 1 else contextlib.nullcontext()
                with waiting:
                    loss = loss_of(model, batch_of(rank, step))
                    loss.backward()
        return whole(model, loss)

    return run


def shard(model: ReformerModelWithLMHead, parts: str = "blocks", **options: Any) -> ReformerModelWithLMHead:
    for layer in model.reformer.encoder.layers:
        for unit in (layer,) if parts == "blocks" else (layer.attention, layer.feed_forward):
            fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


def fsdp(parts: str, options: dict[str, Any] | None = None, **changes: Any) -> Callable[[int], Gradients]:
    def run(rank: int) -> Gradients:
        model = shard(build(**changes), parts, **(options or {}))
        for _ in range(2):
            model.zero_grad()
            loss = loss_of(model, batch_of(rank))
            loss.backward()
        return whole(model, loss)

    return run


#: What rounding to eight bits, several layers of it, leaves of a gradient; buckets may change, too.
HALF = 5e-2
BF16 = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
#: Pinned memory, the default, is there to be copied to a device.
OFFLOADED = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
#: Name: what a rank does, what one process alone does, and how far apart they may be.
WAYS: dict[str, tuple[Callable[[int], Gradients], dict[str, Any], float]] = {
    "DDP": (ddp({}, False, 1), {}, 1e-5),
    "DDP, looks for unused parameters": (ddp({"find_unused_parameters": True}, False, 1), {}, 1e-5),
    "DDP, static graph": (ddp({"static_graph": True}, False, 1), {}, 1e-5),
    "DDP, tied blocks": (ddp({}, True, 1), {"tied": True}, 1e-5),
    "DDP, two batches before ranks meet": (ddp({}, False, 2), {"steps": 2}, 1e-5),
    "FSDP2, a block a unit": (fsdp("blocks"), {}, 1e-5),
    "FSDP2, a branch a unit, plain layers": (fsdp("branches", reversible=False), {"reversible": False}, 1e-5),
    "FSDP2, bf16": (fsdp("blocks", BF16), {}, HALF),
    "FSDP2, offloaded": (fsdp("blocks", OFFLOADED), {}, 1e-5),
}
#: What four ranks do as well.
WIDER = ("DDP", "DDP, two batches before ranks meet", "FSDP2, a block a unit")


def refused(rank: int) -> str:
    """What is said where a branch of a reversible layer is a unit by itself."""
    model = build()
    fully_shard(model.reformer.encoder.layers[1].attention)
    try:
        loss_of(model, batch_of(rank))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, ranks: list[int]) -> None:
    """One step with the batches of these ranks (the engine's part of them)."""
    optimizer.zero_grad()
    for rank in ranks:
        (loss_of(model, batch_of(rank, step)) / len(ranks)).backward()
    optimizer.step()


def save_or_go_on(rank: int, folder: str, ranks: int) -> None:
    """Two ranks take a step and save their shards; four load them and take another."""
    model = shard(build())
    optimizer = optimizer_of(model)
    if ranks == RANKS:
        step_on(model, optimizer, 0, [rank])
        weights, moments = get_state_dict(model, optimizer)
        dcp.save({"weights": weights, "moments": moments}, checkpoint_id=f"{folder}/shards")
        return
    weights, moments = get_state_dict(model, optimizer)
    state = {"weights": weights, "moments": moments}
    dcp.load(state, checkpoint_id=f"{folder}/shards")
    set_state_dict(model, optimizer, model_state_dict=state["weights"], optim_state_dict=state["moments"])
    step_on(model, optimizer, 1, [rank])
    full = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save({name: parameter.detach() for name, parameter in full.items()}, f"{folder}/went-on.pt")


def on_a_rank(rank: int, folder: str, ranks: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{ranks}", rank=rank, world_size=ranks)
    for number, name in enumerate(WAYS):
        if ranks == RANKS or name in WIDER:
            gradients = WAYS[name][0](rank)
            if rank == 0:
                torch.save(gradients, Path(folder, f"{number}-{ranks}.pt"))
            dist.barrier()
    save_or_go_on(rank, folder, ranks)
    if ranks == RANKS:
        Path(folder, f"refused-{rank}.txt").write_text(refused(rank), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    for ranks in (RANKS, MORE_RANKS):
        start_ranks(on_a_rank, ranks, str(folder), ranks)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ranks"), [*((name, RANKS) for name in WAYS), *((name, MORE_RANKS) for name in WIDER)]
)
def test_gradients_and_losses_are_those_of_one_process(name: str, ranks: int, of_ranks: Path) -> None:
    number, (_, changes, bound) = list(WAYS).index(name), WAYS[name]
    found = torch.load(of_ranks / f"{number}-{ranks}.pt", weights_only=True)
    expected = alone(ranks, **changes)
    assert found.keys() == expected.keys()
    assert all(grad.norm() > 0 for grad in expected.values())
    if bound == HALF:
        # Of a weight whose gradient is small, half precision leaves less; so all of them are judged together.
        found, expected = ({"all": torch.cat([x[n].float().flatten() for n in expected])} for x in (found, expected))
    for parameter, grad in expected.items():
        assert (found[parameter] - grad).norm() <= bound * grad.norm(), parameter


@pytest.mark.slow
def test_a_part_of_a_reversible_layer_is_no_unit(of_ranks: Path) -> None:
    for rank in range(RANKS):
        said = (of_ranks / f"refused-{rank}.txt").read_text("utf-8")
        assert said.startswith(
            "fully_shard was called on attention, a part of a reversible layer; call it on the whole"
        )


@pytest.mark.slow
def test_shards_of_two_ranks_are_gone_on_with_by_four(of_ranks: Path) -> None:
    assert len(list((of_ranks / "shards").glob("*.distcp"))) == RANKS
    found = torch.load(of_ranks / "went-on.pt", weights_only=True)
    model = build()
    optimizer = optimizer_of(model)
    step_on(model, optimizer, 0, list(range(RANKS)))
    after_one = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    step_on(model, optimizer, 1, list(range(MORE_RANKS)))
    for name, parameter in model.named_parameters():
        moved = (parameter - after_one[name]).norm()
        assert moved > 0
        assert (found[name] - parameter).norm() <= 1e-3 * moved, name
