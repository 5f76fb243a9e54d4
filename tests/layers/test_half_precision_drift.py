"""Half precision: what the backward rebuilds, at depth, and training under a loss scale that overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.mixed_precision import PRECISIONS, drift
from flash_reformer import branches, functional
from flash_reformer.residual import add_in_pieces
from tests.layers.judges import rebuilt
from tests.layers.tools import (
    assert_gradients_match,
    gradients,
    make_batch,
    make_model,
    make_pair,
    relative_error,
    take_step,
)

#: Root mean square, largest difference and gradient, all relative, at 24 layers. Streams in half precision drift.
BOUNDS = {
    "bfloat16 model and streams": (5e-2, 3e-1, 2e-1),
    "float16 model and streams": (3e-3, 2e-2, 1e-2),
}
EXACT = (1e-6, 1e-5, 1e-5)


@pytest.mark.parametrize("name", [name for name, *_ in PRECISIONS])
def test_drift_is_bounded_at_depth(name: str) -> None:
    (found,) = [each for each in PRECISIONS if each[0] == name]
    _, dtype, loss, changes = found
    measured = drift(dtype, loss, 24, **changes)
    for key, bound in zip(("rms", "max", "gradient"), BOUNDS.get(name, EXACT), strict=True):
        assert measured[key] <= bound, measured
    if name in BOUNDS:
        assert measured["rms"] > 0, "streams in half precision drift: a zero would mean that nothing was compared"


def test_streams_without_low_parts_would_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured above as nothing is seen as soon as rounding is forgotten."""

    def forgetful(*args: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        result, lost = add_in_pieces(*args, **named)
        return result, lost.zero_()

    monkeypatch.setattr(branches, "add_in_pieces", forgetful)
    model = make_model(attn_layers=["local", "lsh"] * 3, initializer_range=0.2)
    pairs = [pair for layer in rebuilt(model, **make_batch()) for pair in layer]
    assert len(pairs) == 12
    assert 1e-8 < max(relative_error(again, first) for first, again in pairs) < 1e-4


class Scaled:
    """Steps under fp16 autocast with a loss scale, as the documentation of torch writes them."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)

    def backward(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = self.model(**make_batch()).loss
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step(self) -> float:
        loss = self.backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.item()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_scaled_loss_has_plain_autograds_gradients() -> None:
    pair = [Scaled(model, 2.0**12) for model in make_pair(attn_layers=["local", "lsh"] * 3)]
    losses = [each.backward() for each in pair]
    assert torch.equal(*losses)
    grads, expected = (gradients(each.model) for each in pair)
    assert_gradients_match(grads, expected, 1e-5, dict(pair[1].model.named_parameters()).keys())


def test_an_unscaled_gradient_is_that_of_fp32_up_to_what_fp16_is_worth() -> None:
    half = Scaled(make_model(full_attention_below=96).eval(), 2.0**12)
    half.backward()
    half.scaler.unscale_(half.optimizer)
    grads = gradients(half.model)
    expected = take_step(make_model(full_attention_below=96).eval(), **make_batch()).grads
    assert 1e-6 < max(relative_error(grads[name], expected[name]) for name in expected) < 0.05


@pytest.mark.parametrize("reversible", [True, False])
def test_an_overflow_skips_a_step_and_training_goes_on(reversible: bool) -> None:
    run = Scaled(make_model(reversible=reversible), 2.0**60)
    before = weights(run.model)
    losses = [run.step()]
    assert any(not grad.isfinite().all() for grad in gradients(run.model).values()), "the scale must overflow"
    assert all(torch.equal(before[name], value) for name, value in weights(run.model).items())
    assert run.scaler.get_scale() == 2.0**59
    run.scaler.update(2.0**10)
    losses += [run.step() for _ in range(8)]
    assert all(grad.isfinite().all() for grad in gradients(run.model).values())
    assert not torch.equal(before["lm_head.decoder.weight"], run.model.lm_head.decoder.weight)
    assert losses[1] == losses[0], "the skipped step changed nothing"
    assert losses[-1] < losses[1] - 0.01
    assert run.scaler.get_scale() == 2.0**10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_in_half_precision_trains(dtype: torch.dtype) -> None:
    """``model.to(dtype)`` and SGD on its own weights, no autocast: the loss falls as that of fp32 does."""
    falls = []
    for kind in (dtype, torch.float32):
        model = make_model(kind).eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        losses = []
        for _ in range(6):
            optimizer.zero_grad()
            torch.manual_seed(7)
            loss = model(**make_batch()).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        falls.append(losses[0] - losses[-1])
    assert falls[1] > 0.1
    assert falls[0] == pytest.approx(falls[1], rel=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_exact_attention_keeps_its_precision_under_autocast(dtype: torch.dtype) -> None:
    """Scores and softmax are of at least fp32 whatever surrounds them (and -1e9 is no number of fp16)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 40, 3, 8, generator=generator).requires_grad_() for _ in range(3))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            out, lse = functional.exact_attention(query, key, value, causal=True, exclude_self=True)
            grads = torch.autograd.grad(out.square().sum(), [query, key, value])
        results.append([out, lse, *grads])
    for single, under in zip(*results, strict=True):
        torch.testing.assert_close(under, single)
