"""LSH attention: the kernel against the definition, values and every gradient by name.

Letters as in the kernels: B batch, T positions, H heads, D head size, R rounds, C chunk length.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.kernels.cpu import attention as kernels
from flash_reformer.ops import attention as ops
from tests.kernels.cpu.tools import (
    DTYPES,
    HALF,
    MASKS,
    Call,
    assert_exact_parity,
    assert_rounded_parity,
    error,
    head_mask_of,
    layout_of,
    make_mask,
    results,
    seed,
    slab_scores,
    window,
)
from tests.ops.tools import randn


class Sizes(NamedTuple):
    """Sizes of one case; ``chunks`` are those of a round."""

    B: int
    H: int
    D: int
    R: int
    C: int
    chunks: int
    before: int
    after: int

    @property
    def T(self) -> int:
        return self.C * self.chunks


def calls(sizes: Sizes, mask: str, options: dict[str, Any]) -> tuple[Call, Call]:
    """Kernel and definition on one layout, to be called with ``qk_BTHD``, ``v_BTHD`` and perhaps ``head_mask_H``."""
    order, buckets = layout_of(sizes.B, sizes.H, sizes.R, sizes.T)
    fixed: dict[str, Any] = {
        "sorted_positions_BHRT": order,
        "buckets_BHRT": buckets,
        "mask_BT": make_mask(mask, sizes.B, sizes.T),
        **window(sizes.C, sizes.before, sizes.after),
        **options,
    }
    return partial(kernels.lsh_attention, **fixed), partial(ops.lsh_attention, **fixed)


def inputs_of(sizes: Sizes, head_mask: bool = True, scale: float = 1.0) -> dict[str, Tensor]:
    B, H, D, T = sizes.B, sizes.H, sizes.D, sizes.T
    inputs = {"qk_BTHD": scale * randn(B, T, H, D, seed=1), "v_BTHD": randn(B, T, H, D, seed=2)}
    if head_mask:
        inputs["head_mask_H"] = head_mask_of(H, torch.float64)
    return inputs


ANY_SIZES = st.builds(
    Sizes,
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    D=st.sampled_from([1, 5, 8, 33]),
    R=st.integers(1, 8),
    C=st.sampled_from([1, 2, 3, 5, 7]),
    chunks=st.integers(1, 6),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
ANY_OPTIONS = st.fixed_dictionaries(
    {
        "causal": st.booleans(),
        "wrap_around": st.booleans(),
        "attend_across_buckets": st.booleans(),
        "allow_duplicate_attention": st.booleans(),
        "dropout_p": st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    }
)


@settings(max_examples=120)
@given(
    sizes=ANY_SIZES,
    options=ANY_OPTIONS,
    mask=st.sampled_from(MASKS),
    head_mask=st.booleans(),
    gaps=st.booleans(),
    chunks_per_slab=st.sampled_from([None, 1, 2, 3, 5, 16, 40]),
    scale=st.sampled_from([1.0, 1.0, 1e3]),
)
def test_law_kernel_equals_definition(
    sizes: Sizes,
    options: dict[str, Any],
    mask: str,
    head_mask: bool,
    gaps: bool,
    chunks_per_slab: int | None,
    scale: float,
) -> None:
    kernel, definition = calls(sizes, mask, {**options, "dropout_seed": seed(sizes.T)})
    width = sizes.C * (sizes.before + 1 + sizes.after)
    with slab_scores(None if chunks_per_slab is None else chunks_per_slab * sizes.C * width):
        assert_exact_parity(kernel, definition, inputs_of(sizes, head_mask, scale), gaps)


#: Short rings, on which tokens meet themselves twice and three times; long ones, cut in parts; odd everything.
GEOMETRIES = [
    Sizes(2, 3, 5, 1, 3, 7, 1, 0),
    Sizes(2, 1, 8, 2, 4, 3, 1, 1),
    Sizes(1, 3, 33, 5, 7, 2, 0, 0),
    Sizes(3, 2, 5, 4, 3, 3, 0, 2),
    Sizes(2, 2, 5, 3, 3, 1, 3, 1),
    Sizes(2, 2, 1, 1, 3, 2, 3, 2),
    Sizes(2, 2, 5, 8, 1, 5, 2, 1),
]
OPTIONS = [
    {"wrap_around": wrap, "attend_across_buckets": across, "allow_duplicate_attention": duplicates}
    for wrap, across, duplicates in product((True, False), repeat=3)
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("ny"[x] for x in o.values()))
def test_every_option_and_mask(options: dict[str, bool], causal: bool, mask: str) -> None:
    for number, sizes in enumerate(GEOMETRIES):
        kernel, definition = calls(sizes, mask, {**options, "causal": causal})
        # One chunk per slab and whole rings by turns.
        with slab_scores(1 if number % 2 == 0 else None):
            assert_exact_parity(kernel, definition, inputs_of(sizes))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("ny"[x] for x in o.values()))
def test_rounding_is_that_of_the_definition(options: dict[str, bool], dtype: torch.dtype) -> None:
    for number, sizes in enumerate(GEOMETRIES):
        kernel, definition = calls(sizes, MASKS[number % len(MASKS)], {**options, "causal": number % 2 == 0})
        assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("R", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_rounding_of_many_numbers(causal: bool, R: int, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 33, R, 7, 9, 1, 0)
    for mask in MASKS:
        kernel, definition = calls(sizes, mask, {"causal": causal})
        assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype, few=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_dropout_drops_what_the_definition_drops(p: float, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 5, 3, 5, 4, 1, 1)
    dropout = {"dropout_p": p, "dropout_seed": seed(7), "causal": True}
    kernel, definition = calls(sizes, "right", dropout)
    for chunks_per_slab in (1, 2, 24, None):
        with slab_scores(None if chunks_per_slab is None else chunks_per_slab * 5 * 15):
            if dtype == torch.float64:
                assert_exact_parity(kernel, definition, inputs_of(sizes))
            else:
                assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_scores_of_large_magnitude(dtype: torch.dtype) -> None:
    """Softmaxes of numbers in the thousands: one key takes all, and nothing overflows."""
    for sizes, causal in zip(GEOMETRIES, [True, False] * 4, strict=False):
        kernel, definition = calls(sizes, "scattered", {"causal": causal})
        inputs = inputs_of(sizes, scale=1e3)
        if dtype == torch.float64:
            assert_exact_parity(kernel, definition, inputs)
        else:
            assert_rounded_parity(kernel, definition, inputs, dtype)


@pytest.mark.parametrize("sizes", [Sizes(2, 2, 16, 2, 64, 3, 1, 0), Sizes(1, 2, 16, 2, 64, 33, 1, 0)], ids=str)
def test_chunks_of_64_in_slabs_of_the_usual_size(sizes: Sizes) -> None:
    """Several whole rings in a slab, and a ring that the usual size cuts."""
    kernel, definition = calls(sizes, "left", {"causal": True})
    assert_exact_parity(kernel, definition, inputs_of(sizes))
    assert_rounded_parity(kernel, definition, inputs_of(sizes), torch.float32)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("ny"[x] for x in o.values()))
def test_slabs_do_not_show(options: dict[str, bool]) -> None:
    """However rings are cut or put together, results are the same up to rounding."""
    sizes = Sizes(3, 2, 5, 2, 3, 10, 2, 1)
    kernel, _ = calls(sizes, "right", {**options, "causal": True, "dropout_p": 0.2, "dropout_seed": seed(3)})
    whole = results(kernel, inputs_of(sizes))
    for chunks_per_slab in (1, 3, 7, 10, 19, 20, 41, 60):
        with slab_scores(chunks_per_slab * 3 * 12):
            parts = results(kernel, inputs_of(sizes))
        for name, value in whole.items():
            assert error(parts[name], value, name) < 1e-13, f"{name} with {chunks_per_slab} chunks per slab"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", range(1, 9))
def test_a_token_that_sees_only_itself_is_returned_exactly(R: int, dtype: torch.dtype) -> None:
    """Bit for bit, however often it meets itself; so is every token of a row that is masked as a whole."""
    for C, chunks, before, after in ((3, 4, 1, 0), (5, 1, 1, 1), (1, 2, 3, 3), (3, 1, 2, 0), (2, 3, 3, 3)):
        sizes = Sizes(2, 3, 5, R, C, chunks, before, after)
        inputs = {name: x.to(dtype) for name, x in inputs_of(sizes, head_mask=False).items()}
        for options in OPTIONS:
            kernel, _ = calls(sizes, "whole row", {**options, "causal": True})
            out, _ = kernel(**inputs)
            assert torch.equal(out[0, 0], inputs["v_BTHD"][0, 0]), (sizes, options)
            assert torch.equal(out[1], inputs["v_BTHD"][1]), (sizes, options)
            head_mask = head_mask_of(3, dtype)
            out, _ = kernel(**inputs, head_mask_H=head_mask)
            assert torch.equal(out[1], inputs["v_BTHD"][1] * head_mask[:, None]), (sizes, options)


def test_buckets_may_be_wide_and_are_not_needed_across_buckets() -> None:
    sizes = Sizes(2, 2, 5, 2, 3, 4, 1, 0)
    order, buckets = layout_of(2, 2, 2, 12)
    inputs, layout = inputs_of(sizes), window(3, 1, 0, attend_across_buckets=False)
    narrow, _ = kernels.lsh_attention(**inputs, sorted_positions_BHRT=order, buckets_BHRT=buckets, **layout)
    far = (buckets.int() + 1) * 2**20
    wide, _ = kernels.lsh_attention(**inputs, sorted_positions_BHRT=order, buckets_BHRT=far, **layout)
    assert torch.equal(narrow, wide)
    across, _ = kernels.lsh_attention(**inputs, sorted_positions_BHRT=order, **window(3, 1, 0))
    given_all, _ = kernels.lsh_attention(**inputs, sorted_positions_BHRT=order, buckets_BHRT=buckets, **window(3, 1, 0))
    assert torch.equal(across, given_all)
    assert not torch.equal(across, narrow)


def test_the_lse_carries_no_gradient() -> None:
    sizes = Sizes(1, 2, 5, 2, 3, 4, 1, 0)
    kernel, _ = calls(sizes, "none", {})
    inputs = {name: x.requires_grad_() for name, x in inputs_of(sizes).items()}
    out, lse = kernel(**inputs)
    assert out.requires_grad
    assert not lse.requires_grad


def test_one_gradient_alone_is_the_same() -> None:
    """Values that need no gradient, a query-key projection that is frozen: the other gradient does not move."""
    sizes = Sizes(2, 2, 5, 2, 3, 4, 1, 0)
    kernel, _ = calls(sizes, "right", {"causal": True})
    inputs = inputs_of(sizes, head_mask=False)
    both = results(kernel, inputs)
    d_out = randn(2, 12, 2, 5, seed=99, dtype=torch.float32).double()
    for name in inputs:
        mine = {other: x.detach().clone().requires_grad_(other == name) for other, x in inputs.items()}
        (gradient,) = torch.autograd.grad(kernel(**mine)[0], mine[name], d_out)
        assert torch.equal(gradient, both[f"d_{name}"])
