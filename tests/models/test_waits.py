"""Nobody waits for a GPU in a training step: tensors without values stand for its own."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

from flash_reformer import (
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModel,
    ReformerModelWithLMHead,
    branches,
    functional,
)
from flash_reformer.ops import randomness
from tests.models.test_triton import FIELDS


class Waits(TorchDispatchMode):
    """Counts operations whose result the host must have, or whose shape depends on values, and crossings of devices."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names.add(name)
        out = func(*args, **(kwargs or {}))
        there, here = (
            {x.device.type for x in tree_leaves(tree) if isinstance(x, Tensor)} for tree in ((args, kwargs), out)
        )
        if name in self.NAMES or (there | here) == {"cpu", "meta"}:
            self.counts[name] += 1
        return out


@contextlib.contextmanager
def meta_is_a_gpu() -> Iterator[None]:
    """Let tensors that have no values stand for those of a GPU: whoever asks for one of their values fails."""

    def capture(device: torch.device) -> Any:
        state = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return branches.Surroundings(torch.get_rng_state(), device, None, (("cpu", *state),), [])

    def draw(*_: Any) -> Tensor:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device="meta")

    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (functional, "backend_for", mock.Mock(return_value="triton")),
            (functional, "_unsuited_device", mock.Mock(return_value=None)),
            (functional, "_on_triton", mock.Mock(return_value=True)),
            (branches.Surroundings, "capture", staticmethod(capture)),
            (ReformerModel, "_draw_seed", draw),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def lm_inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"labels": ids, "attention_mask": torch.ones_like(ids), "head_mask": torch.ones(2, 2, device=ids.device)}


def class_inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"labels": ids[:, 0]}


def span_inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"start_positions": ids[:, 0], "end_positions": ids[:, 1], "attention_mask": torch.ones_like(ids)}


BIDIRECTIONAL = {"is_decoder": False}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize(
    ("kind", "changes", "inputs_of"),
    [
        (ReformerModelWithLMHead, {}, lm_inputs),
        (ReformerModelWithLMHead, {"reversible": False, "lsh_allow_duplicate_attention": False}, lm_inputs),
        (ReformerModelWithLMHead, {"full_attention_below": "auto", "chunk_size_feed_forward": 8}, lm_inputs),
        (ReformerForMaskedLM, BIDIRECTIONAL, lm_inputs),
        (ReformerForSequenceClassification, {"num_labels": 3}, class_inputs),
        (ReformerForQuestionAnswering, BIDIRECTIONAL, span_inputs),
    ],
)
def test_a_training_step_waits_for_nothing(kind: Any, changes: Any, inputs_of: Any, autocast: bool) -> None:
    """From the front door to the gradients."""
    # Registered operators work on tensors without values.
    from flash_reformer.kernels.triton import attention, hashing, loss, randomness, sorting  # noqa: F401

    dropouts = {"lsh_attention_probs_dropout_prob": 0.1, "local_attention_probs_dropout_prob": 0.1}
    torch.manual_seed(0)
    model = kind(ReformerConfig(**{**FIELDS, **dropouts, **changes})).to("meta").train()
    ids = torch.zeros(2, 40, dtype=torch.long, device="meta")
    with meta_is_a_gpu(), Waits() as waits, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(ids, **inputs_of(ids)).loss.backward()
    assert waits.counts == {}
    assert {"triton_attention", "triton_attention_backward", "triton_cross_entropy"} <= waits.names
    assert ("triton_hash_vectors" in waits.names) is (changes.get("full_attention_below") != "auto")


def test_waits_are_counted() -> None:
    with Waits() as waits:
        torch.zeros(1).item()
        torch.zeros(2).to("meta")
        torch.zeros(3).nonzero()
    assert waits.counts == {"_local_scalar_dense": 1, "_to_copy": 1, "nonzero": 1}


def test_seeds_on_a_device_stay_there() -> None:
    """Meta tensors have no values: whoever read one, or made a generator of it, would fail."""
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    table = functional.derive_seeds(seed, 3, 2)
    assert table.shape == (3, 2)
    rotations = functional.draw_rotations(table[1, 0], 2, 16, 3, (4, 6), torch.bfloat16, seed.device)
    assert rotations.shape == (2, 16, 3, 5)
    assert rotations.dtype == torch.bfloat16
    assert rotations.device == seed.device


def test_rotations_by_arithmetic_are_normal_and_belong_to_their_seed() -> None:
    drawn = randomness.normal(torch.tensor(5), (64, 16, 4, 65), torch.float32)
    assert torch.equal(drawn, randomness.normal(torch.tensor(5), (64, 16, 4, 65), torch.float32))
    other = randomness.normal(torch.tensor(6), (64, 16, 4, 65), torch.float32)
    flat, count = drawn.flatten().double(), drawn.numel()
    assert abs(flat.mean()) < 4 / count**0.5
    assert abs(flat.var() - 1) < 6 / count**0.5
    assert abs((flat**4).mean() - 3) < 0.1
    assert 4 < flat.abs().max() < 7
    for lag in (1, 2, 65):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 4 / count**0.5
    assert abs((flat * other.flatten()).mean()) < 4 / count**0.5
    assert randomness.normal(torch.tensor(5), (3,), torch.float32).equal(drawn.flatten()[:3])
