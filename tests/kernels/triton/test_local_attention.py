"""Local attention: the kernel against the definition, values and every gradient by name. Letters as in the kernels."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import attention as ops
from tests.kernels.cpu.tools import MASKS, Call, head_mask_of, make_mask, same, seed, window
from tests.ops.tools import randn, untouched

pytest.importorskip("triton")

from flash_reformer.kernels.triton import attention as kernels
from tests.kernels.triton.attending import PHASES, assert_parity, before_hopper, outcome, values
from tests.kernels.triton.spying import DTYPES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NO_WRAP = {"wrap_around": False}
DROPOUT = {"dropout_p": 0.25}


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
        "dropout_seed": seed(sizes.T),
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


CASES: list[tuple[Sizes, torch.dtype, str, dict[str, Any]]] = [
    (Sizes(1, 2, 64, 64, 3, 1, 0), BF16, "none", {"causal": True}),
    (Sizes(1, 1, 128, 128, 2, 1, 0), FP16, "left", {"causal": True}),
    (Sizes(1, 1, 96, 48, 3, 1, 1), BF16, "scattered", {**DROPOUT}),
    (Sizes(2, 1, 40, 96, 2, 0, 1), FP16, "right", {**NO_WRAP, **DROPOUT}),
    (Sizes(2, 1, 32, 24, 4, 1, 0), FP32, "scattered", {"causal": True, **DROPOUT}),
    (Sizes(1, 1, 80, 32, 3, 1, 1), FP32, "none", {**NO_WRAP}),
    (Sizes(2, 1, 16, 16, 3, 2, 0), FP32, "left", {"causal": True, **NO_WRAP}),
    (Sizes(1, 2, 1, 3, 4, 0, 2), FP32, "right", {}),
    (Sizes(2, 2, 5, 1, 3, 1, 0), BF16, "scattered", {"causal": True}),
    # Whole rows without a key: an average of all that is forbidden.
    (Sizes(2, 1, 5, 20, 2, 1, 0), FP32, "whole row", {"causal": True, **DROPOUT}),
    # Windows longer than the ring: keys are seen twice and three times.
    (Sizes(2, 1, 5, 17, 1, 1, 0), FP32, "right", {"causal": True}),
    (Sizes(1, 2, 16, 20, 2, 2, 2), FP32, "scattered", {**DROPOUT}),
    (Sizes(1, 1, 32, 70, 1, 1, 1), BF16, "left", {"dropout_p": 1.0}),
]


def _name(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> str:
    sizes, dtype, mask, options = case
    return " ".join([str(dtype)[6:], *map(str, sizes), mask, *options])


def case_parity(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> None:
    sizes, dtype, mask, options = case
    kernel, definition = calls(sizes, mask, options)
    assert_parity(kernel, definition, inputs_of(sizes, head_mask=sizes.D % 32 != 0), dtype)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if i else pytest.mark.floor) for i, case in enumerate(CASES)], ids=_name
)
def test_kernel_is_the_definition(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> None:
    case_parity(case)


def test_tiles_of_devices_before_hopper() -> None:
    with before_hopper():
        case_parity((Sizes(1, 1, 40, 64, 2, 1, 0), BF16, "scattered", {"causal": True, **DROPOUT}))


@settings(max_examples=5, phases=PHASES)
@given(
    sizes=st.builds(
        Sizes,
        B=st.integers(1, 2),
        H=st.integers(1, 2),
        D=st.sampled_from([1, 5, 16, 33]),
        C=st.sampled_from([1, 2, 3, 7, 17, 33]),
        chunks=st.integers(1, 4),
        before=st.integers(0, 2),
        after=st.integers(0, 2),
    ).filter(lambda s: s.B * s.H * s.chunks * (s.before + 1 + s.after) <= 12),
    causal=st.booleans(),
    wrap_around=st.booleans(),
    mask=st.sampled_from(MASKS),
    gaps=st.booleans(),
    p=st.sampled_from([0.0, 0.05, 0.5]),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_law_kernel_is_the_definition(
    sizes: Sizes, causal: bool, wrap_around: bool, mask: str, gaps: bool, p: float, scale: float
) -> None:
    kernel, definition = calls(sizes, mask, {"causal": causal, "wrap_around": wrap_around, "dropout_p": p})
    assert_parity(kernel, definition, inputs_of(sizes, scale=scale), FP32, gaps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_token_is_returned_exactly(dtype: torch.dtype) -> None:
    sizes = Sizes(2, 1, 5, 17, 2, 1, 0)
    kernel, _ = calls(sizes, "none", {"causal": True})
    inputs = {name: x.to(dtype) for name, x in inputs_of(sizes, head_mask=False).items()}
    out, _ = values(kernel, inputs)
    assert torch.equal(out[:, 0], inputs["v_BTHD"][:, 0])


def test_causality_holds_bit_for_bit() -> None:
    """What comes later changes nothing before it, the ring's wrap included; nor does it get gradients from there."""
    sizes = Sizes(1, 1, 5, 20, 3, 1, 0)
    kernel, _ = calls(sizes, "none", {"causal": True})
    inputs = {name: x.float() for name, x in inputs_of(sizes, head_mask=False).items()}
    out, lse = values(kernel, inputs)
    for place in (1, 20, 33, 59):
        changed = {name: x.clone() for name, x in inputs.items()}
        for x in changed.values():
            x[:, place:] += 1.0
        later, later_lse = values(kernel, changed)
        assert torch.equal(later[:, :place], out[:, :place])
        assert torch.equal(later_lse[..., :place], lse[..., :place])
        assert (later[:, place:] != out[:, place:]).any(-1).all()

    def until(**x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernel(**x)
        return out[:, :33], lse

    for name, gradient in outcome(until, inputs).items():
        if name.startswith("d_"):
            assert (gradient[:, 33:] == 0).all()
            # The first token has one key, so its score has no gradient, except from rows that see it too.
            assert (gradient[:, 1:33] != 0).any(-1).all()


@pytest.mark.parametrize("shift", [-2e4, -2e5, -5e6])
def test_very_negative_scores_are_scores(shift: float) -> None:
    """Queries and keys that point apart, all of them: only differences matter, and they have gradients."""
    sizes = Sizes(1, 1, 4, 16, 2, 1, 0)
    inputs = inputs_of(sizes, head_mask=False)
    # A coordinate of its own shifts every score of a row alike, by a product that is exact.
    inputs["query_BTHD"][..., 0], inputs["key_BTHD"][..., 0] = -256.0, -shift * 2 / 256
    # Eighths survive an addition to the shift.
    for name in ("query_BTHD", "key_BTHD"):
        inputs[name][..., 1:] = inputs[name][..., 1:].mul(2).round()
    inputs["query_BTHD"][..., 0] *= -1.0
    inputs["key_BTHD"][..., 0] *= 1.0 if shift < -1e6 else -1.0
    kernel, definition = calls(sizes, "none", {"causal": True})
    assert_parity(kernel, definition, inputs, FP32)


def test_what_is_masked_is_never_read() -> None:
    """Other numbers there change neither values nor gradients of the others."""
    sizes = Sizes(2, 1, 5, 20, 2, 1, 1)
    mask = make_mask("scattered", 2, sizes.T)
    assert mask is not None
    kernel, _ = calls(sizes, "scattered", {})

    def of_others(**x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernel(**x)
        return out * mask[..., None, None], lse.masked_fill(~mask[:, None], 0.0)

    inputs = {name: x.float() for name, x in inputs_of(sizes, head_mask=False).items()}
    strange = {name: x.masked_fill(~mask[..., None, None], 1e15) for name, x in inputs.items()}
    plain, other = outcome(of_others, inputs), outcome(of_others, strange)
    for name, x in plain.items():
        keep = mask[:, None].expand_as(x) if name == "lse" else mask
        assert torch.equal(x[keep], other[name][keep]), name
        if name.startswith("d_"):
            assert (x[~mask] == 0).all() or name == "d_v_BTHD"


def test_every_run_gives_the_same_and_leaves_its_inputs() -> None:
    sizes = Sizes(1, 2, 16, 20, 2, 1, 1)
    kernel, _ = calls(sizes, "right", {**DROPOUT})
    inputs = {name: x.to(BF16) for name, x in inputs_of(sizes).items()}
    with untouched(**inputs):
        first, second = outcome(kernel, inputs), outcome(kernel, inputs)
    assert same(first, second)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_one_gradient_alone_is_the_same(dtype: torch.dtype) -> None:
    sizes = Sizes(1, 1, 5, 20, 2, 1, 0)
    kernel, _ = calls(sizes, "right", {"causal": True})
    inputs = {name: x.to(dtype) for name, x in inputs_of(sizes, head_mask=False).items()}
    both = outcome(kernel, inputs)
    for name, x in inputs.items():
        rest = {other: fixed for other, fixed in inputs.items() if other != name}
        alone = outcome(partial(kernel, **rest), {name: x})
        assert torch.equal(alone[f"d_{name}"], both[f"d_{name}"])
