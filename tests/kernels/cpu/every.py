"""Every kernel once, called on small inputs that exercise all of its options: what holds of all is tested of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_reformer.kernels.cpu import attention, hashing, linear, randomness, sorting
from tests.kernels.cpu.tools import head_mask_of, layout_of, make_mask, seed, window
from tests.ops.tools import randn

B, T, H, D, R = 2, 24, 2, 5, 3


class Job(NamedTuple):
    """A kernel, the tensors it takes in order, the names of those that have gradients, and its options."""

    kernel: Callable[..., Any]
    tensors: dict[str, Tensor | None]
    learned: Sequence[str] = ()
    options: dict[str, Any] = {}

    def __call__(self) -> dict[str, Tensor]:
        """Results and gradients by name, of leaves that share the memory of ``tensors``."""
        leaves = {
            name: x.detach().requires_grad_() if x is not None and name in self.learned else x
            for name, x in self.tensors.items()
        }
        results = self.kernel(*leaves.values(), **self.options)
        outputs = results if isinstance(results, tuple) else (results,)
        named = {f"output {number}": output.detach() for number, output in enumerate(outputs)}
        if self.learned:
            d_out = randn(*outputs[0].shape, seed=9, dtype=outputs[0].dtype)
            gradients = torch.autograd.grad(outputs[0], [leaves[name] for name in self.learned], d_out)
            named.update({f"d_{name}": gradient for name, gradient in zip(self.learned, gradients, strict=True)})
        return named


def _attention(dtype: torch.dtype, start: int) -> dict[str, Job]:
    def draw(number: int) -> Tensor:
        return randn(B, T, H, D, seed=start + number, dtype=dtype)

    order, buckets = layout_of(B, H, R, T)
    mask, heads = make_mask("scattered", B, T), head_mask_of(H, dtype)
    dropout = {"dropout_p": 0.25, "dropout_seed": seed(start)}
    layout = {"sorted_positions_BHRT": order, "buckets_BHRT": buckets, "mask_BT": mask, "head_mask_H": heads}
    lsh = {"qk_BTHD": draw(1), "v_BTHD": draw(2), **layout}
    three = {"query_BTHD": draw(3), "key_BTHD": draw(4), "v_BTHD": draw(5), "mask_BT": mask, "head_mask_H": heads}
    mine, theirs = ("qk_BTHD", "v_BTHD", "head_mask_H"), ("query_BTHD", "key_BTHD", "v_BTHD", "head_mask_H")
    union = {"attend_across_buckets": False, "allow_duplicate_attention": False, "wrap_around": False}
    causal = {"causal": True, **dropout}
    return {
        "lsh": Job(attention.lsh_attention, lsh, mine, window(3, 1, 0, causal=True)),
        "lsh, every option": Job(attention.lsh_attention, lsh, mine, window(3, 1, 1, **union, **causal)),
        "lsh, union of the ring": Job(
            attention.lsh_attention, lsh, mine, window(4, 2, 1, allow_duplicate_attention=False)
        ),
        "lsh, short ring": Job(attention.lsh_attention, lsh, mine, window(12, 2, 1, causal=True)),
        "local": Job(attention.local_attention, three, theirs, window(3, 1, 1, **causal)),
        "local, every option": Job(attention.local_attention, three, theirs, window(3, 2, 0, wrap_around=False)),
        "exact": Job(attention.exact_attention, three, theirs, {"exclude_self": True, **causal}),
    }


def jobs(dtype: torch.dtype = torch.float32, start: int = 0) -> dict[str, Job]:
    """All kernels by name, on numbers that depend on ``start``."""
    vectors, rotations = randn(B, T, H, D, seed=start + 6, dtype=dtype), randn(H, D, R, 6, seed=7, dtype=dtype)
    x = randn(2, 30, 16, seed=start + 8, dtype=dtype)
    weights = {"weight_OI": randn(12, 16, seed=3, dtype=dtype), "bias_O": randn(12, seed=4, dtype=dtype)}
    hashed = {"vectors": vectors, "rotations": rotations}
    mask, buckets = make_mask("right", B, T), layout_of(B, H, R, T)[1]
    return {
        **_attention(dtype, start),
        "hash": Job(hashing.hash_vectors, {**hashed}, (), {"bucket_factors": [4, 8], "mask_BT": mask}),
        "sort": Job(sorting.sort_positions, {"buckets": buckets + start}),
        "sort, wide": Job(sorting.sort_positions, {"buckets": (buckets + start).int() * 70_000}),
        "dropout": Job(randomness.dropout, {"x_XW": x}, ("x_XW",), {"p": 0.3, "seed": seed(start)}),
        "linear": Job(linear.linear, {"x_XI": x, **weights}, ("x_XI", "weight_OI", "bias_O")),
    }


NAMES = list(jobs())
