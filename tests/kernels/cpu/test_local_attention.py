"""Local attention: the kernel against the definition, values and every gradient by name. Letters as in the kernels."""

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
    make_mask,
    results,
    seed,
    slab_scores,
    window,
)
from tests.ops.tools import randn


class Sizes(NamedTuple):
    """Sizes of one case."""

    B: int
    H: int
    D: int
    C: int
    chunks: int
    before: int
    after: int

    @property
    def T(self) -> int:
        return self.C * self.chunks


def calls(sizes: Sizes, mask: str, options: dict[str, Any]) -> tuple[Call, Call]:
    fixed: dict[str, Any] = {
        "mask_BT": make_mask(mask, sizes.B, sizes.T),
        **window(sizes.C, sizes.before, sizes.after),
        **options,
    }
    return partial(kernels.local_attention, **fixed), partial(ops.local_attention, **fixed)


def inputs_of(sizes: Sizes, head_mask: bool = True, scale: float = 1.0) -> dict[str, Tensor]:
    shape = (sizes.B, sizes.T, sizes.H, sizes.D)
    names = ("query_BTHD", "key_BTHD", "v_BTHD")
    inputs = {name: randn(*shape, seed=number) for number, name in enumerate(names)}
    inputs["query_BTHD"] *= scale
    if head_mask:
        inputs["head_mask_H"] = head_mask_of(sizes.H, torch.float64)
    return inputs


ANY_SIZES = st.builds(
    Sizes,
    B=st.integers(1, 3),
    H=st.integers(1, 3),
    D=st.sampled_from([1, 5, 8, 33]),
    C=st.sampled_from([1, 2, 3, 5, 7]),
    chunks=st.integers(1, 17),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)


@settings(max_examples=120)
@given(
    sizes=ANY_SIZES,
    causal=st.booleans(),
    wrap_around=st.booleans(),
    mask=st.sampled_from(MASKS),
    head_mask=st.booleans(),
    gaps=st.booleans(),
    chunks_per_slab=st.sampled_from([None, 1, 2, 3, 5, 16, 40]),
    p=st.sampled_from([0.0, 0.0, 0.05, 0.5, 1.0]),
    scale=st.sampled_from([1.0, 1.0, 1e3]),
)
def test_law_kernel_equals_definition(
    sizes: Sizes,
    causal: bool,
    wrap_around: bool,
    mask: str,
    head_mask: bool,
    gaps: bool,
    chunks_per_slab: int | None,
    p: float,
    scale: float,
) -> None:
    options = {"causal": causal, "wrap_around": wrap_around, "dropout_p": p, "dropout_seed": seed(sizes.T)}
    kernel, definition = calls(sizes, mask, options)
    width = sizes.C * (sizes.before + 1 + sizes.after)
    with slab_scores(None if chunks_per_slab is None else chunks_per_slab * sizes.C * width):
        assert_exact_parity(kernel, definition, inputs_of(sizes, head_mask, scale), gaps)


#: One chunk only, rings shorter than their window, long ones, odd everything.
GEOMETRIES = [
    Sizes(2, 1, 5, 29, 1, 1, 0),
    Sizes(2, 3, 5, 3, 7, 1, 0),
    Sizes(1, 3, 33, 4, 7, 1, 1),
    Sizes(2, 2, 8, 7, 3, 0, 0),
    Sizes(2, 3, 5, 3, 5, 2, 3),
    Sizes(3, 2, 1, 3, 2, 3, 2),
    Sizes(2, 2, 5, 1, 17, 3, 1),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("causal", "wrap_around"), list(product([False, True], repeat=2)))
def test_every_option_and_mask(causal: bool, wrap_around: bool, mask: str) -> None:
    for sizes in GEOMETRIES:
        kernel, definition = calls(sizes, mask, {"causal": causal, "wrap_around": wrap_around})
        for scores in (1, None):
            with slab_scores(scores):
                assert_exact_parity(kernel, definition, inputs_of(sizes))


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("causal", "wrap_around"), list(product([False, True], repeat=2)))
def test_rounding_is_that_of_the_definition(causal: bool, wrap_around: bool, mask: str, dtype: torch.dtype) -> None:
    for sizes in GEOMETRIES:
        kernel, definition = calls(sizes, mask, {"causal": causal, "wrap_around": wrap_around})
        assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_rounding_of_many_numbers(causal: bool, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 33, 7, 9, 1, 1)
    for mask in MASKS:
        kernel, definition = calls(sizes, mask, {"causal": causal})
        assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype, few=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_dropout_drops_what_the_definition_drops(p: float, dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 5, 5, 7, 1, 1)
    kernel, definition = calls(sizes, "right", {"dropout_p": p, "dropout_seed": seed(7), "causal": True})
    for chunks_per_slab in (1, 2, 14, None):
        with slab_scores(None if chunks_per_slab is None else chunks_per_slab * 5 * 15):
            if dtype == torch.float64:
                assert_exact_parity(kernel, definition, inputs_of(sizes))
            else:
                assert_rounded_parity(kernel, definition, inputs_of(sizes), dtype)


@pytest.mark.parametrize("sizes", [Sizes(2, 2, 16, 64, 5, 1, 0), Sizes(1, 2, 16, 64, 67, 1, 0)], ids=str)
def test_chunks_of_64_in_slabs_of_the_usual_size(sizes: Sizes) -> None:
    """Several whole rings in a slab, and a ring that the usual size cuts."""
    kernel, definition = calls(sizes, "left", {"causal": True})
    assert_exact_parity(kernel, definition, inputs_of(sizes))
    assert_rounded_parity(kernel, definition, inputs_of(sizes), torch.float32)


@pytest.mark.parametrize("wrap_around", [False, True])
def test_slabs_do_not_show(wrap_around: bool) -> None:
    sizes = Sizes(3, 2, 5, 3, 20, 2, 1)
    options = {"wrap_around": wrap_around, "dropout_p": 0.2, "dropout_seed": seed(3)}
    kernel, _ = calls(sizes, "right", options)
    whole = results(kernel, inputs_of(sizes))
    for chunks_per_slab in (1, 3, 7, 10, 19, 20, 41, 60):
        with slab_scores(chunks_per_slab * 3 * 12):
            parts = results(kernel, inputs_of(sizes))
        for name, value in whole.items():
            assert error(parts[name], value, name) < 1e-13, f"{name} with {chunks_per_slab} chunks per slab"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_token_is_returned_exactly(dtype: torch.dtype) -> None:
    sizes = Sizes(2, 3, 5, 3, 4, 1, 0)
    kernel, _ = calls(sizes, "none", {"causal": True})
    inputs = {name: x.to(dtype) for name, x in inputs_of(sizes, head_mask=False).items()}
    assert torch.equal(kernel(**inputs)[0][:, 0], inputs["v_BTHD"][:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shift", [-2e4, -2e5, -5e6])
def test_very_negative_scores_are_scores(shift: float, dtype: torch.dtype) -> None:
    """Queries and keys that point apart, all of them: only differences matter, and they have gradients."""
    sizes = Sizes(2, 2, 4, 3, 4, 1, 0)
    inputs = inputs_of(sizes, head_mask=False)
    # A coordinate of its own shifts every score of a row alike, by a product that is exact in either dtype.
    inputs["query_BTHD"][..., 0], inputs["key_BTHD"][..., 0] = -256.0, -shift * 2 / 256
    # Eighths survive an addition to the shift.
    for name in ("query_BTHD", "key_BTHD"):
        inputs[name][..., 1:] = inputs[name][..., 1:].mul(2).round()
    kernel, definition = calls(sizes, "none", {"causal": True})
    if dtype == torch.float64:
        expected, actual = results(definition, inputs), results(kernel, inputs)
        assert expected["d_query_BTHD"].abs().max() > 1e-3
        for name, value in expected.items():
            assert error(actual[name], value, name) < 1e-8, name
    else:
        assert_rounded_parity(kernel, definition, inputs, dtype)


def test_causality_holds_bit_for_bit() -> None:
    """What comes later changes nothing before it, the ring's wrap included."""
    sizes = Sizes(2, 2, 5, 3, 5, 1, 0)
    kernel, _ = calls(sizes, "none", {"causal": True})
    inputs = inputs_of(sizes, head_mask=False)
    out, _ = kernel(**inputs)
    for place in (1, 6, 14):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[:, place:] += 1.0
        later, _ = kernel(**changed)
        assert torch.equal(later[:, :place], out[:, :place])
        assert (later[:, place:] != out[:, place:]).any()
