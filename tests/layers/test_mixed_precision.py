"""Autocast and half-precision models: replayed as they ran, with residual streams in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.tools import (
    MIXES,
    Gradients,
    assert_gradients_match,
    gradients,
    make_batch,
    make_mask,
    make_model,
    make_pair,
    relative_error,
    take_step,
    worst_error,
)

HALF = [torch.bfloat16, torch.float16]


def autocast_step(model: nn.Module, inside: bool, **inputs: Any) -> tuple[Tensor, Gradients]:
    model.zero_grad()
    torch.manual_seed(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**inputs).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.parametrize("R", [1, 4])
@pytest.mark.parametrize("mix", MIXES)
def test_f10_the_replay_runs_under_the_same_autocast(mix: str, R: int, inside: bool) -> None:
    reversible, plain = make_pair(attn_layers=MIXES[mix], num_hashes=R)
    batch = {**make_batch(43), "attention_mask": make_mask("right", 43)}
    loss, grads = autocast_step(reversible, inside, **batch)
    plain_loss, expected = autocast_step(plain, inside, **batch)
    assert torch.equal(loss, plain_loss)
    assert_gradients_match(grads, expected, 2e-2, dict(plain.named_parameters()).keys())
    # Autocast did act, so a replay in fp32 would show: that error is not 0 either.
    assert worst_error(take_step(plain, **batch).grads, expected)[0] > 1e-3
    # As good as the replay is, it repeats the very same numbers; 2e-2 is what the contract allows.
    assert worst_error(grads, expected)[0] < 1e-5


def test_the_replay_follows_the_forward_and_not_what_surrounds_the_backward() -> None:
    model, seen = make_model(), []
    attention = model.reformer.encoder.layers[1].attention
    attention.register_forward_hook(lambda module, args, out: seen.append((torch.is_autocast_enabled("cpu"), out[0])))
    loss = model(**make_batch()).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss.backward()
        assert torch.is_autocast_enabled("cpu")
    (before, out), (after, again) = seen
    assert (before, after) == (False, False)
    assert out.norm() > 0
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)


def test_autocast_sees_the_second_forward_too() -> None:
    """Autocast caches cast weights; a copy made while gradients were off would cut the graph to the weight."""
    reversible, plain = make_pair()
    results = []
    for model in (reversible, plain):
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                model(**make_batch())
            (model(**make_batch()).loss + model(**make_batch(seed=2)).loss).backward()
        results.append(gradients(model))
    assert_gradients_match(*results, 2e-2, dict(plain.named_parameters()).keys())


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mix", MIXES)
def test_half_precision_models_keep_fp32_streams(mix: str, dtype: torch.dtype) -> None:
    """Then rebuilding is exact, and so are the gradients."""
    pair = make_pair(dtype, attn_layers=MIXES[mix])
    reversible, plain = (take_step(model, **make_batch()) for model in pair)
    assert torch.equal(reversible.loss, plain.loss)
    assert_gradients_match(reversible.grads, plain.grads, 1e-3)
    output = pair[0](**make_batch(), output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {torch.float32}
    assert output.logits.dtype == dtype
    assert all(grad.dtype == dtype for grad in reversible.grads.values())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 6e-2), (torch.float16, 6e-3)], ids=str)
def test_streams_may_be_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    """``residual_in_fp32=False``: the low parts keep the rebuilt stream within rounding of the stored one."""
    pair = make_pair(dtype, residual_in_fp32=False)
    reversible, plain = (take_step(model, **make_batch()) for model in pair)
    assert torch.equal(reversible.loss, plain.loss)
    assert_gradients_match(reversible.grads, plain.grads, tolerance)
    output = pair[0](**make_batch(), output_hidden_states=True)
    assert {state.dtype for state in output.hidden_states} == {dtype}


def test_fp64_stays_fp64() -> None:
    model = make_model(torch.float64)
    output = model(**make_batch(), output_hidden_states=True)
    assert {t.dtype for t in (output.loss, output.logits, *output.hidden_states)} == {torch.float64}


@pytest.mark.parametrize("R", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_f10_a_token_that_sees_only_itself_is_not_multiplied_by_rounds(dtype: torch.dtype, R: int) -> None:
    """Token 0 of a causal layer returns exactly its own value, in every dtype and for every number of rounds.

    Merging by ``exp(lse - logsumexp)`` in half precision instead returns R times it.
    """
    model = make_model(dtype, attn_layers=["lsh"], num_hashes=R).eval()
    attention = model.reformer.encoder.layers[0].attention.self_attention
    values, outputs = [], []
    attention.value.register_forward_hook(lambda module, args, out: values.append(out))
    attention.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    model(**make_batch())
    assert values[0][:, 0].abs().min() > 0
    assert torch.equal(outputs[0][:, 0], values[0][:, 0])
    # Later tokens do see others.
    assert not torch.equal(outputs[0][:, 20], values[0][:, 20])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_gradients_are_near_those_of_fp32(dtype: torch.dtype) -> None:
    """With the hash buckets of one chunk (exact attention), so that both attend to the same tokens."""
    half, single = make_model(dtype, full_attention_below=96), make_model(full_attention_below=96)
    # The dropout masks of a dtype are its own.
    grads, expected = (take_step(model.eval(), **make_batch()).grads for model in (half, single))
    errors = [relative_error(grads[name], expected[name]) for name in expected]
    assert 0 < max(errors) < 0.1
