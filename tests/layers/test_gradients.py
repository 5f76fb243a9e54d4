"""Gradients with every dropout on: reversible layers against plain autograd of the same layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.layers.tools import (
    LENGTH,
    MIXES,
    TOLERANCE,
    assert_pair_agrees,
    make_batch,
    make_mask,
    make_pair,
    take_step,
    worst_error,
)

DTYPES = [torch.float32, torch.float64]
#: What changes in the configuration. Every case has LSH and local layers and every dropout.
OPTIONS: dict[str, dict[str, Any]] = {
    "wrap_around off": {"wrap_around": False},
    "own buckets only": {"lsh_attend_across_buckets": False},
    "keys count once": {"lsh_allow_duplicate_attention": False},
    "keys count once, own buckets, no wrap": {
        "lsh_allow_duplicate_attention": False,
        "lsh_attend_across_buckets": False,
        "wrap_around": False,
    },
    "exact below": {"full_attention_below": LENGTH},
    "no chunks": {"lsh_attn_chunk_length": None, "local_attn_chunk_length": None},
    "hash_seed": {"hash_seed": 11},
    "automatic buckets": {"num_buckets": None},
    "factorised buckets": {"num_buckets": [4, 6]},
    "learned positions": {"axial_pos_embds": False},
    "three axes": {"axial_pos_shape": (4, 4, 6), "axial_pos_embds_dim": (3, 4, 5)},
    "bidirectional": {"is_decoder": False, "lsh_num_chunks_after": 1, "local_num_chunks_after": 1},
    "two chunks before": {"lsh_num_chunks_before": 2, "local_num_chunks_before": 2},
    "own chunk only": {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0},
    "chunked feed-forward": {"chunk_size_feed_forward": 7},
    "chunked head": {"chunk_size_lm_head": 5},
    "relu": {"hidden_act": "relu"},
    "one head": {"num_attention_heads": 1, "attention_head_size": 13},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 2, 3, 4])
@pytest.mark.parametrize("mix", MIXES)
def test_f1_gradients_with_dropout_are_exact(mix: str, R: int, dtype: torch.dtype) -> None:
    pair = make_pair(dtype, attn_layers=MIXES[mix], num_hashes=R)
    assert_pair_agrees(pair, TOLERANCE[dtype], **make_batch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, dtype: torch.dtype) -> None:
    assert_pair_agrees(make_pair(dtype, **OPTIONS[option]), TOLERANCE[dtype], **make_batch())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["left", "right", "scattered"])
@pytest.mark.parametrize("length", [LENGTH, 43])
def test_masks_and_odd_lengths(length: int, kind: str, dtype: torch.dtype) -> None:
    """43 is padded to 48 inside the model; 7 does not divide it."""
    pair = make_pair(dtype, chunk_size_feed_forward=7)
    assert_pair_agrees(pair, TOLERANCE[dtype], **make_batch(length), attention_mask=make_mask(kind, length))


@pytest.mark.parametrize("length", [4, 5, 6, 7, 13, 96])
def test_short_odd_and_full_lengths(length: int) -> None:
    """The shorter ones fit one chunk of some or all layers, which then attend exactly."""
    pair = make_pair(attn_layers=["local", "lsh"])
    assert_pair_agrees(pair, TOLERANCE[torch.float32], **make_batch(length))


@pytest.mark.parametrize("num_hashes", [1, 2, 4])
def test_num_hashes_of_one_call(num_hashes: int) -> None:
    pair = make_pair(num_hashes=3)
    overridden = assert_pair_agrees(pair, TOLERANCE[torch.float32], **make_batch(), num_hashes=num_hashes)
    usual = take_step(pair[0], **make_batch())
    assert not torch.equal(overridden.loss, usual.loss)


def test_head_mask() -> None:
    pair = make_pair()
    mask = torch.tensor([[0.3, 1.0, 0.8], [1.0, 0.4, 0.7], [0.6, 0.9, 1.1]])
    masked = assert_pair_agrees(pair, TOLERANCE[torch.float32], **make_batch(), head_mask=mask)
    assert not torch.equal(masked.loss, take_step(pair[0], **make_batch()).loss)


def test_position_ids() -> None:
    positions = torch.randperm(96, generator=torch.Generator().manual_seed(3))[None, :43]
    assert_pair_agrees(make_pair(), TOLERANCE[torch.float32], **make_batch(43), position_ids=positions)


@pytest.mark.parametrize("depth", [6, 12])
def test_depth(depth: int) -> None:
    pair = make_pair(attn_layers=["local", "lsh"] * (depth // 2), initializer_range=0.2)
    assert_pair_agrees(pair, TOLERANCE[torch.float32], **make_batch())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_no_dropout_and_much_dropout(dropout: float) -> None:
    fields = ["hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob"]
    pair = make_pair(**dict.fromkeys(fields, dropout))
    assert_pair_agrees(pair, TOLERANCE[torch.float32], **make_batch())


def test_loss_without_logits() -> None:
    """The loss made chunk by chunk hands the same gradients to the reversible layers."""
    pair = make_pair()
    chunked = assert_pair_agrees(pair, TOLERANCE[torch.float32], **make_batch(), return_logits=False)
    whole = take_step(pair[0], **make_batch())
    assert worst_error(chunked.grads, whole.grads)[0] <= 1e-5


_SWITCH = st.booleans()


@settings(max_examples=40)
@given(
    layers=st.lists(st.sampled_from(["local", "lsh"]), min_size=1, max_size=4),
    num_hashes=st.integers(1, 4),
    length=st.integers(2, 61),
    mask=st.sampled_from([None, "left", "right", "scattered"]),
    chunk_size=st.sampled_from([0, 1, 7, 64]),
    seed=st.integers(0, 2**31),
    changes=st.fixed_dictionaries(
        {
            "wrap_around": _SWITCH,
            "lsh_attend_across_buckets": _SWITCH,
            "lsh_allow_duplicate_attention": _SWITCH,
            "full_attention_below": st.sampled_from([0, 20]),
            "hash_seed": st.sampled_from([None, 5]),
            "num_buckets": st.sampled_from([None, 6, [2, 4]]),
            "axial_pos_embds": _SWITCH,
            "is_decoder": _SWITCH,
            "lsh_attn_chunk_length": st.sampled_from([None, 4, 6]),
        }
    ),
)
def test_any_configuration(
    layers: list[str],
    num_hashes: int,
    length: int,
    mask: str | None,
    chunk_size: int,
    seed: int,
    changes: dict[str, Any],
) -> None:
    """In fp64, where nothing but a wrong formula or a wrong random number gives an error of 1e-9."""
    pair = make_pair(
        torch.float64, attn_layers=layers, num_hashes=num_hashes, chunk_size_feed_forward=chunk_size, **changes
    )
    batch = make_batch(length, seed)
    if mask is not None:
        batch["attention_mask"] = make_mask(mask, length)
    reversible, plain = (take_step(model, seed, **batch) for model in pair)
    assert torch.equal(reversible.loss, plain.loss)
    assert plain.grads.keys() == dict(pair[1].named_parameters()).keys()
    # Tiny cases have gradients that are zero but for rounding (a query that sees one key); they get no relative error.
    size = max(grad.norm() for grad in plain.grads.values())
    assert size > 0
    for name, grad in plain.grads.items():
        assert (reversible.grads[name] - grad).norm() <= 1e-9 * max(grad.norm(), 1e-6 * size), name


@pytest.mark.gpu
@pytest.mark.parametrize("mix", MIXES)
def test_f1_gradients_with_dropout_are_exact_on_a_gpu(mix: str) -> None:
    """There the masks of hidden dropout come from the device's generator, which is replayed too."""
    pair = tuple(model.to("cuda") for model in make_pair(attn_layers=MIXES[mix]))
    state = torch.cuda.get_rng_state()
    batch = {name: tensor.to("cuda") for name, tensor in make_batch().items()}
    assert_pair_agrees(pair, TOLERANCE[torch.float32], **batch)
    assert not torch.equal(torch.cuda.get_rng_state(), state)
