"""The registered operators of attention: what torch asks of them, and of functions that it compiles around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cpu.tools import layout_of, make_mask, seed, window
from tests.ops.tools import randn

pytest.importorskip("triton")

from flash_reformer.kernels.triton import attention
from tests.kernels.triton.attending import BACKWARD, FORWARD, watched

OPERATORS = torch.ops.flash_reformer
B, T, H, D, R = 2, 12, 1, 4, 2
ORDER, BUCKETS = layout_of(B, H, R, T)
MASK = make_mask("right", B, T)
#: Facts (order, buckets, mask, seed), then window, choices, scale, dropout and whether sums have one order.
LSH = {
    "plain": (ORDER, None, None, None, 6, 1, 0, True, True, True, True, True, 0.5, 0.0, True),
    "all": (ORDER, BUCKETS, MASK, seed(3), 6, 1, 0, False, True, False, False, False, 0.5, 0.5, False),
}
LOCAL = {
    "local": (None, None, MASK, seed(3), 6, 1, 0, True, False, True, True, True, 0.5, 0.5, True),
    "exact": (None, None, None, None, 12, 0, 0, True, False, True, True, True, 1.0, 0.0, True),
}
BF16, FP32 = torch.bfloat16, torch.float32


def forward_of(kind: str, dtype: torch.dtype) -> tuple[Any, ...]:
    q, k, v = (randn(B, T, H, D, seed=number, dtype=dtype).requires_grad_() for number in range(3))
    return (q, None, v, *LSH[kind]) if kind in LSH else (q, k, v, *LOCAL[kind])


CASES = [("plain", BF16), ("all", FP32), ("exact", BF16)]


@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_forwards_are_what_torch_asks_for(kind: str, dtype: torch.dtype) -> None:
    """Schema, gradients' registration, fake tensors and AOT compilation, with static and dynamic shapes."""
    torch.library.opcheck(OPERATORS.triton_attention.default, forward_of(kind, dtype))


@pytest.mark.parametrize(("kind", "dtype"), [("all", BF16), ("local", FP32)], ids=str)
def test_backwards_are_what_torch_asks_for(kind: str, dtype: torch.dtype) -> None:
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in forward_of(kind, dtype)]
    out, _, top, total = OPERATORS.triton_attention(*arguments)
    d_out = randn(B, T, H, D, seed=4, dtype=dtype)
    torch.library.opcheck(OPERATORS.triton_attention_backward.default, (d_out, out, top, total, *arguments))


def test_fake_results_have_the_sizes_of_real_ones() -> None:
    """Also their strides, and where nothing is to be returned."""
    for kind, dtype in CASES:
        arguments = [x.detach() if isinstance(x, Tensor) else x for x in forward_of(kind, dtype)]
        real = OPERATORS.triton_attention(*arguments)
        meta = OPERATORS.triton_attention(*(x.to("meta") if isinstance(x, Tensor) else x for x in arguments))
        for a, b in zip(real, meta, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_are_the_same(backend: str) -> None:
    """In one graph, values and gradients."""
    qk, v = randn(B, T, H, D, seed=1, dtype=BF16), randn(B, T, H, D, seed=2, dtype=BF16)
    heads = torch.tensor([-2.0], dtype=BF16)

    def function(qk: Tensor, v: Tensor, heads: Tensor) -> Tensor:
        options = {"causal": True, "mask_BT": MASK, "head_mask_H": heads, "dropout_p": 0.5, "dropout_seed": seed(3)}
        out, lse = attention.lsh_attention(qk * 2, v, ORDER, **window(6, 1, 0), **options)
        return out * 3 + lse.amax((2, 3))[:, None, :, None].to(out.dtype)

    def run(call: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (qk, v, heads)]
        out = call(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    with watched(FORWARD | BACKWARD):
        eager = run(function)
    compiled = run(torch.compile(function, fullgraph=True, backend=backend))
    for a, b in zip(eager, compiled, strict=True):
        assert torch.equal(a, b)
