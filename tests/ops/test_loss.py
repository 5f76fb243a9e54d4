"""Losses against sums written out, in every dtype."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flash_reformer.ops import loss
from tests.ops.tools import DTYPES, HALF, TOLERANCE, generator, gradients, randn, untouched

V = 7


def cross_entropy(logits_XV: Tensor, labels_X: Tensor, ignore_index: int = -100) -> Tensor:
    total = torch.zeros((), dtype=logits_XV.dtype)
    for row, label in zip(logits_XV.reshape(-1, logits_XV.shape[-1]), labels_X.flatten().tolist(), strict=True):
        if label != ignore_index:
            top = row.detach().max()
            total = total + top + torch.log(sum(torch.exp(x - top) for x in row)) - row[label]
    return total


def binary_cross_entropy(logits_X: Tensor, targets_X: Tensor) -> Tensor:
    total = torch.zeros((), dtype=logits_X.dtype)
    for x, y in zip(logits_X.flatten(), targets_X.flatten(), strict=True):
        total = total - y * -torch.log1p(torch.exp(-x)) - (1 - y) * (-x - torch.log1p(torch.exp(-x)))
    return total


def squared_error(predictions_X: Tensor, targets_X: Tensor) -> Tensor:
    total = torch.zeros((), dtype=predictions_X.dtype)
    for x, y in zip(predictions_X.flatten(), targets_X.flatten(), strict=True):
        total = total + (x - y) * (x - y)
    return total


def labels_of(*shape: int, seed: int = 5) -> Tensor:
    labels = torch.randint(V, shape, generator=generator(seed))
    return labels.masked_fill(torch.rand(shape, generator=generator(seed + 1)) < 0.3, -100)


CASES = {
    "cross_entropy_sum": (cross_entropy, randn(2, 11, V, seed=1), labels_of(2, 11)),
    "binary_cross_entropy_sum": (binary_cross_entropy, randn(3, 5, seed=2), randn(3, 5, seed=3).sigmoid()),
    "squared_error_sum": (squared_error, randn(13, seed=2), randn(13, seed=3)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_value_is_the_written_sum_in_at_least_fp32(name: str, dtype: torch.dtype) -> None:
    definition, logits, targets = CASES[name]
    logits = logits.to(dtype)
    result = getattr(loss, name)(logits, targets)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == wide
    assert result.shape == ()
    expected = definition(logits.double(), targets)
    assert abs(result.item() / expected.item() - 1) <= TOLERANCE[wide]
    assert expected > 1


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str) -> None:
    definition, logits, targets = CASES[name]
    logits = logits.clone().requires_grad_()
    inputs = {"logits": logits}
    actual = gradients((getattr(loss, name)(logits, targets),), inputs)["logits"]
    expected = gradients((definition(logits, targets),), inputs)["logits"]
    assert (actual - expected).abs().max() <= 1e-10
    assert actual.abs().max() > 1e-2
    assert torch.autograd.gradcheck(lambda x: getattr(loss, name)(x, targets), logits)


def test_targets_of_another_dtype_are_widened_not_the_loss_narrowed() -> None:
    predictions, targets = randn(13, seed=2), randn(13, seed=3).bfloat16()
    assert loss.squared_error_sum(predictions, targets).dtype == torch.float64
    exact = squared_error(predictions, targets.double()).item()
    assert abs(loss.squared_error_sum(predictions, targets).item() - exact) < 1e-10
    ones = torch.ones(13, dtype=torch.long)
    exact = binary_cross_entropy(predictions, ones).item()
    assert abs(loss.binary_cross_entropy_sum(predictions, ones).item() - exact) < 1e-10


def test_ignored_labels_take_no_part() -> None:
    _, logits, labels = CASES["cross_entropy_sum"]
    kept = labels != -100
    assert 0 < kept.sum() < labels.numel()
    alone = loss.cross_entropy_sum(logits[kept], labels[kept])
    assert abs(loss.cross_entropy_sum(logits, labels) - alone) < 1e-10
    other = torch.where(kept.unsqueeze(-1), logits, logits * 7 + 3)
    assert loss.cross_entropy_sum(other, labels) == loss.cross_entropy_sum(logits, labels)


def test_another_ignore_index() -> None:
    _, logits, labels = CASES["cross_entropy_sum"]
    labels = labels.clamp(min=0)
    result = loss.cross_entropy_sum(logits, labels, ignore_index=0)
    assert abs(result - cross_entropy(logits, labels, ignore_index=0)) < 1e-10
    assert result < loss.cross_entropy_sum(logits, labels)


def test_nothing_but_ignored_labels_is_zero_with_zero_gradient() -> None:
    """A sum has no division by the number of labels, so an empty one is 0, not NaN."""
    logits = randn(3, V, seed=1).requires_grad_()
    result = loss.cross_entropy_sum(logits, torch.full((3,), -100))
    (grad,) = torch.autograd.grad(result, logits)
    assert result.item() == 0.0
    assert (grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_stay_finite(dtype: torch.dtype) -> None:
    logits = torch.tensor([[3e4, -3e4, 0.0], [-3e4, -3e4, -3e4]], dtype=dtype)
    sure = loss.cross_entropy_sum(logits[:1], torch.tensor([0]))
    assert sure.item() == 0.0
    assert abs(loss.cross_entropy_sum(logits[1:], torch.tensor([2])).item() - math.log(3)) < 1e-6
    wrong = loss.binary_cross_entropy_sum(logits[0, :2], torch.tensor([0.0, 1.0]))
    assert abs(wrong.item() / (logits[0, 0].double() - logits[0, 1].double()).item() - 1) < 1e-6


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_long_sums_do_not_saturate_in_half_precision(dtype: torch.dtype) -> None:
    """70,000 times ln 2 is beyond fp16, and beyond where bf16 can still count."""
    total = loss.cross_entropy_sum(torch.zeros(70_000, 2, dtype=dtype), torch.zeros(70_000, dtype=torch.long))
    assert abs(total.item() / (70_000 * math.log(2)) - 1) < 1e-4


def test_writes_nothing() -> None:
    for name, (_, logits, targets) in CASES.items():
        with untouched(logits=logits, targets=targets):
            getattr(loss, name)(logits, targets)
