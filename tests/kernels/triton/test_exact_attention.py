"""Exact attention: the kernel against the definition, values and every gradient by name. Letters as in the kernels."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import attention as ops
from tests.kernels.cpu.tools import MASKS, Call, error, head_mask_of, make_mask, results, same, seed
from tests.ops.tools import randn, untouched

pytest.importorskip("triton")

from flash_reformer.kernels.triton import attention as kernels
from tests.kernels.triton.attending import PHASES, assert_parity, before_hopper, outcome, values
from tests.kernels.triton.spying import DTYPES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SELF = {"exclude_self": True}
DROPOUT = {"dropout_p": 0.25}


class Sizes(NamedTuple):
    """Sizes of one case."""

    B: int
    H: int
    D: int
    T: int


def calls(sizes: Sizes, mask: str, options: dict[str, Any]) -> tuple[Call, Call]:
    fixed = {"mask_BT": make_mask(mask, sizes.B, sizes.T), "dropout_seed": seed(sizes.T), **options}
    return partial(kernels.exact_attention, **fixed), partial(ops.exact_attention, **fixed)


def inputs_of(sizes: Sizes, head_mask: bool = True, scale: float = 1.0) -> dict[str, Tensor]:
    names = ("query_BTHD", "key_BTHD", "v_BTHD")
    shape = (sizes.B, sizes.T, sizes.H, sizes.D)
    inputs = {name: randn(*shape, seed=number) for number, name in enumerate(names)}
    inputs["query_BTHD"] *= scale / sizes.D**0.5
    if head_mask:
        inputs["head_mask_H"] = head_mask_of(sizes.H, torch.float64)
    return inputs


CASES: list[tuple[Sizes, torch.dtype, str, dict[str, Any]]] = [
    (Sizes(1, 2, 64, 64), BF16, "none", {"causal": True}),
    (Sizes(2, 2, 16, 48), FP16, "right", {"causal": True, **SELF, **DROPOUT}),
    (Sizes(1, 1, 128, 100), BF16, "left", {**SELF}),
    (Sizes(1, 1, 40, 200), FP16, "scattered", {**DROPOUT}),
    (Sizes(1, 1, 80, 70), FP32, "left", {"causal": True, **SELF}),
    (Sizes(2, 1, 5, 37), FP32, "whole row", {**DROPOUT}),
    (Sizes(2, 2, 5, 17), FP32, "scattered", {**SELF, **DROPOUT}),
    (Sizes(1, 1, 32, 128), FP32, "right", {"causal": True}),
    (Sizes(3, 2, 1, 1), FP32, "none", {"causal": True}),
    (Sizes(3, 1, 1, 1), BF16, "none", {**SELF}),
    (Sizes(1, 3, 5, 3), FP32, "right", {"dropout_p": 1.0, **SELF}),
    (Sizes(2, 1, 96, 24), FP16, "whole row", {"causal": True}),
]


def _name(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> str:
    sizes, dtype, mask, options = case
    return " ".join([str(dtype)[6:], *map(str, sizes), mask, *options])


def case_parity(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> None:
    sizes, dtype, mask, options = case
    kernel, definition = calls(sizes, mask, options)
    assert_parity(kernel, definition, inputs_of(sizes, head_mask=sizes.D % 32 != 0), dtype)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.floor if i == 1 else []) for i, case in enumerate(CASES)], ids=_name
)
def test_kernel_is_the_definition(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> None:
    case_parity(case)


def test_tiles_of_devices_before_hopper() -> None:
    with before_hopper():
        case_parity((Sizes(1, 1, 40, 70), BF16, "scattered", {"causal": True, **SELF, **DROPOUT}))


@settings(max_examples=6, phases=PHASES)
@given(
    sizes=st.builds(
        Sizes, B=st.integers(1, 2), H=st.integers(1, 2), D=st.sampled_from([1, 5, 16, 33]), T=st.integers(1, 48)
    ),
    causal=st.booleans(),
    exclude_self=st.booleans(),
    mask=st.sampled_from(MASKS),
    gaps=st.booleans(),
    p=st.sampled_from([0.0, 0.05, 0.5]),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_law_kernel_is_the_definition(
    sizes: Sizes, causal: bool, exclude_self: bool, mask: str, gaps: bool, p: float, scale: float
) -> None:
    kernel, definition = calls(sizes, mask, {"causal": causal, "exclude_self": exclude_self, "dropout_p": p})
    assert_parity(kernel, definition, inputs_of(sizes, scale=scale), FP32, gaps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [9, 70])
def test_a_token_that_sees_only_itself_is_returned_exactly(T: int, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 1, 5, T)
    inputs = {name: x.to(dtype) for name, x in inputs_of(sizes, head_mask=False).items()}
    kernel, _ = calls(sizes, "whole row", {"causal": True, "exclude_self": True})
    out, lse = values(kernel, inputs)
    assert torch.equal(out[1], inputs["v_BTHD"][1])
    assert torch.equal(out[0, 0], inputs["v_BTHD"][0, 0])
    assert not torch.equal(out[0, 1], inputs["v_BTHD"][0, 1])
    assert (lse[1] == -1e5).all()


def test_without_a_single_key_a_row_averages_all_of_them() -> None:
    """Pads on the left of a causal sequence: what is forbidden scores alike, later or masked."""
    sizes = Sizes(1, 1, 5, 70)
    kernel, definition = calls(sizes, "left", {"causal": True})
    inputs = inputs_of(sizes, head_mask=False)
    assert_parity(kernel, definition, inputs, FP32)
    out, lse = values(kernel, {name: x.float() for name, x in inputs.items()})
    assert (out[0, 0, 0] - inputs["v_BTHD"][0, :, 0].mean(0)).abs().max() < 1e-6
    assert lse[0, 0, 0] == -1e9


@pytest.mark.parametrize(("scale", "dtype"), [(1e4, FP32), (1e3, FP16), (1e-20, FP32), (0.0, FP16)], ids=str)
def test_scores_of_any_magnitude(scale: float, dtype: torch.dtype) -> None:
    sizes = Sizes(1, 1, 16, 40)
    kernel, definition = calls(sizes, "right", {"causal": True, "exclude_self": True})
    assert_parity(kernel, definition, inputs_of(sizes, scale=scale), dtype)


@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_scores_as_low_as_that_of_a_token_with_itself(dtype: torch.dtype) -> None:
    """They are scores: a row shares itself between its own value and the others', and only those have gradients."""
    sizes = Sizes(1, 1, 5, 9)
    inputs = {name: x.round() for name, x in inputs_of(sizes, head_mask=False).items()}
    # By products that are exact: -100032 + 32 for every pair.
    inputs["query_BTHD"][..., :2], inputs["key_BTHD"][..., 0], inputs["key_BTHD"][..., 1] = 256.0, -390.75, 0.125
    kernel, definition = calls(sizes, "none", {"exclude_self": True})
    # The definition in fp16 makes fp16 scores, of which these are none.
    expected, actual = results(definition, inputs), outcome(kernel, {name: x.to(dtype) for name, x in inputs.items()})
    for name, value in expected.items():
        assert error(actual[name], value, name) < 0.005, name


def test_every_run_gives_the_same_and_leaves_its_inputs() -> None:
    sizes = Sizes(1, 2, 16, 40)
    kernel, _ = calls(sizes, "right", {**DROPOUT, **SELF})
    inputs = {name: x.to(BF16) for name, x in inputs_of(sizes).items()}
    with untouched(**inputs):
        first, second = outcome(kernel, inputs), outcome(kernel, inputs)
    assert same(first, second)
