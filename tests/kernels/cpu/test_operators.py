"""Registered operators: what torch asks of them, and gradients against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_reformer.kernels.cpu import attention, hashing, linear, randomness, sorting  # noqa: F401  they register operators
from flash_reformer.ops import hashing as ops_hashing  # noqa: F401
from tests.kernels.cpu.tools import exact_blocks, layout_of, make_mask, seed, slab_scores, window
from tests.ops.tools import randn

OPERATORS = torch.ops.flash_reformer
B, T, H, D, R = 2, 12, 2, 4, 2
ORDER, BUCKETS = layout_of(B, H, R, T)
MASK = make_mask("right", B, T)


def draw(number: int, grad: bool = True, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(B, T, H, D, seed=number, dtype=dtype).requires_grad_(grad)


def cases(dtype: torch.dtype = torch.float32) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments of every operator by name; those of forwards need gradients."""
    q, k, v = (draw(number, dtype=dtype) for number in range(3))
    plain = [x.detach() for x in (q, k, v)]
    d_out, out = draw(4, False, dtype), draw(5, False, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    delta = randn(B * T * H, seed=11, dtype=wide)
    lse, lse_rounds = torch.zeros(B, H, T, dtype=wide), torch.zeros(B, H, R, T, dtype=wide)
    lsh = [
        (ORDER, None, None, None, 3, 1, 0, True, True, True, True, 0.0),
        (ORDER, BUCKETS, MASK, seed(3), 4, 1, 1, False, False, False, False, 0.5),
    ]
    local = [(None, None, 3, 1, 0, True, True, 0.0), (MASK, seed(3), 4, 1, 1, False, False, 0.5)]
    exact = [(None, None, True, False, 0.0), (MASK, seed(3), False, True, 0.5)]
    vectors, rotations = draw(6, False, dtype), randn(H, D, R, 5, seed=7, dtype=dtype)
    device = torch.device("cpu")
    weight, bias = randn(5, D, seed=8, dtype=dtype).requires_grad_(), randn(5, seed=9, dtype=dtype).requires_grad_()
    d_out_linear = randn(B, T, H, 5, seed=10, dtype=dtype)
    return {
        "cpu_lsh_attention": [(q, v, *rest) for rest in lsh],
        "cpu_lsh_attention_backward": [(d_out, delta, lse_rounds, plain[0], plain[2], *rest) for rest in lsh],
        "cpu_local_attention": [(q, k, v, *rest) for rest in local],
        "cpu_local_attention_backward": [(d_out, delta, lse, *plain, *rest) for rest in local],
        "cpu_exact_attention": [(q, k, v, *rest) for rest in exact],
        "cpu_exact_attention_backward": [(d_out, out, lse, *plain, *rest) for rest in exact],
        "cpu_row_dots": [(d_out, out)],
        "cpu_hash_vectors": [(vectors, rotations, [4, 6], MASK), (vectors, rotations, [10], None)],
        "cpu_sort_positions": [(BUCKETS,), (BUCKETS.int(),)],
        "cpu_dropout": [(q, 0.5, seed(3))],
        "cpu_linear": [(q, weight, bias), (q, weight, None)],
        "cpu_linear_backward": [
            (d_out_linear, plain[0], weight.detach(), True, True, True),
            (d_out_linear, plain[0], weight.detach(), False, True, False),
            (d_out_linear, plain[0], weight.detach(), True, False, False),
        ],
        "draw_rotations": [(seed(3), [H, D, R, 5], dtype, device)],
    }


def test_every_operator_is_below() -> None:
    registered = torch._C._dispatch_get_all_op_names()
    ours = {name.split("::")[1] for name in registered if name.startswith("flash_reformer::")}
    assert {name for name in ours if name.startswith("cpu_") or name == "draw_rotations"} == set(cases())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(cases()))
def test_operators_are_what_torch_asks_for(name: str, dtype: torch.dtype) -> None:
    """Schema, gradients' registration, fake tensors and AOT compilation, with static and dynamic shapes."""
    for arguments in cases(dtype)[name]:
        # Gradients of bf16 are compared too, by tolerances that opcheck takes from the dtype.
        torch.library.opcheck(getattr(OPERATORS, name).default, arguments)


SMALL_ORDER, SMALL_BUCKETS = layout_of(2, 1, 2, 6)
SMALL_MASK = torch.tensor([[True] * 6, [False, True, True, False, True, False]])


def small(number: int) -> Tensor:
    return randn(2, 6, 1, 3, seed=number).requires_grad_()


@pytest.mark.parametrize("scores", [None, 1])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": True},
        {"wrap_around": False, "mask_BT": SMALL_MASK},
        {"causal": True, "attend_across_buckets": False, "buckets_BHRT": SMALL_BUCKETS, "dropout_p": 0.3},
        {"allow_duplicate_attention": False, "mask_BT": SMALL_MASK},
    ],
    ids=["causal", "masked, no wrap", "within buckets, dropout", "union"],
)
def test_gradcheck_lsh(options: dict[str, Any], scores: int | None) -> None:
    def call(qk: Tensor, v: Tensor, heads: Tensor) -> Tensor:
        rest = {**window(1, 1, 0), **options, "dropout_seed": seed(3)}
        return attention.lsh_attention(qk, v, SMALL_ORDER, head_mask_H=heads, **rest)[0]

    heads = torch.tensor([-2.0], dtype=torch.float64, requires_grad=True)
    with slab_scores(scores):
        assert torch.autograd.gradcheck(call, (small(1), small(2), heads))


@pytest.mark.parametrize("wrap_around", [False, True])
@pytest.mark.parametrize("scores", [None, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_local(p: float, scores: int | None, wrap_around: bool) -> None:
    def call(*x: Tensor) -> Tensor:
        rest = {"causal": not wrap_around, "wrap_around": wrap_around, "dropout_p": p, "dropout_seed": seed(3)}
        return attention.local_attention(*x, SMALL_MASK, **window(1, 1, 1), **rest)[0]

    with slab_scores(scores):
        assert torch.autograd.gradcheck(call, (small(1), small(2), small(3)))


@pytest.mark.parametrize("exclude_self", [False, True])
@pytest.mark.parametrize("scores", [None, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_exact(p: float, scores: int | None, exclude_self: bool) -> None:
    def call(*x: Tensor) -> Tensor:
        rest = {"causal": True, "exclude_self": exclude_self, "dropout_p": p, "dropout_seed": seed(3)}
        return attention.exact_attention(*x, SMALL_MASK, **rest)[0]

    with exact_blocks(scores, 2):
        assert torch.autograd.gradcheck(call, (small(1), small(2), small(3)))


def test_gradcheck_dropout() -> None:
    assert torch.autograd.gradcheck(lambda x: randomness.dropout(x, 0.4, seed(2)), small(1))
