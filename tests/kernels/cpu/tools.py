"""What the tests of the CPU kernels share: one comparison of a kernel with its definition, by dtype."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flash_reformer.kernels.cpu import _exact, _slabs
from tests.ops.tools import generator, randn

#: Given inputs by name, a kernel or a definition: output and log-sum-exp.
Call = Callable[..., tuple[Tensor, Tensor]]
HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32, torch.float64]
MASKS = ["none", "left", "right", "scattered", "whole row"]


def seed(number: int) -> Tensor:
    return torch.tensor(number)


def make_mask(kind: str, B: int, T: int) -> Tensor | None:
    """A mask ``[B, T]``, True at real tokens. Every kind but "none" hides something, in the last row at least."""
    if kind == "none":
        return None
    mask = torch.ones(B, T, dtype=torch.bool)
    if kind == "left":
        mask[-1, : T // 3 + 1] = False
    elif kind == "right":
        mask[0, T - T // 2 :] = False
        mask[-1, T - 1] = False
    elif kind == "scattered":
        mask = torch.rand(B, T, generator=generator(T)) < 0.6
        mask[-1, T // 2] = False
    else:
        assert kind == "whole row"
        mask[-1] = False
    return mask


def layout_of(B: int, H: int, R: int, T: int, num_buckets: int = 3) -> tuple[Tensor, Tensor]:
    """Random buckets ``[B, H, R, T]``, 16 bits wide, and the order they sort into."""
    buckets = torch.randint(num_buckets, (B, H, R, T), generator=generator(B + 10 * H + 100 * R + 1000 * T))
    return torch.sort(buckets, dim=-1, stable=True).indices, buckets.to(torch.int16)


def head_mask_of(H: int, dtype: torch.dtype) -> Tensor:
    """One factor per head, one of them negative, so that no absolute value passes."""
    return torch.tensor([0.5, -1.25, 2.0][:H], dtype=dtype)


def strided(x: Tensor) -> Tensor:
    """The same numbers as a view with gaps and its middle dimensions swapped; NaN wherever nothing may be read."""
    B, T, H, D = x.shape
    base = torch.full((B, H, T, 2 * D + 1), torch.nan, dtype=x.dtype)
    view = base.transpose(1, 2)[..., 1::2]
    view.copy_(x)
    return view


def results(call: Call, inputs: dict[str, Tensor], gaps: bool = False) -> dict[str, Tensor]:
    """Output, log-sum-exp and the gradient by every input, by name, under one fixed random gradient of the output."""
    leaves = {}
    for name, x in inputs.items():
        leaf = strided(x.detach()) if gaps and x.dim() == 4 else x.detach().clone()
        leaves[name] = leaf.requires_grad_()
    out, lse = call(**leaves)
    d_out = randn(*out.shape, seed=99, dtype=torch.float32).to(out.dtype)
    d_out = strided(d_out) if gaps else d_out
    gradients = torch.autograd.grad(out, list(leaves.values()), d_out)
    named = {f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def error(actual: Tensor, expected: Tensor, name: str) -> float:
    """The largest error: of log-sum-exps relative to each, as they may be -1e9; else relative to the largest entry.

    Below 1 it is absolute: the gradient of a row that sees one key is a difference of equal numbers, and what rounding
    leaves of it is no scale.
    """
    actual, expected = actual.double(), expected.double()
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs() if name == "lse" else expected.abs().amax()
    return ((actual - expected).abs() / scale.clamp(min=1.0)).max().item()


def assert_shaped(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape, f"{name}: {value.shape} is not {expected[name].shape}"
        assert value.dtype == expected[name].dtype, f"{name}: {value.dtype} is not {expected[name].dtype}"
        assert torch.isfinite(value).all(), f"{name} is not finite"


def assert_exact_parity(kernel: Call, definition: Call, inputs: dict[str, Tensor], gaps: bool = False) -> None:
    """In fp64: the definition's numbers and gradients up to rounding."""
    expected = results(definition, inputs)
    actual = results(kernel, inputs, gaps)
    assert_shaped(actual, expected)
    for name, value in expected.items():
        wrong = error(actual[name], value, name)
        assert wrong <= 1e-10, f"{name}: error {wrong:.3g}"


def assert_rounded_parity(
    kernel: Call, definition: Call, exact_inputs: dict[str, Tensor], dtype: torch.dtype, few: bool = True
) -> None:
    """In ``dtype``: not much further from the fp64 definition on the same numbers than the definition in ``dtype``.

    The largest error of a ``few`` numbers is a matter of luck, so there some roundings are let pass in any case.
    """
    inputs = {name: x.to(dtype) for name, x in exact_inputs.items()}
    truth = results(definition, {name: x.double() for name, x in inputs.items()})
    plain, actual = results(definition, inputs), results(kernel, inputs)
    assert_shaped(actual, plain)
    for name, value in truth.items():
        ours, theirs = error(actual[name], value, name), error(plain[name], value, name)
        # Log-sum-exps are fp32 in every dtype, and outputs are rounded once.
        unit = torch.finfo(torch.float32 if name == "lse" else dtype).eps
        factor = 2 if dtype in HALF and not name.startswith("d_") else 3
        units = 1 if dtype in HALF and (name == "out" or not few) else 8
        limit = factor * theirs + units * unit
        assert ours <= limit, f"{name} in {dtype}: error {ours:.3g}, the definition's {theirs:.3g}"


@contextmanager
def slab_scores(scores: int | None) -> Iterator[None]:
    """Slabs of so many scores inside the block; None leaves them as they are."""
    with mock.patch.object(_slabs, "SLAB_SCORES", _slabs.SLAB_SCORES if scores is None else scores):
        yield


@contextmanager
def exact_blocks(scores: int | None, fewest_queries: int = 1) -> Iterator[None]:
    """Blocks of exact attention of so many scores inside the block; None leaves them as they are."""
    if scores is None:
        yield
        return
    with mock.patch.multiple(_exact, _BLOCK_SCORES=scores, _FEWEST_QUERIES=fewest_queries):
        yield


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Equal bit for bit."""
    return all(torch.equal(a[name], b[name]) for name in a | b)


def window(C: int, before: int, after: int, **options: Any) -> dict[str, Any]:
    return {"chunk_length": C, "num_chunks_before": before, "num_chunks_after": after, **options}
