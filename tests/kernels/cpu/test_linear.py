"""A linear map as a convolution: values and every gradient by name."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_reformer.kernels.cpu import linear as kernels
from flash_reformer.ops import linear as ops
from tests.kernels.cpu.tools import error
from tests.ops.tools import randn

SHAPES = [(7,), (1, 7), (13, 7), (2, 9, 7), (2, 3, 5, 7), (2, 1, 3, 4, 7), (300, 7)]


@pytest.fixture(params=["at once", "in pieces"], autouse=True)
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done with results too large for the heap is done with small ones too."""
    if request.param == "in pieces":
        monkeypatch.setattr(kernels, "_LARGE", 0)
        monkeypatch.setattr(kernels, "_PIECE", 40)


def results(linear: object, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    assert callable(linear)
    out = linear(*inputs.values())
    gradients = torch.autograd.grad(out, list(inputs.values()), randn(*out.shape, seed=9, dtype=out.dtype))
    return {"out": out, **{f"d_{name}": x for name, x in zip(inputs, gradients, strict=True)}}


def agree(inputs: dict[str, Tensor]) -> None:
    exact = results(ops.linear, {name: x.detach().double().requires_grad_() for name, x in inputs.items()})
    plain, actual = results(ops.linear, inputs), results(kernels.linear, inputs)
    unit = torch.finfo(plain["out"].dtype).eps
    for name, value in exact.items():
        assert actual[name].shape == value.shape
        assert actual[name].dtype == plain[name].dtype
        ours, theirs = error(actual[name], value, name), error(plain[name], value, name)
        assert ours <= 3 * theirs + 8 * unit, f"{name}: error {ours:.3g}, torch's {theirs:.3g}"


def inputs_of(shape: tuple[int, ...], outputs: int, bias: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = {"x": randn(*shape, seed=1, dtype=dtype), "weight": randn(outputs, shape[-1], seed=2, dtype=dtype)}
    if bias:
        inputs["bias"] = randn(outputs, seed=3, dtype=dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], outputs: int, bias: bool, dtype: torch.dtype) -> None:
    agree(inputs_of(shape, outputs, bias, dtype))


@pytest.mark.parametrize("sizes", [(512, 128, 128), (1000, 96, 33)], ids=str)
def test_sizes_for_which_it_is_made(sizes: tuple[int, int, int]) -> None:
    rows, width, outputs = sizes
    agree(inputs_of((rows, width), outputs, True, torch.float32))


@pytest.mark.parametrize("bias", [False, True])
def test_views(bias: bool) -> None:
    """Rows and weights that do not lie one after the other: transposed, with gaps, expanded."""
    plain = inputs_of((6, 9, 8), 5, bias, torch.float32)
    wide, tall = randn(8, 6, 9, seed=4, dtype=torch.float32), randn(8, 5, seed=5, dtype=torch.float32)
    gaps = torch.full((6, 9, 17), torch.nan)
    gaps[..., 1::2] = plain["x"].detach()
    for x in (wide.permute(1, 2, 0), gaps[..., 1::2], plain["x"].detach()[:1].expand(6, 9, 8)):
        agree({**plain, "x": x.detach().requires_grad_()})
    agree({**plain, "weight": tall.T.detach().requires_grad_()})


def test_inputs_that_need_no_gradient() -> None:
    """A frozen weight with a live input, and the first layer of all, whose input needs none."""
    inputs = inputs_of((4, 9, 8), 5, True, torch.float32)
    everything = results(kernels.linear, inputs)
    d_out = randn(4, 9, 5, seed=9, dtype=torch.float32)
    for name in inputs:
        mine = {other: x.detach().requires_grad_(other == name) for other, x in inputs.items()}
        (gradient,) = torch.autograd.grad(kernels.linear(*mine.values()), mine[name], d_out)
        assert torch.equal(gradient, everything[f"d_{name}"])


def test_the_result_is_laid_out_like_torchs() -> None:
    x, weight = randn(2, 30, 8, seed=1, dtype=torch.float32), randn(16, 8, seed=2, dtype=torch.float32)
    out = kernels.linear(x, weight)
    assert out.is_contiguous()
    assert out.untyped_storage().data_ptr() not in (x.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr())
