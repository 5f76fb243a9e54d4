"""Long inputs go through a layer and its loss in pieces, and streams are written over: nobody can tell.

Limits are lowered here, so that short inputs count as long ones. Plain autograd of the same blocks stays the judge.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_reformer import buffers, reversible
from flash_reformer.layers import block
from flash_reformer.layers.attention import ReformerAttention
from tests.layers.tools import (
    BATCH,
    MIXES,
    assert_gradients_match,
    assert_pair_agrees,
    gradients,
    make_batch,
    make_mask,
    make_model,
    make_pair,
    relative_error,
    take_step,
)

EXACT = 1e-9


@pytest.fixture
def in_pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seven positions or so at a time; the list gets the length of every piece that leaves an attention layer."""
    seen: list[int] = []
    leave = ReformerAttention.leave

    def watched(self: ReformerAttention, mixed: Tensor) -> Tensor:
        seen.append(mixed.shape[1])
        return leave(self, mixed)

    monkeypatch.setattr(block, "_WIDE_ENOUGH", BATCH * 17 * 7)
    monkeypatch.setattr(ReformerAttention, "leave", watched)
    return seen


def loss_alone(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs, return_logits=False).loss


@pytest.mark.parametrize("mix", MIXES)
def test_gradients_are_those_of_plain_autograd(mix: str, in_pieces: list[int]) -> None:
    pair = make_pair(torch.float64, attn_layers=MIXES[mix], chunk_size_lm_head=5)
    batch = {**make_batch(47), "attention_mask": make_mask("scattered", 47)}
    assert_pair_agrees(pair, EXACT, loss_alone, **batch)
    assert max(in_pieces) < 10
    assert len(in_pieces) > 2 * len(MIXES[mix])


def test_a_head_mask_gets_its_gradient(in_pieces: list[int]) -> None:
    found = []
    for model in make_pair(torch.float64):
        mask = torch.tensor([0.5, 1.0, 0.2], dtype=torch.float64, requires_grad=True)
        take_step(model, loss=loss_alone, **make_batch(), head_mask=mask)
        found.append(mask.grad)
    assert in_pieces
    assert found[1].norm() > 0
    assert relative_error(*found) <= EXACT


def test_what_is_drawn_on_entering_is_drawn_again(in_pieces: list[int]) -> None:
    """Adapters drop out what goes into a projection, which is run once forward and twice on the way back."""
    pair = make_pair(torch.float64, attn_layers=["local", "local"])
    for model in pair:
        for layer in model.reformer.encoder.layers:
            own = layer.attention.self_attention
            own.query = nn.Sequential(nn.Dropout(0.4), own.query)
    assert_pair_agrees(pair, EXACT, loss_alone, **make_batch())
    assert in_pieces


def test_half_precision_goes_in_pieces_too(in_pieces: list[int]) -> None:
    results = []
    for model in make_pair():
        with torch.autocast("cpu", torch.bfloat16):
            results.append(take_step(model, loss=loss_alone, **make_batch()))
    ours, plain = results
    assert in_pieces
    assert torch.equal(ours.loss, plain.loss)
    for name, grad in plain.grads.items():
        assert relative_error(ours.grads[name], grad) <= 2e-2, name


def test_whoever_watches_attention_sees_it_whole(in_pieces: list[int]) -> None:
    model = make_model(torch.float64)
    shapes: list[Any] = []
    model.reformer.encoder.layers[1].attention.register_forward_hook(lambda m, a, out: shapes.append(out[0].shape[1]))
    take_step(model, **make_batch())
    assert shapes == [48, 48], "once forward and once on the way back"
    assert set(in_pieces) <= set(range(10))


def test_kept_states_and_their_gradients_are_not_written_over(in_pieces: list[int]) -> None:
    """The blocks between keep their streams to themselves; what a caller holds stays as it was."""
    found = []
    for model in make_pair(torch.float64):
        torch.manual_seed(5)
        out = model(**make_batch(), return_logits=False, output_hidden_states=True)
        before = [state.detach().clone() for state in out.hidden_states]
        inner = list(out.hidden_states)
        grads = torch.autograd.grad(out.loss, inner)
        copies = [grad.clone() for grad in grads]
        for state, copy in zip(out.hidden_states, before, strict=True):
            assert torch.equal(state, copy)
        found.append((before, copies))
    for ours, plain in zip(*found, strict=True):
        for value, expected in zip(ours, plain, strict=True):
            assert expected.norm() > 0
            assert relative_error(value, expected) <= EXACT


def test_a_graph_can_be_walked_twice(in_pieces: list[int]) -> None:
    """What is stored at the end of a chain is handed over only if autograd lets go of it."""
    model = make_model(torch.float64)
    torch.manual_seed(1)
    loss = loss_alone(model, **make_batch())
    loss.backward(retain_graph=True)
    first = gradients(model)
    model.zero_grad()
    loss.backward()
    for name, grad in first.items():
        assert torch.equal(gradients(model)[name], grad), name
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("pieces", [True, False], ids=["in pieces", "whole"])
def test_what_hooks_keep_is_not_written_over(pieces: bool, request: pytest.FixtureRequest) -> None:
    """A hook inside a layer may keep what it sees, in the forward and when the layer is run again."""
    if pieces:
        request.getfixturevalue("in_pieces")
    kept: list[tuple[Tensor, Tensor]] = []
    model = make_model(torch.float64)
    for layer in model.reformer.encoder.layers:
        for module in (layer.attention.layer_norm, layer.feed_forward):
            module.register_forward_hook(lambda m, args, out: kept.append((args[0], args[0].detach().clone())))
    take_step(model, loss=loss_alone, **make_batch())
    assert len(kept) > 12 if pieces else len(kept) == 12
    assert all(torch.equal(value, before) for value, before in kept)


@pytest.mark.parametrize("ours", [True, False], ids=["reversible", "plain"])
@pytest.mark.parametrize("length", [5, 48, 50])
def test_the_loss_alone_is_the_loss(ours: bool, length: int) -> None:
    """Without dropout the loss and its gradients are those that whole logits give."""
    off = dict.fromkeys(
        ("hidden_dropout_prob", "local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob"), 0.0
    )
    model = make_model(torch.float64, **off, reversible=ours, chunk_size_lm_head=7)
    batch = make_batch(length)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][0, 2:4] = -100
    alone, whole = take_step(model, loss=loss_alone, **batch), take_step(model, **batch)
    assert relative_error(alone.loss, whole.loss) <= 1e-14
    for name, grad in whole.grads.items():
        assert grad.norm() > 0 or "position" in name
        assert relative_error(alone.grads[name], grad) <= EXACT, name


def test_evaluation_makes_the_loss_alone_too() -> None:
    model = make_model(torch.float64, chunk_size_lm_head=7).eval()
    batch = make_batch(33)
    torch.manual_seed(0)
    with torch.no_grad():
        alone = model(**batch, return_logits=False)
    torch.manual_seed(0)
    whole = model(**batch)
    assert alone.logits is None
    assert relative_error(alone.loss, whole.loss) <= 1e-14


def test_a_private_chain_writes_over_its_own_streams_only() -> None:
    """Half the memory is the point of it: the streams of a block lie where those of the block before lay."""
    torch.manual_seed(0)
    places, model = [], make_model(torch.float64, attn_layers=["local"] * 4)
    advance = reversible.advance

    def watched(branch: Any, *, at: Tensor, x: Tensor, low: Tensor, reuse: bool) -> Any:
        result = advance(branch, at=at, x=x, low=low, reuse=reuse)
        places.append((x.data_ptr(), result[0].data_ptr()))
        return result

    reversible.advance, before = watched, reversible.advance
    try:
        take_step(model, loss=loss_alone, **make_batch())
    finally:
        reversible.advance = before
    assert len(places) == 8
    # The first block's are the embeddings, which are not the chain's.
    assert [x == y for x, y in places] == [False, False] + [True] * 6


def test_the_loss_alone_is_replayed_in_the_modes_it_had() -> None:
    """Between a forward and its backward somebody may call ``eval()``: the last dropout was drawn all the same."""
    found = []
    for model in make_pair(torch.float64, chunk_size_lm_head=5):
        model.lm_head.decoder = nn.Sequential(nn.Dropout(0.4), model.lm_head.decoder)
        torch.manual_seed(3)
        loss = loss_alone(model, **make_batch())
        if model.config.reversible:
            model.eval()
        loss.backward()
        assert model.training != model.config.reversible
        found.append(gradients(model))
    assert_gradients_match(*found, EXACT)


def test_what_a_head_drops_out_is_dropped_again() -> None:
    """Adapters drop out what goes into the projection to the vocabulary, and each piece of it is run again."""
    pair = make_pair(torch.float64, chunk_size_lm_head=5)
    for model in pair:
        model.lm_head.decoder = nn.Sequential(nn.Dropout(0.4), model.lm_head.decoder)
    assert_pair_agrees(pair, EXACT, loss_alone, **make_batch())


def test_many_pieces_in_half_precision_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hundredth gradient of a bias would be lost to rounding in a sum that is kept in bf16."""
    off = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "attn_layers": ["local"]}

    def grads(dtype: torch.dtype, pieces: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(block, "_WIDE_ENOUGH", BATCH * 17 if pieces else 2**21)
        model = make_model(dtype, **off, chunk_size_lm_head=1 if pieces else 0)
        return take_step(model, loss=loss_alone, **make_batch(96)).grads

    expected, whole, pieces = grads(torch.float32, False), grads(torch.bfloat16, False), grads(torch.bfloat16, True)
    for name, grad in expected.items():
        assert relative_error(pieces[name], grad) <= 1.5 * relative_error(whole[name], grad), name


def test_a_walk_that_stops_halfway_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of the last layers alone: the walk never comes to the chain's beginning."""
    monkeypatch.setattr(buffers, "_SMALL", 1)
    model = make_model(torch.float64)
    for close in (True, False):
        loss = model(**make_batch(), return_logits=close).loss
        torch.autograd.grad(loss, list(model.reformer.encoder.layers[2].parameters()))
        assert not buffers._streams.is_keeping
        assert not buffers._streams._kept.free
