"""Data parallelism by torch's own engines: on two ranks the gradients are those of one process with both batches.

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
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from flash_reformer import ReformerConfig, ReformerModelWithLMHead

RANKS = 2
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


def alone(steps: int = 1, **changes: Any) -> Gradients:
    """What one process computes that sees the batches of all ranks, in fp64 order or not: the mean over ranks."""
    model = build(**changes)
    for step in range(steps):
        for rank in range(RANKS):
            (loss_of(model, batch_of(rank, step)) / RANKS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def whole(model: nn.Module) -> Gradients:
    """Gradients by the name that they have in an unwrapped model, shards put together."""
    found = {}
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
                    loss_of(model, batch_of(rank, step)).backward()
        return whole(model)

    return run


def fsdp(parts: str, policy: dict[str, torch.dtype] | None = None, **changes: Any) -> Callable[[int], Gradients]:
    def run(rank: int) -> Gradients:
        model = build(**changes)
        options = {} if policy is None else {"mp_policy": MixedPrecisionPolicy(**policy)}
        for layer in model.reformer.encoder.layers:
            for unit in (layer,) if parts == "blocks" else (layer.attention, layer.feed_forward):
                fully_shard(unit, **options)
        fully_shard(model, **options)
        for _ in range(2):
            model.zero_grad()
            loss_of(model, batch_of(rank)).backward()
        return whole(model)

    return run


#: What rounding to eight bits, several layers of it, leaves of a gradient; buckets may change, too.
HALF = 5e-2
BF16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
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
}


def refused(rank: int) -> str:
    """What is said where a branch of a reversible layer is a unit by itself."""
    model = build()
    fully_shard(model.reformer.encoder.layers[1].attention)
    try:
        loss_of(model, batch_of(rank))
    except RuntimeError as error:
        return str(error)
    return "nothing"


def on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    for number, (run, _, _) in enumerate(WAYS.values()):
        gradients = run(rank)
        if rank == 0:
            torch.save(gradients, Path(folder, f"{number}.pt"))
        dist.barrier()
    Path(folder, f"refused-{rank}.txt").write_text(refused(rank), encoding="utf-8")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(on_a_rank, args=(str(folder),), nprocs=RANKS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WAYS))
def test_gradients_are_those_of_one_process(name: str, of_ranks: Path) -> None:
    number, (_, changes, bound) = list(WAYS).index(name), WAYS[name]
    found = torch.load(of_ranks / f"{number}.pt", weights_only=True)
    expected = alone(**changes)
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
