"""Reversible layers do what plain autograd does: accumulate, repeat, refuse, and forget what is over."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.layers.tools import (
    assert_gradients_match,
    assert_pair_agrees,
    gradients,
    loss_of,
    make_batch,
    make_model,
    make_pair,
    relative_error,
    take_step,
    worst_error,
)

#: fp64, where a wrong random number cannot hide behind rounding.
EXACT = 1e-9


def assert_alike(run: Callable[[nn.Module], Any], **changes: Any) -> None:
    """``run`` leaves the same gradients in a reversible and a plain model."""
    results = []
    for model in make_pair(torch.float64, **changes):
        torch.manual_seed(7)
        run(model)
        results.append(gradients(model))
    assert_gradients_match(*results, EXACT)


def test_f6_two_forwards_before_one_backward() -> None:
    """Each backward replays its own forward, in whichever order and number they come."""

    def both(model: nn.Module) -> None:
        (loss_of(model, **make_batch(43)) + 2 * loss_of(model, **make_batch(seed=2), num_hashes=3)).backward()

    def crossed(model: nn.Module) -> None:
        losses = [loss_of(model, **make_batch(seed=seed)) for seed in range(3)]
        for i, factor in ((1, 1.0), (0, 2.0), (2, -3.0)):
            (factor * losses[i]).backward()

    assert_alike(both)
    assert_alike(crossed)


def test_f6_a_forward_in_between_may_be_in_another_mode() -> None:
    """A teacher is often the same model in ``eval()``; dropout of the first forward is replayed all the same."""

    def distil(model: nn.Module) -> None:
        logits = model(**make_batch()).logits
        model.eval()
        with torch.no_grad():
            target = model(**make_batch()).logits
        (logits - target).square().mean().backward()
        assert not any(module.training for module in model.modules())

    def train_after(model: nn.Module) -> None:
        loss = loss_of(model.eval(), **make_batch())
        model.train()
        loss.backward()
        assert all(module.training for module in model.modules())

    assert_alike(distil)
    assert_alike(distil, chunk_size_feed_forward=7)
    assert_alike(train_after)


def test_backward_in_eval() -> None:
    pair = [model.eval() for model in make_pair()]
    evaluated = assert_pair_agrees(tuple(pair), 1e-5, **make_batch())
    assert worst_error(evaluated.grads, take_step(pair[0].train(), **make_batch()).grads)[0] > 0.01


@pytest.mark.parametrize("part", ["attention", "feed_forward", "attention.self_attention"])
def test_a_part_may_train_while_the_model_does_not(part: str) -> None:
    pair = [model.eval() for model in make_pair(torch.float64)]
    evaluated = loss_of(pair[0], **make_batch())
    for model in pair:
        model.reformer.encoder.layers[1].get_submodule(part).train()
    step = assert_pair_agrees(tuple(pair), EXACT, **make_batch())
    assert not torch.equal(step.loss, evaluated)


def test_autograd_grad_returns_gradients() -> None:
    model = make_model()
    expected = take_step(model, **make_batch()).grads
    model.zero_grad()
    torch.manual_seed(7)
    loss = loss_of(model, **make_batch())
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    names = [name for name, _ in model.named_parameters()]
    assert_gradients_match(dict(zip(names, grads, strict=True)), expected, 1e-6)
    assert gradients(model) == {}
    # Of one parameter alone, in the middle of the chain.
    name = "reformer.encoder.layers.1.attention.self_attention.query_key.weight"
    (grad,) = torch.autograd.grad(loss, model.get_parameter(name))
    assert relative_error(grad, expected[name]) <= 1e-6


def test_gradients_accumulate() -> None:
    def accumulate(model: nn.Module) -> None:
        for seed in range(3):
            (loss_of(model, **make_batch(seed=seed)) / 3).backward()

    assert_alike(accumulate)


def test_the_graph_can_be_walked_twice() -> None:
    model = make_model()
    torch.manual_seed(7)
    loss = loss_of(model, **make_batch())
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[name], rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def _plain_parameter(model: nn.Module) -> nn.Parameter:
    return model.reformer.encoder.layers[1].feed_forward.dense.dense.weight


@pytest.mark.parametrize("reversible", [True, False])
def test_parameters_changed_in_place_before_the_backward_are_refused(reversible: bool) -> None:
    model = make_model(reversible=reversible)
    loss = loss_of(model, **make_batch())
    with torch.no_grad():
        _plain_parameter(model).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_replaced_before_the_backward_are_refused() -> None:
    """A replay with other weights would be wrong in silence."""
    model = make_model()
    loss = loss_of(model, **make_batch())
    layer = model.reformer.encoder.layers[1].feed_forward.dense.dense
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(RuntimeError, match="replaced between forward and backward"):
        loss.backward()

    model = make_model()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    loss = functional_call(model, weights, args=(), kwargs=make_batch()).loss
    with pytest.raises(RuntimeError, match="replaced between forward and backward"):
        loss.backward()


def test_double_backward_is_refused() -> None:
    model = make_model()
    loss = loss_of(model, **make_batch())
    parameter = _plain_parameter(model)
    (grad,) = torch.autograd.grad(loss, parameter, create_graph=True)
    assert grad.norm() > 0
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(grad.square().sum(), parameter)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_around_the_whole_model(use_reentrant: bool) -> None:
    def run(model: nn.Module) -> None:
        embeds = model.get_input_embeddings()(make_batch()["input_ids"])

        def whole(embeds: Tensor) -> Tensor:
            return model(inputs_embeds=embeds, labels=make_batch()["labels"]).loss

        checkpoint(whole, embeds, use_reentrant=use_reentrant).backward()

    assert_alike(run)
    # The same as without.
    model = make_model(torch.float64)
    torch.manual_seed(7)
    run(model)
    expected = take_step(make_model(torch.float64, reversible=False), **make_batch()).grads
    assert_gradients_match(gradients(model), expected, EXACT)


def test_saved_tensors_may_be_moved() -> None:
    def run(model: nn.Module) -> None:
        with torch.autograd.graph.save_on_cpu():
            loss = loss_of(model, **make_batch())
        loss.backward()

    assert_alike(run)


def enable_checkpointing(model: nn.Module, **kwargs: Any) -> None:
    """By its name of today; older versions of transformers know only the other one."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(kwargs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_of_plain_layers(use_reentrant: bool) -> None:
    plain = make_model(torch.float64, reversible=False)
    expected = take_step(plain, **make_batch())
    calls = []
    plain.reformer.encoder.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    enable_checkpointing(plain, use_reentrant=use_reentrant)
    step = take_step(plain, **make_batch())
    assert len(calls) == 2, "no layer was run again"
    assert torch.equal(step.loss, expected.loss)
    assert_gradients_match(step.grads, expected.grads, EXACT)


def test_gradient_checkpointing_of_reversible_layers_warns_once_and_changes_nothing() -> None:
    model = make_model()
    expected = take_step(model, **make_batch())
    enable_checkpointing(model, use_reentrant=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        step = take_step(model, **make_batch())
        take_step(model, **make_batch())
    assert len(caught) == 1
    assert "gradient checkpointing has no effect on reversible layers" in str(caught[0].message)
    assert torch.equal(step.loss, expected.loss)
    assert worst_error(step.grads, expected.grads)[0] == 0.0


def test_head_mask_gets_a_gradient() -> None:
    """Right also where nothing else asks for one."""
    grads = []
    for frozen in (False, True):
        for model in make_pair(torch.float64):
            model.requires_grad_(not frozen)
            mask = torch.rand(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
            take_step(model, **make_batch(), head_mask=mask)
            grads.append(mask.grad)
    assert grads[0].abs().min() > 0
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], rtol=EXACT, atol=0)


def test_attentions_carry_gradients() -> None:
    def loss(model: nn.Module, **inputs: Any) -> Tensor:
        output = model(**inputs, output_attentions=True)
        assert len(output.attentions) == 3
        weights = [torch.linspace(0, 1, probs.numel()).view(probs.shape) for probs in output.attentions]
        return sum((probs * w).sum() for probs, w in zip(output.attentions, weights, strict=True)) + output.loss

    pair = make_pair(torch.float64)
    with_probs = assert_pair_agrees(pair, EXACT, loss, **make_batch())
    name = "reformer.encoder.layers.2.attention.self_attention.query.weight"
    assert relative_error(with_probs.grads[name], take_step(pair[0], **make_batch()).grads[name]) > 0.01


def test_a_block_may_stand_twice_in_the_stack() -> None:
    def tie(model: nn.Module) -> None:
        layers = model.reformer.encoder.layers
        layers[3] = layers[1]
        layers[2] = layers[0]

    pair = make_pair(torch.float64, attn_layers=["local", "lsh"] * 2)
    untied = take_step(pair[0], **make_batch())
    for model in pair:
        tie(model)
    tied = assert_pair_agrees(pair, EXACT, **make_batch())
    assert not torch.equal(tied.loss, untied.loss)
    assert len(tied.grads) < len(untied.grads)


def test_tied_weights_of_different_layers() -> None:
    pair = make_pair(torch.float64, attn_layers=["local", "lsh"] * 2)
    for model in pair:
        layers = model.reformer.encoder.layers
        layers[2].feed_forward.dense.dense.weight = layers[0].feed_forward.dense.dense.weight
    assert_pair_agrees(pair, EXACT, **make_batch())
