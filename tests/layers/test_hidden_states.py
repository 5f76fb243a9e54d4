"""Returned hidden states carry gradients: a loss may enter anywhere along the stack, alone or with others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.layers.tools import (
    LENGTH,
    assert_gradients_match,
    gradients,
    make_batch,
    make_call,
    make_mask,
    make_pair,
    relative_error,
    take_step,
)

EXACT, DEPTH = 1e-9, 4


def make_deep_pair() -> tuple[nn.Module, nn.Module]:
    return make_pair(torch.float64, attn_layers=["local", "lsh", "local", "lsh"])


def loss_on(*indices: int, last: bool = False, final: bool = False) -> Callable[..., Tensor]:
    """A loss on the hidden states of these indices, on the last hidden state, on the logits."""

    def loss(model: nn.Module, **inputs: Any) -> Tensor:
        output = model(**inputs, output_hidden_states=True)
        assert len(output.hidden_states) == DEPTH + 1
        # A different weight for each entry, so that no symmetry hides a swapped one.
        terms = [
            (state * torch.linspace(-1, 1 + index, state.numel()).view_as(state)).tanh().sum()
            for index, state in enumerate(output.hidden_states)
            if index in indices
        ]
        terms += [output.logits.square().mean()] if last else []
        terms += [output.loss] if final else []
        return sum(terms)

    return loss


def trained_by(index: int) -> int:
    """How many parameters lie below hidden state ``index``: the embeddings' and those of the layers up to it."""
    model = make_deep_pair()[0].reformer
    parts = [model.embeddings, *model.encoder.layers[:index]]
    return sum(len(list(part.parameters())) for part in parts)


@pytest.mark.parametrize("index", range(DEPTH + 1))
def test_a_loss_on_one_state_only(index: int) -> None:
    reversible, plain = (take_step(model, loss=loss_on(index), **make_batch()) for model in make_deep_pair())
    assert torch.equal(reversible.loss, plain.loss)
    # The plain model's own answer says which parameters matter; the reversible one may add zeros, no more.
    for name in reversible.grads.keys() - plain.grads.keys():
        assert reversible.grads.pop(name).abs().max() == 0
    assert len(plain.grads) == trained_by(index)
    assert_gradients_match(reversible.grads, plain.grads, EXACT)


@pytest.mark.parametrize("indices", [(1, 3), (0, 4), (2, 3), (0, 1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("final", [False, True])
def test_a_loss_on_several_states(indices: tuple[int, ...], final: bool) -> None:
    reversible, plain = (
        take_step(model, loss=loss_on(*indices, final=final), **make_batch(43), attention_mask=make_mask("left", 43))
        for model in make_deep_pair()
    )
    assert torch.equal(reversible.loss, plain.loss)
    assert_gradients_match(reversible.grads, plain.grads, EXACT)
    assert final or len(plain.grads) == trained_by(max(indices))


def test_a_state_in_between_together_with_the_loss() -> None:
    pair = make_deep_pair()
    both, alone = (take_step(pair[0], loss=loss, **make_batch()) for loss in (loss_on(2, final=True), loss_on(2)))
    expected = take_step(pair[1], loss=loss_on(2, final=True), **make_batch())
    assert_gradients_match(both.grads, expected.grads, EXACT, dict(pair[1].named_parameters()).keys())
    name = "reformer.encoder.layers.0.attention.output.dense.weight"
    assert relative_error(both.grads[name], alone.grads[name]) > 1e-3


def test_asking_for_states_changes_no_gradient() -> None:
    model = make_deep_pair()[0]
    with_states = take_step(model, loss=loss_on(final=True), **make_batch())
    without = take_step(model, **make_batch())
    assert torch.equal(with_states.loss, without.loss)
    assert_gradients_match(with_states.grads, without.grads, 1e-12)


def test_the_gradient_of_a_state_itself() -> None:
    """The stack goes on with the very states that it returns, so their own gradients can be asked for."""
    found = []
    for model in make_deep_pair():
        embeds = torch.randn(2, LENGTH, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.manual_seed(7)
        both, states, _ = model.reformer.encoder(embeds.requires_grad_(), make_call(), [None] * DEPTH, True, False)
        grads = torch.autograd.grad((both * torch.linspace(0, 1, both.numel()).view_as(both)).sum(), states)
        found.append({str(index): grad for index, grad in enumerate(grads)})
    assert len(found[0]) == DEPTH + 1
    assert_gradients_match(*found, EXACT)


def test_detached_states_cost_no_gradient() -> None:
    """A state that is only looked at leaves the others' gradients alone."""

    def loss(model: nn.Module, **inputs: Any) -> Tensor:
        output = model(**inputs, output_hidden_states=True)
        return output.hidden_states[2].detach().square().mean() + output.hidden_states[3].square().mean()

    reversible, plain = (take_step(model, loss=loss, **make_batch()) for model in make_deep_pair())
    assert_gradients_match(
        {name: grad for name, grad in reversible.grads.items() if name in plain.grads}, plain.grads, EXACT
    )


def test_states_from_two_forwards() -> None:
    results = []
    for model in make_deep_pair():
        torch.manual_seed(7)
        losses = [loss_on(i)(model, **make_batch(seed=i)) for i in (1, 3)]
        losses[1].backward()
        losses[0].backward()
        results.append(gradients(model))
    for name in results[0].keys() - results[1].keys():
        assert results[0].pop(name).abs().max() == 0
    assert_gradients_match(*results, EXACT)
