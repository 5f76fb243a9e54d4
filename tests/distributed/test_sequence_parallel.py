"""Sequence parallelism: ranks that share sequences get what one process gets, to rounding.

Four processes are started once, talk by gloo, and go through all cases, by fours and by twos.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from flash_reformer.distributed import parallelize_sequence, unparallelize_sequence
from tests.distributed.processes import start_ranks
from tests.distributed.sequence_cases import CASES, Results, Spread, build, gradients, ids_of

RANKS = 4


def train_on(model: nn.Module, number: int) -> Results:
    """Gradients of the batch of a group of ranks, by the names that they have in an unwrapped model."""
    ids = ids_of(45, seed=number)
    model(ids, labels=ids, return_logits=False).loss.backward()
    found = {name: (g.full_tensor() if hasattr(g, "full_tensor") else g) for name, g in gradients(model).items()}
    return {name.replace("module.", ""): grad for name, grad in found.items()}


def nothing(model: nn.Module) -> None:
    pass


def both_batches(spread: Spread) -> Results:
    """What two groups of ranks must come to: the mean over their batches."""
    halves = [train_on(build(spread), number) for number in range(2)]
    return {name: (grad + halves[1][name]) / 2 for name, grad in halves[0].items()}


def two_groups(mesh: DeviceMesh) -> dict[str, Results]:
    """Sequences shared by two ranks each, and data by two such pairs, by torch's engines."""
    pair, number = mesh["sequence"], mesh["data"].get_local_rank()
    model = build(lambda model: parallelize_sequence(model, pair))
    over_data = DistributedDataParallel(model, process_group=mesh["data"].get_group())
    found = {"DDP over the groups": train_on(over_data, number)}

    def left(model: nn.Module) -> None:
        parallelize_sequence(model, pair.get_group(), reduce_gradients=False)

    found["DDP over all ranks"] = train_on(DistributedDataParallel(build(left)), number)
    model = build(left)
    for layer in model.reformer.encoder.layers:
        fully_shard(layer)
    fully_shard(model)
    found["FSDP2 over all ranks"] = train_on(model, number)
    return found


DROPOUT = {
    "hidden_dropout_prob": 0.3,
    "lsh_attention_probs_dropout_prob": 0.2,
    "local_attention_probs_dropout_prob": 0.2,
    "hash_seed": None,
}


def randomness(rank: int) -> Results:
    """Dropouts, on ranks whose generators stand at different places."""
    found: Results = {}
    for reversible in (True, False):
        model, ids = build(parallelize_sequence, **DROPOUT, reversible=reversible), ids_of(45)
        torch.manual_seed(100 + rank)
        loss = model(ids, labels=ids, return_logits=False).loss
        found[f"loss {reversible}"] = loss.detach()
        state = torch.get_rng_state()
        loss.backward()
        assert torch.equal(state, torch.get_rng_state())
        found |= {f"{name} {reversible}": grad for name, grad in gradients(model).items()}
    torch.manual_seed(100 + rank)
    torch.randint(2**63 - 1, ())
    assert torch.equal(state, torch.get_rng_state())
    # Words only: rows of ones in which dropout leaves its mask. Then positions only.
    model = build(parallelize_sequence, **DROPOUT)
    words, tables = model.reformer.embeddings.word_embeddings, model.reformer.embeddings.position_embeddings
    for name, one, zero in (
        ("words", [words.weight], tables.parameters()),
        ("places", tables.parameters(), [words.weight]),
    ):
        with torch.no_grad():
            _ = [p.fill_(value) for value, tensors in ((1.0, one), (0.0, zero)) for p in tensors]
        found[name] = model.reformer(ids_of(64, rows=1), output_hidden_states=True).hidden_states[0].detach()
    return found


def refusals(rank: int, mesh: DeviceMesh) -> dict[str, str]:
    """What is said, by what was tried."""

    def said(attempt: Any) -> str:
        try:
            attempt()
        except (TypeError, ValueError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    model, ids, whole_ids = build(parallelize_sequence), ids_of(45, seed=rank), ids_of(45)
    whole = build(parallelize_sequence)
    fully_shard(whole)
    return {
        "other tokens": said(lambda: model(ids)),
        "other lengths": said(lambda: model(ids[:, : 40 + rank])),
        "other outputs": said(lambda: model(whole_ids, labels=whole_ids, return_logits=rank == 0)),
        "twice": said(lambda: parallelize_sequence(model)),
        "two dimensions": said(lambda: parallelize_sequence(build(nothing), mesh)),
        "heads": said(lambda: parallelize_sequence(build(nothing, num_attention_heads=2))),
        "other models": said(lambda: parallelize_sequence(build(nothing, vocab_size=20 + rank))),
        "no model": said(lambda: parallelize_sequence(nn.Linear(2, 2))),
        "no group": said(lambda: parallelize_sequence(build(nothing), 4)),
        "nothing to undo": said(lambda: unparallelize_sequence(build(nothing))),
        "sharded": said(lambda: whole(ids)),
    }


def copies(rank: int) -> Results:
    """A copy shares sequences, too; what is unpickled, or undone, is by itself, with other data on each rank."""
    model, ids = build(parallelize_sequence), ids_of(45)
    copied = copy.deepcopy(model)
    copied(ids, labels=ids, return_logits=False).loss.backward()
    found = gradients(copied)
    model(ids, labels=ids, return_logits=False).loss.backward()
    alone = pickle.loads(pickle.dumps(model))
    unparallelize_sequence(model)
    for each in (alone, model):
        each.zero_grad()
        own = train_on(each, rank)
        expected = train_on(build(nothing), rank)
        assert all(torch.equal(own[name], expected[name]) for name in own)
    return found


def on_a_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    found: dict[str, Any] = {}
    for name, run in CASES.items():
        found[name] = run(parallelize_sequence)
    found["two ranks"] = CASES["steps of training"](lambda model: parallelize_sequence(model, mesh["sequence"]))
    found["groups"] = two_groups(mesh)
    found["randomness"] = randomness(rank)
    found["copies"] = copies(rank)
    found["refusals"] = refusals(rank, mesh)
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    start_ranks(on_a_rank, RANKS, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def assert_close(found: Results, expected: Results, bound: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].shape == x.shape, name
        if x.is_floating_point():
            # Some gradients are zero but for rounding.
            assert (found[name] - x).norm() <= bound * x.norm() + 1e-15, name
        else:
            assert torch.equal(found[name], x), name


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_four_ranks_get_what_one_process_gets(name: str, of_ranks: list[dict[str, Any]]) -> None:
    expected = CASES[name](nothing)
    for found in of_ranks:
        assert_close(found[name], expected, 5e-2 if name == "half precision" else 1e-10)


@pytest.mark.slow
def test_two_ranks_train_to_the_weights_of_one_process(of_ranks: list[dict[str, Any]]) -> None:
    expected = CASES["steps of training"](nothing)
    for found in of_ranks:
        assert_close(found["two ranks"], expected)


@pytest.mark.slow
def test_engines_of_data_parallelism_go_with_it(of_ranks: list[dict[str, Any]]) -> None:
    expected = both_batches(nothing)
    for found in of_ranks:
        for name in found["groups"]:
            assert_close(found["groups"][name], expected)


@pytest.mark.slow
def test_dropout_differs_between_ranks_and_is_repeated_in_the_recomputation(of_ranks: list[dict[str, Any]]) -> None:
    for found in (rank["randomness"] for rank in of_ranks):
        assert found["loss True"] == of_ranks[0]["randomness"]["loss True"]
        assert found["loss True"] == found["loss False"]
        rebuilt, plain = ({n.removesuffix(k): x for n, x in found.items() if n.endswith(k)} for k in ("True", "False"))
        assert_close(rebuilt, plain)
    words = of_ranks[0]["randomness"]["words"].view(4, 16, 16) > 0
    assert 0.6 < words.double().mean() < 0.8
    assert all(not torch.equal(words[a], words[b]) for a in range(4) for b in range(a))
    # Positions of a column of the grid, 8 by 8, are dropped together, whatever rank has them.
    places = of_ranks[0]["randomness"]["places"].view(8, 8, 16)
    assert (places == places[0]).all()
    assert 0 < (places[0, :, 0] > 0).sum() < 8


@pytest.mark.slow
def test_copies_go_on_sharing_and_what_is_undone_does_not(of_ranks: list[dict[str, Any]]) -> None:
    expected = train_on(build(nothing), 1)
    for found in of_ranks:
        assert_close(found["copies"], expected)


DIFFERENT = "ValueError: ranks that share sequences must pass the same batch, and ask the same of it; they differ in "


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tried", "said"),
    [
        ("other tokens", f"{DIFFERENT}content"),
        ("other lengths", f"{DIFFERENT}tokens, content"),
        ("other outputs", f"{DIFFERENT}return_logits"),
        ("twice", "ValueError: model is spread over ranks already"),
        ("two dimensions", "ValueError: ranks must be a mesh of one dimension; got 2 (('data', 'sequence'))"),
        ("heads", "ValueError: num_attention_heads must be divisible by the 4 ranks; got 2"),
        ("other models", "ValueError: model differs between ranks 0 and 1 of the group, first in ('reformer."),
        ("no model", "TypeError: model must be a Reformer, or contain one; got Linear"),
        ("no group", "TypeError: ranks must be a DeviceMesh, a ProcessGroup or None; got int"),
        ("nothing to undo", "ValueError: model is not spread over ranks"),
        ("sharded", "RuntimeError: the model is sharded (fully_shard)"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_on_every_rank(tried: str, said: str, of_ranks: list[dict[str, Any]]) -> None:
    for found in of_ranks:
        assert found["refusals"][tried].startswith(said), found["refusals"][tried]


def test_without_processes_it_says_how_to_start_them() -> None:
    with pytest.raises(ValueError, match="init_process_group first, or run torchrun"):
        parallelize_sequence(build(nothing))
