"""Cross-entropy: value and gradient are the definition's, whatever is ignored, however large the logits."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import loss as ops
from tests.ops.tools import generator, randn, untouched

pytest.importorskip("triton")

from flash_reformer.kernels.triton import loss as kernels
from tests.kernels.triton.spying import DTYPES, entered, spoiled

OPERATORS = torch.ops.flash_reformer
#: The factor of the loss in all gradients.
FACTOR = 1.75


def draw(N: int, V: int, dtype: torch.dtype, ignored: float = 0.3, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Logits and labels, some of which are to be ignored."""
    labels = torch.randint(V, (N,), generator=generator(N))
    labels[torch.rand(N, generator=generator(V)) < ignored] = ignore_index
    return randn(N, V, seed=N + V, dtype=dtype) * 4, labels


def value_and_gradient(call: object, logits: Tensor, labels: Tensor, **options: int) -> tuple[Tensor, Tensor]:
    assert callable(call)
    leaf = logits.detach().requires_grad_()
    value = call(leaf, labels, **options)
    (gradient,) = torch.autograd.grad(value * FACTOR, leaf)
    return value.detach(), gradient


def agree(logits: Tensor, labels: Tensor, **options: int) -> None:
    """As the fp64 definition on the same numbers: the value to fp32 rounding, the gradient to that of its dtype."""
    with spoiled(), entered() as names, untouched(logits=logits, labels=labels):
        value, gradient = value_and_gradient(kernels.cross_entropy_sum, logits, labels, **options)
    assert names == (["_loss_kernel", "_loss_backward_kernel"] if labels.numel() else [])
    plain = ops.cross_entropy_sum(logits, labels, **options)
    assert value.shape == plain.shape == ()
    assert value.dtype == plain.dtype == torch.float32
    assert gradient.shape == logits.shape
    assert gradient.dtype == logits.dtype
    exact_value, exact = value_and_gradient(ops.cross_entropy_sum, logits.double(), labels, **options)
    assert abs(value - exact_value) <= 1e-6 * exact_value.abs() + 1e-6
    # Below the normal numbers of its dtype an entry is rounded to a multiple of the smallest one.
    unit, smallest = torch.finfo(logits.dtype).eps, torch.finfo(logits.dtype).smallest_normal
    error = (gradient.double() - exact).abs()
    assert (error <= (0.51 * unit + 4e-6) * exact.abs() + unit * smallest + 3e-7).all()
    ignored = labels == options.get("ignore_index", -100)
    assert (gradient[ignored] == 0).all()


@given(
    N=st.integers(1, 24),
    V=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    ignore_index=st.sampled_from([-100, -1, 0, 3]),
    tile=st.sampled_from([(4, 2), (16, 16), (64, 16), (4096, 4096)]),
)
def test_law_loss_is_that_of_the_definition(
    N: int, V: int, dtype: torch.dtype, ignored: float, ignore_index: int, tile: tuple[int, int]
) -> None:
    """In many blocks of columns, in several, in one; the ignored label may be a class."""
    logits, labels = draw(N, V, dtype, ignored, ignore_index)
    with mock.patch.multiple(kernels, _TILE=tile[0], _MOST_COLUMNS=tile[1]):
        agree(logits, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "V"), [(50, 320), (33, 258), (3, 9001), (2, 4096), (4100, 1)])
def test_tiles_of_the_usual_size(N: int, V: int, dtype: torch.dtype) -> None:
    agree(*draw(N, V, dtype))


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.int8], ids=str)
def test_labels_of_every_width(kind: torch.dtype) -> None:
    logits, labels = draw(30, 11, torch.float32)
    agree(logits, labels.to(kind))
    agree(logits, labels.clamp(min=0).to(torch.uint8), ignore_index=0)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 1, 1, 5)], ids=str)
def test_leading_shapes_and_views(shape: tuple[int, ...]) -> None:
    logits, labels = draw(math.prod(shape), 7, torch.float32)
    logits, labels = logits.view(*shape, 7), labels.view(shape)
    agree(logits, labels)
    gaps = torch.full((7, 2, *shape), torch.nan)
    gaps[:, 1] = logits.movedim(-1, 0)
    agree(gaps[:, 1].movedim(0, -1), labels.mT.contiguous().mT)
    agree(logits[..., :1, :].expand_as(logits), labels)


def test_large_logits_lose_nothing() -> None:
    """What all logits of a row have in common cancels before anything is rounded."""
    logits, labels = draw(20, 33, torch.float32, ignored=0.0)
    logits = (logits * 8).round() / 8
    for common in (2.0**20, -(2.0**20)):
        near, far = (value_and_gradient(kernels.cross_entropy_sum, logits + shift, labels) for shift in (0.0, common))
        assert torch.equal(near[0], far[0])
        assert torch.equal(near[1], far[1])
    agree(logits * 50, labels)


def test_forbidden_classes() -> None:
    """A logit of -inf is a probability of 0, also where a whole block of columns is forbidden, the first or another."""
    logits, labels = draw(12, 40, torch.float32, ignored=0.0)
    for row, (start, stop) in enumerate([(0, 16), (0, 32), (16, 32), (20, 40), (39, 40), (0, 1)]):
        logits[row, start:stop] = -torch.inf
        labels[row] = 16 if stop == 40 else 39
        if (start, stop) in ((16, 32), (0, 1)):
            labels[row] = 2
    with mock.patch.multiple(kernels, _TILE=64, _MOST_COLUMNS=16):
        agree(logits, labels)


def test_what_is_ignored_may_be_anything() -> None:
    logits, labels = draw(6, 5, torch.float32, ignored=0.0)
    labels[1:4] = -100
    logits[1], logits[2], logits[3] = torch.nan, torch.inf, -torch.inf
    value, gradient = value_and_gradient(kernels.cross_entropy_sum, logits, labels)
    clean = [0, 4, 5]
    expected = value_and_gradient(kernels.cross_entropy_sum, logits[clean], labels[clean])
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient[clean], expected[1])
    assert (gradient[1:4] == 0).all()


@pytest.mark.parametrize("label", [5, 7, -1, -101, 2**40, -(2**40), 2**63 - 1, -(2**63)])
def test_a_label_that_is_no_class_makes_the_loss_no_number(label: int) -> None:
    """Nothing waits for the device to raise, and nothing is read outside of the logits."""
    logits, labels = draw(6, 5, torch.float32)
    labels[0], labels[2] = 1, label
    value, gradient = value_and_gradient(kernels.cross_entropy_sum, logits, labels)
    assert value.isnan()
    assert gradient[2].isnan().all()
    assert torch.isfinite(gradient[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_none_show(value: float) -> None:
    logits, labels = draw(6, 5, torch.float32, ignored=0.0)
    logits[2, 3] = value
    # numpy says what it thinks of such numbers; a device does not.
    with np.errstate(all="ignore"):
        assert kernels.cross_entropy_sum(logits, labels).isnan()
        logits[2] = -torch.inf
        assert kernels.cross_entropy_sum(logits, labels).isnan()


def test_nothing_to_lose() -> None:
    logits = torch.zeros(0, 5)
    agree(logits, torch.zeros(0, dtype=torch.int64))
    assert kernels.cross_entropy_sum(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64)) == 0


def test_every_run_gives_the_same() -> None:
    logits, labels = draw(200, 33, torch.bfloat16)
    one, two = (value_and_gradient(kernels.cross_entropy_sum, logits, labels) for _ in range(2))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_are_registered_as_torch_asks(dtype: torch.dtype) -> None:
    logits, labels = draw(6, 5, dtype)
    torch.library.opcheck(OPERATORS.triton_cross_entropy.default, (logits.requires_grad_(), labels, -100))
    losses, peaks, log_sums = kernels._cross_entropy(logits.detach(), labels, -100)
    given_losses = torch.full_like(losses, FACTOR)
    arguments = (given_losses, logits.detach(), labels, peaks, log_sums, -100)
    torch.library.opcheck(OPERATORS.triton_cross_entropy_backward.default, arguments)
