"""What is rare: empty tensors, facts laid out in other ways, no gradients at all, second ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flash_reformer.kernels.cpu import attention, hashing, randomness
from flash_reformer.ops import attention as ops
from tests.kernels.cpu.every import NAMES, jobs
from tests.kernels.cpu.tools import exact_blocks, layout_of, make_mask, results, same, seed, slab_scores, window
from tests.ops.tools import randn

B, H, R, T, D = 2, 3, 2, 12, 5
EVERYTHING = {"attend_across_buckets": False, "allow_duplicate_attention": False}


def laid_out(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """The same numbers and shape, with the dimensions in this order in memory."""
    inverse = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["default", "buckets and counts"])
@pytest.mark.parametrize("order", [(1, 0, 2, 3), (0, 1, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)], ids=str)
def test_orders_and_buckets_may_lie_in_memory_as_they_like(order: tuple[int, ...], options: dict[str, bool]) -> None:
    positions, buckets = layout_of(B, H, R, T)
    inputs = {"qk_BTHD": randn(B, T, H, D, seed=1), "v_BTHD": randn(B, T, H, D, seed=2)}
    mask = make_mask("scattered", B, T)

    def outcome(positions: Tensor, buckets: Tensor) -> dict[str, Tensor]:
        fixed = {"sorted_positions_BHRT": positions, "buckets_BHRT": buckets, "mask_BT": mask}
        return results(lambda **x: attention.lsh_attention(**x, **fixed, **window(3, 1, 1, **options)), inputs)

    plain = outcome(positions, buckets)
    for scores in (None, 1):
        with slab_scores(scores):
            assert same(outcome(laid_out(positions, order), buckets), outcome(positions, buckets))
            assert same(outcome(positions, laid_out(buckets, order)), outcome(positions, buckets))
    # One order for all rows and heads, repeated by stride 0.
    one = positions[:1, :1], buckets[:1, :1]
    assert same(
        outcome(one[0].expand(B, H, R, T), one[1].expand(B, H, R, T)),
        outcome(one[0].repeat(B, H, 1, 1), one[1].repeat(B, H, 1, 1)),
    )
    assert not same(plain, outcome(one[0].expand(B, H, R, T), one[1].expand(B, H, R, T)))


def kinds(T: int, B: int) -> dict[str, Callable[..., tuple[Tensor, Tensor]]]:
    order, _ = layout_of(B, H, R, T)
    return {
        "lsh": lambda x, mask: attention.lsh_attention(x, x, order, mask_BT=mask, **window(3, 1, 0)),
        "local": lambda x, mask: attention.local_attention(x, x, x, mask, **window(3, 1, 0)),
        "exact": lambda x, mask: attention.exact_attention(x, x, x, mask),
    }


@pytest.mark.parametrize("kind", ["lsh", "local", "exact"])
def test_masks_may_lie_in_memory_as_they_like(kind: str) -> None:
    call, x, mask = kinds(T, B)[kind], randn(B, T, H, D, seed=1), make_mask("scattered", B, T)
    assert mask is not None
    assert torch.equal(call(x, laid_out(mask, (1, 0)))[0], call(x, mask)[0])
    assert torch.equal(call(x, mask[1:].expand(B, T))[0], call(x, mask[1:].repeat(B, 1))[0])
    assert not torch.equal(call(x, mask)[0], call(x, None)[0])


@pytest.mark.parametrize(("B", "T"), [(0, 12), (2, 0)])
@pytest.mark.parametrize("kind", ["lsh", "local", "exact"])
def test_nothing_comes_of_nothing(kind: str, B: int, T: int) -> None:
    """No rows, or rows of no tokens: empty results and gradients."""
    x = torch.zeros(B, T, H, D, requires_grad=True)
    out, lse = kinds(T, B)[kind](x, torch.ones(B, T, dtype=torch.bool))
    assert out.shape == x.shape
    assert lse.shape == ((B, H, R, T) if kind == "lsh" else (B, H, T))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.shape == x.shape
    assert hashing.hash_vectors(x, torch.zeros(H, D, R, 3), [6]).shape == (B, H, R, T)
    assert randomness.dropout(x, 0.5, seed(1)).shape == x.shape


@pytest.mark.parametrize("name", NAMES)
def test_without_gradients_the_values_are_the_same(name: str) -> None:
    job = jobs()[name]
    expected = {key: x for key, x in job().items() if not key.startswith("d_")}
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert same(job._replace(learned=())(), expected)


@pytest.mark.parametrize("kind", ["lsh", "local", "exact"])
def test_second_derivatives_are_refused(kind: str) -> None:
    """Attention has none, and says so instead of leaving a part of them out."""
    x = randn(B, T, H, D, seed=1).requires_grad_()
    (gradient,) = torch.autograd.grad(kinds(T, B)[kind](x, None)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(gradient.square().sum(), x)


@pytest.mark.parametrize("kind", ["lsh", "local", "exact"])
def test_values_may_be_of_another_dtype(kind: str) -> None:
    """Outputs take the dtype of the values, gradients that of their inputs, head masks any."""
    x, v = randn(B, T, H, D, seed=1, dtype=torch.float32), randn(B, T, H, D, seed=2, dtype=torch.bfloat16)
    heads, (order, _) = torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64), layout_of(B, H, R, T)
    x, v = x.requires_grad_(), v.requires_grad_()

    def call(room: object) -> Tensor:
        if kind == "lsh":
            return room.lsh_attention(x, v, order, head_mask_H=heads, **window(3, 1, 0))[0]
        if kind == "local":
            return room.local_attention(x, x, v, head_mask_H=heads, **window(3, 1, 0))[0]
        return room.exact_attention(x, x, v, head_mask_H=heads)[0]

    with exact_blocks(50, 2):
        ours, theirs = call(attention), call(ops)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert (ours.double() - theirs.double()).abs().max() <= 0.02 * theirs.double().abs().max()
    assert [gradient.dtype for gradient in torch.autograd.grad(ours.sum(), (x, v))] == [x.dtype, v.dtype]
