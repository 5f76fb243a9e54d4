"""Exact attention: the kernel against the definition, values and every gradient by name. Letters as in the kernels."""

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
    exact_blocks,
    head_mask_of,
    make_mask,
    results,
    seed,
)
from tests.ops.tools import randn


class Sizes(NamedTuple):
    """Sizes of one case."""

    B: int
    H: int
    D: int
    T: int


def calls(sizes: Sizes, mask: str, options: dict[str, Any]) -> tuple[Call, Call]:
    fixed = {"mask_BT": make_mask(mask, sizes.B, sizes.T), **options}
    return partial(kernels.exact_attention, **fixed), partial(ops.exact_attention, **fixed)


def inputs_of(sizes: Sizes, head_mask: bool = True, scale: float = 1.0) -> dict[str, Tensor]:
    names = ("query_BTHD", "key_BTHD", "v_BTHD")
    shape = (sizes.B, sizes.T, sizes.H, sizes.D)
    inputs = {name: randn(*shape, seed=number) for number, name in enumerate(names)}
    inputs["query_BTHD"] *= scale
    if head_mask:
        inputs["head_mask_H"] = head_mask_of(sizes.H, torch.float64)
    return inputs


#: Scores of a block, and the fewest queries of one: all at once, query by query, odd blocks, several heads in one.
BLOCKS = [(None, 1), (1, 1), (1, 4), (60, 3), (150, 1), (500, 7), (3000, 1)]


@settings(max_examples=120)
@given(
    sizes=st.builds(
        Sizes,
        B=st.integers(1, 3),
        H=st.integers(1, 3),
        D=st.sampled_from([1, 5, 8, 33]),
        T=st.integers(1, 40),
    ),
    causal=st.booleans(),
    exclude_self=st.booleans(),
    mask=st.sampled_from(MASKS),
    head_mask=st.booleans(),
    gaps=st.booleans(),
    blocks=st.sampled_from(BLOCKS),
    p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 1.0, 1e3]),
)
def test_law_kernel_equals_definition(
    sizes: Sizes,
    causal: bool,
    exclude_self: bool,
    mask: str,
    head_mask: bool,
    gaps: bool,
    blocks: tuple[int | None, int],
    p: float,
    scale: float,
) -> None:
    options = {"causal": causal, "exclude_self": exclude_self, "dropout_p": p, "dropout_seed": seed(sizes.T)}
    kernel, definition = calls(sizes, mask, options)
    with exact_blocks(*blocks):
        assert_exact_parity(kernel, definition, inputs_of(sizes, head_mask, scale), gaps)


GEOMETRIES = [Sizes(1, 3, 33, 13), Sizes(2, 2, 5, 7), Sizes(3, 1, 8, 16), Sizes(2, 3, 1, 1), Sizes(2, 2, 5, 31)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("causal", "exclude_self"), list(product([False, True], repeat=2)))
def test_every_option_and_mask(causal: bool, exclude_self: bool, mask: str) -> None:
    for sizes in GEOMETRIES:
        kernel, definition = calls(sizes, mask, {"causal": causal, "exclude_self": exclude_self})
        assert_exact_parity(kernel, definition, inputs_of(sizes))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("causal", "exclude_self"), list(product([False, True], repeat=2)))
def test_every_option_and_mask_in_blocks(causal: bool, exclude_self: bool, mask: str) -> None:
    """Also rows whose every key is masked: they average all keys of the sequence, in whichever block they are."""
    for sizes, blocks in product(GEOMETRIES, BLOCKS[1:]):
        kernel, definition = calls(sizes, mask, {"causal": causal, "exclude_self": exclude_self})
        with exact_blocks(*blocks):
            assert_exact_parity(kernel, definition, inputs_of(sizes))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("causal", "exclude_self"), list(product([False, True], repeat=2)))
def test_rounding_is_that_of_the_definition(causal: bool, exclude_self: bool, mask: str, dtype: torch.dtype) -> None:
    for sizes in GEOMETRIES:
        kernel, definition = calls(sizes, mask, {"causal": causal, "exclude_self": exclude_self})
        assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize(("causal", "exclude_self"), list(product([False, True], repeat=2)))
def test_rounding_of_many_numbers(causal: bool, exclude_self: bool, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 33, 47)
    for mask in MASKS:
        kernel, definition = calls(sizes, mask, {"causal": causal, "exclude_self": exclude_self})
        assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype, few=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_dropout_drops_what_the_definition_drops(p: float, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 5, 17)
    kernel, definition = calls(sizes, "right", {"dropout_p": p, "dropout_seed": seed(7), "causal": True})
    for blocks in BLOCKS:
        with exact_blocks(*blocks):
            if dtype == torch.float64:
                assert_exact_parity(kernel, definition, inputs_of(sizes))
            else:
                assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_blocks_of_the_usual_size(exclude_self: bool) -> None:
    """800 positions are more than one block."""
    sizes = Sizes(1, 2, 8, 800)
    kernel, definition = calls(sizes, "right", {"causal": True, "exclude_self": exclude_self})
    assert_exact_parity(kernel, definition, inputs_of(sizes))
    assert_rounded_parity(kernel, definition, inputs_of(sizes), torch.float32)


def test_without_a_single_key_a_row_averages_all_of_them_in_blocks_of_the_usual_size() -> None:
    """Pads on the left of a causal sequence longer than a block: what is forbidden scores alike, later or masked."""
    sizes = Sizes(1, 1, 4, 800)
    kernel, definition = calls(sizes, "left", {"causal": True})
    assert_exact_parity(kernel, definition, inputs_of(sizes, head_mask=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_that_sees_only_itself_is_returned_exactly(dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 5, 9)
    inputs = {name: x.to(dtype) for name, x in inputs_of(sizes, head_mask=False).items()}
    for causal, blocks in product([False, True], BLOCKS):
        kernel, _ = calls(sizes, "whole row", {"causal": causal, "exclude_self": True})
        with exact_blocks(*blocks):
            out, _ = kernel(**inputs)
        assert torch.equal(out[1], inputs["v_BTHD"][1])
        if causal:
            assert torch.equal(out[0, 0], inputs["v_BTHD"][0, 0])


@pytest.mark.parametrize("shift", [-2e4, -2e5, -5e6])
def test_very_negative_scores_are_scores(shift: float) -> None:
    """Queries and keys that point apart, all of them: only differences matter, and they have gradients."""
    inputs = inputs_of(Sizes(2, 2, 4, 9), head_mask=False)
    inputs["query_BTHD"][..., 0], inputs["key_BTHD"][..., 0] = -256.0, -shift / 256
    kernel, definition = calls(Sizes(2, 2, 4, 9), "none", {"causal": True})
    expected, actual = results(definition, inputs), results(kernel, inputs)
    assert expected["d_query_BTHD"].abs().max() > 1e-3
    for name, value in expected.items():
        assert error(actual[name], value, name) < 1e-8, name
