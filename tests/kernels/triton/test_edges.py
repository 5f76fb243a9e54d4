"""What is rare: empty tensors, facts laid out in other ways, no gradients at all, second ones."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_reformer.ops import attention as ops
from tests.kernels.cpu.test_edges import laid_out
from tests.kernels.cpu.tools import layout_of, make_mask, same, window
from tests.ops.tools import randn

pytest.importorskip("triton")

from flash_reformer.kernels.triton import attention
from tests.kernels.triton.attending import FORWARD, outcome, values, watched
from tests.kernels.triton.spying import DTYPES

B, H, R, T, D = 2, 2, 2, 18, 5
KINDS = ["lsh", "local", "exact"]


def call(kind: str, x: Tensor, mask: Tensor | None, room: Any = attention) -> tuple[Tensor, Tensor]:
    """Attention of one tensor that is queries, keys and values."""
    B, T, H, _ = x.shape
    if kind == "lsh":
        return room.lsh_attention(x, x, layout_of(B, H, R, T)[0], mask_BT=mask, **window(9, 1, 0))
    if kind == "local":
        return room.local_attention(x, x, x, mask, **window(9, 1, 0))
    return room.exact_attention(x, x, x, mask)


@pytest.mark.parametrize(("order", "kind"), [((1, 0, 2, 3), "int32"), ((3, 2, 1, 0), "int64")], ids=str)
def test_orders_and_buckets_may_lie_in_memory_as_they_like(order: tuple[int, ...], kind: str) -> None:
    positions, buckets = layout_of(B, H, R, T)
    buckets = buckets.to(getattr(torch, kind))
    inputs = {"qk_BTHD": randn(B, T, H, D, seed=1).half(), "v_BTHD": randn(B, T, H, D, seed=2).half()}
    options = {"attend_across_buckets": False, "allow_duplicate_attention": False}
    fixed = partial(attention.lsh_attention, mask_BT=make_mask("scattered", B, T), **window(9, 1, 0, **options))

    def run(positions: Tensor, buckets: Tensor) -> tuple[Tensor, Tensor]:
        return values(partial(fixed, sorted_positions_BHRT=positions, buckets_BHRT=buckets), inputs)

    plain = run(positions, buckets)
    for a, b in zip(run(laid_out(positions, order), laid_out(buckets, order)), plain, strict=True):
        assert torch.equal(a, b)
    one = positions[:1, :1], buckets[:1, :1]
    repeated = run(one[0].repeat(B, H, 1, 1), one[1].repeat(B, H, 1, 1))
    assert torch.equal(run(one[0].expand(B, H, R, T), one[1].expand(B, H, R, T))[0], repeated[0])
    assert not torch.equal(repeated[0], plain[0])


def test_buckets_are_looked_at_only_within_buckets() -> None:
    order, buckets = layout_of(B, H, R, T)
    inputs = {"qk_BTHD": randn(B, T, H, D, seed=1).half(), "v_BTHD": randn(B, T, H, D, seed=2).half()}
    fixed = partial(attention.lsh_attention, sorted_positions_BHRT=order, **window(9, 1, 0))
    across = values(fixed, inputs)[0]
    assert torch.equal(values(partial(fixed, buckets_BHRT=buckets), inputs)[0], across)
    within = partial(fixed, attend_across_buckets=False)
    narrow = values(partial(within, buckets_BHRT=buckets), inputs)[0]
    far = (buckets.int() + 1) * 2**20
    assert torch.equal(values(partial(within, buckets_BHRT=far), inputs)[0], narrow)
    assert not torch.equal(narrow, across)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_may_lie_in_memory_as_they_like(kind: str) -> None:
    x, mask = randn(B, T, H, D, seed=1).half(), make_mask("scattered", B, T)
    assert mask is not None
    plain = call(kind, x, mask)[0]
    assert torch.equal(call(kind, x, laid_out(mask, (1, 0)))[0], plain)
    assert torch.equal(call(kind, x, mask[1:].expand(B, T))[0], call(kind, x, mask[1:].repeat(B, 1))[0])
    assert not torch.equal(plain, call(kind, x, None)[0])


@pytest.mark.parametrize(("B", "T"), [(0, 18), (2, 0)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_comes_of_nothing(kind: str, B: int, T: int) -> None:
    """No rows, or rows of no tokens: empty results and gradients."""
    x = torch.zeros(B, T, H, D, requires_grad=True)
    with watched(set()):
        out, lse = (
            call(kind, x, torch.ones(B, T, dtype=torch.bool))
            if kind != "lsh"
            else attention.lsh_attention(x, x, torch.zeros(B, H, R, T, dtype=torch.int64), **window(9, 1, 0))
        )
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert out.shape == gradient.shape == x.shape
    assert lse.shape == ((B, H, R, T) if kind == "lsh" else (B, H, T))


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradients_the_values_are_the_same(kind: str) -> None:
    """And no kernel of the backward runs, nor is anything that it would need kept for it."""
    x = randn(B, T, H, D, seed=1).half()
    out, lse = call(kind, x.clone().requires_grad_(), None)
    assert out.requires_grad
    assert not lse.requires_grad
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode, watched(FORWARD):
            plain, plain_lse = call(kind, x, None)
        assert torch.equal(plain, out)
        assert torch.equal(plain_lse, lse)
        assert plain.grad_fn is None


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind: str) -> None:
    """Attention has none, and says so instead of leaving a part of them out."""
    x = randn(1, T, 1, D, seed=1).half().requires_grad_()
    (gradient,) = torch.autograd.grad(call(kind, x, None)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_results_are_memory_of_their_own(kind: str, dtype: torch.dtype) -> None:
    x = randn(1, T, 1, D, seed=1).to(dtype).requires_grad_()
    out, lse = call(kind, x, None)
    (gradient,) = torch.autograd.grad(out, x, torch.ones_like(out))
    places = [tensor.untyped_storage().data_ptr() for tensor in (x, out, lse, gradient)]
    assert len(set(places)) == 4
    # The backward reads the output as it was.
    assert out.is_contiguous()
    assert gradient.is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_may_lie_in_memory_as_they_like(kind: str) -> None:
    """The gradient of the output by stride 0, as of a sum; transposed."""
    x = randn(1, T, H, D, seed=1).half()

    def gradient(d_out: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(call(kind, leaf, None)[0], leaf, d_out)[0]

    one = torch.ones(1, 1, 1, 1, dtype=torch.float16).expand(1, T, H, D)
    assert torch.equal(gradient(one), gradient(one.contiguous()))
    d_out = randn(1, T, H, D, seed=3).half()
    assert torch.equal(gradient(laid_out(d_out, (0, 2, 3, 1))), gradient(d_out))


@pytest.mark.parametrize("kind", KINDS)
def test_values_may_be_of_another_dtype(kind: str) -> None:
    """Outputs take the dtype of the values, gradients that of their inputs, head masks any."""
    x, v = randn(1, T, H, D, seed=1, dtype=torch.float32), randn(1, T, H, D, seed=2, dtype=torch.bfloat16)
    heads, (order, _) = torch.tensor([0.5, -2.0], dtype=torch.float64), layout_of(1, H, R, T)

    def of(room: Any, x: Tensor, v: Tensor) -> Tensor:
        if kind == "lsh":
            return room.lsh_attention(x, v, order, head_mask_H=heads, **window(9, 1, 0))[0]
        if kind == "local":
            return room.local_attention(x, x, v, head_mask_H=heads, **window(9, 1, 0))[0]
        return room.exact_attention(x, x, v, head_mask_H=heads)[0]

    leaves = x.clone().requires_grad_(), v.clone().requires_grad_()
    ours, theirs = of(attention, *leaves), of(ops, x, v)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours.double() - theirs.double()).abs().max() <= 0.02 * theirs.double().abs().max()
    gradients = torch.autograd.grad(ours.sum(), leaves)
    assert [gradient.dtype for gradient in gradients] == [x.dtype, v.dtype]


def test_the_head_mask_alone_has_a_gradient_too() -> None:
    """Queries, keys and values frozen: only the factors of the heads learn, and no kernel of the backward runs."""
    x, heads = randn(1, T, H, D, seed=1).half(), torch.tensor([0.5, -2.0]).half().requires_grad_()
    with watched(FORWARD):
        out, _ = attention.exact_attention(x, x, x, head_mask_H=heads)
        (gradient,) = torch.autograd.grad(out.sum(), heads)
    expected = ops.exact_attention(x.double(), x.double(), x.double())[0].sum((0, 1, 3))
    assert (gradient.double() - expected).abs().max() < 0.05


def test_everything_is_watched() -> None:
    """The checks of the other tests: an empty tensor that stays empty shows, as does a definition that is called."""
    x = {"x": randn(1, T, 1, D, seed=1).half()}
    with pytest.raises(AssertionError, match="called the definition"):
        outcome(lambda x: ops.exact_attention(x, x, x), x)
    with pytest.raises(AssertionError, match="ran"):
        outcome(lambda x: (x * 2, x), x)
    assert same(outcome(lambda x: call("local", x, None), x), outcome(lambda x: call("local", x, None), x))
