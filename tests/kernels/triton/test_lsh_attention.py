"""LSH attention: the kernel against the definition, values and every gradient by name.

Letters as in the kernels: B batch, T positions, H heads, D head size, R rounds, C chunk length.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import attention as ops
from tests.kernels.cpu.tools import MASKS, Call, head_mask_of, layout_of, make_mask, same, seed, window
from tests.ops.tools import randn, untouched

pytest.importorskip("triton")

from flash_reformer.kernels.triton import attention as kernels
from tests.kernels.triton.attending import PHASES, assert_parity, before_hopper, outcome, values
from tests.kernels.triton.spying import DTYPES

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
UNION = {"allow_duplicate_attention": False}
BUCKETS = {"attend_across_buckets": False}
NO_WRAP = {"wrap_around": False}
DROPOUT = {"dropout_p": 0.25}


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
        "dropout_seed": seed(sizes.T),
        **window(sizes.C, sizes.before, sizes.after),
        **options,
    }
    definition = {name: it for name, it in fixed.items() if name != "deterministic"}
    return partial(kernels.lsh_attention, **fixed), partial(ops.lsh_attention, **definition)


def inputs_of(sizes: Sizes, head_mask: bool = True, scale: float = 1.0) -> dict[str, Tensor]:
    B, H, D, T = sizes.B, sizes.H, sizes.D, sizes.T
    inputs = {"qk_BTHD": scale * randn(B, T, H, D, seed=1), "v_BTHD": randn(B, T, H, D, seed=2)}
    if head_mask:
        inputs["head_mask_H"] = head_mask_of(H, torch.float64)
    return inputs


#: Chunks of less than a tile, of one, of several, filled up or not; heads of every size; every option with others.
CASES: list[tuple[Sizes, torch.dtype, str, dict[str, Any]]] = [
    (Sizes(1, 2, 64, 2, 64, 2, 1, 0), BF16, "none", {"causal": True}),
    (Sizes(2, 1, 40, 1, 64, 3, 1, 1), FP16, "right", {"causal": True, **DROPOUT}),
    (Sizes(1, 1, 16, 2, 64, 1, 1, 0), FP32, "left", {**UNION, **DROPOUT}),
    (Sizes(1, 1, 128, 1, 128, 2, 1, 0), BF16, "left", {"causal": True}),
    (Sizes(1, 1, 80, 1, 96, 2, 0, 1), FP16, "scattered", {**NO_WRAP, **DROPOUT}),
    (Sizes(1, 1, 32, 1, 256, 1, 1, 0), BF16, "right", {"causal": True}),
    (Sizes(1, 1, 96, 2, 48, 1, 0, 1), BF16, "scattered", {**UNION, "causal": True}),
    (Sizes(1, 1, 5, 1, 72, 2, 0, 0), FP32, "scattered", {"causal": True, **DROPOUT}),
    (Sizes(1, 1, 128, 2, 32, 2, 1, 0), FP16, "whole row", {**BUCKETS}),
    (Sizes(1, 1, 80, 2, 32, 2, 1, 0), FP32, "right", {"causal": True, **NO_WRAP}),
    (Sizes(1, 1, 96, 1, 48, 2, 1, 0), FP32, "none", {**BUCKETS, **DROPOUT}),
    (Sizes(2, 1, 64, 1, 48, 3, 1, 1), BF16, "whole row", {**DROPOUT}),
    (Sizes(1, 2, 32, 2, 24, 2, 2, 0), FP16, "scattered", {**BUCKETS, **UNION, "causal": True}),
    (Sizes(2, 1, 16, 2, 24, 2, 0, 2), BF16, "left", {**NO_WRAP, **UNION}),
    (Sizes(1, 2, 40, 2, 16, 2, 1, 1), FP32, "none", {**NO_WRAP, **BUCKETS, **UNION, "causal": True}),
    (Sizes(1, 1, 1, 4, 16, 3, 1, 0), FP16, "left", {**NO_WRAP, **BUCKETS}),
    (Sizes(1, 1, 5, 3, 3, 2, 1, 1), FP32, "scattered", {**UNION, **DROPOUT}),
    (Sizes(2, 1, 5, 1, 3, 5, 1, 0), FP32, "right", {"dropout_p": 1.0, "causal": True}),
    (Sizes(1, 1, 16, 8, 3, 2, 1, 0), BF16, "right", {"causal": True}),
    (Sizes(1, 1, 5, 2, 1, 5, 2, 1), FP32, "none", {"causal": True}),
    # Windows longer than the ring: keys are seen twice and three times.
    (Sizes(2, 1, 16, 1, 16, 1, 2, 0), FP32, "right", {"causal": True}),
    (Sizes(1, 2, 5, 2, 3, 1, 2, 2), FP32, "scattered", {**DROPOUT}),
    (Sizes(1, 1, 32, 1, 24, 2, 3, 0), BF16, "right", {**UNION, **DROPOUT}),
    (Sizes(2, 1, 5, 1, 3, 1, 1, 2), FP32, "left", {**UNION, **BUCKETS}),
]
#: Sums of rounds by atomic additions.
ATOMIC: list[tuple[Sizes, torch.dtype, str, dict[str, Any]]] = [
    (Sizes(1, 2, 32, 3, 32, 1, 1, 0), BF16, "right", {"causal": True, **DROPOUT}),
    (Sizes(1, 1, 5, 4, 3, 2, 1, 1), FP32, "left", {"causal": True}),
    (Sizes(1, 1, 80, 2, 24, 2, 1, 0), FP16, "scattered", {**UNION}),
    (Sizes(2, 1, 16, 1, 16, 2, 1, 0), FP16, "none", {}),
]


def _name(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> str:
    sizes, dtype, mask, options = case
    return " ".join([str(dtype)[6:], *map(str, sizes), mask, *options])


def case_parity(case: tuple[Sizes, torch.dtype, str, dict[str, Any]], **more: Any) -> None:
    sizes, dtype, mask, options = case
    kernel, definition = calls(sizes, mask, {**options, **more})
    assert_parity(kernel, definition, inputs_of(sizes, head_mask=sizes.D % 32 != 0), dtype)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.floor if not i % 15 else []) for i, case in enumerate(CASES)],
    ids=_name,
)
def test_kernel_is_the_definition(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> None:
    case_parity(case)


@pytest.mark.parametrize(
    "case",
    [
        (Sizes(1, 1, 40, 1, 64, 2, 1, 0), FP16, "right", {"causal": True, **DROPOUT}),
        (Sizes(1, 1, 16, 2, 24, 2, 0, 2), BF16, "left", {**NO_WRAP, **UNION}),
    ],
    ids=_name,
)
def test_tiles_of_devices_before_hopper(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> None:
    with before_hopper():
        case_parity(case)


@pytest.mark.parametrize("case", ATOMIC, ids=_name)
def test_gradients_that_are_not_deterministic(case: tuple[Sizes, torch.dtype, str, dict[str, Any]]) -> None:
    case_parity(case, deterministic=False)


@settings(max_examples=4, phases=PHASES)
@given(
    sizes=st.builds(
        Sizes,
        B=st.integers(1, 2),
        H=st.integers(1, 2),
        D=st.sampled_from([1, 5, 16, 33]),
        R=st.integers(1, 2),
        C=st.sampled_from([1, 2, 3, 7, 17, 33]),
        chunks=st.integers(1, 3),
        before=st.integers(0, 2),
        after=st.integers(0, 2),
    ).filter(lambda s: s.B * s.H * s.R * s.chunks * (s.before + 1 + s.after) <= 12),
    options=st.fixed_dictionaries(
        {
            "causal": st.booleans(),
            "wrap_around": st.booleans(),
            "attend_across_buckets": st.booleans(),
            "allow_duplicate_attention": st.booleans(),
            "deterministic": st.booleans(),
            "dropout_p": st.sampled_from([0.0, 0.05, 0.5]),
        }
    ),
    mask=st.sampled_from(MASKS),
    gaps=st.booleans(),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_law_kernel_is_the_definition(
    sizes: Sizes, options: dict[str, Any], mask: str, gaps: bool, scale: float
) -> None:
    kernel, definition = calls(sizes, mask, options)
    assert_parity(kernel, definition, inputs_of(sizes, scale=scale), FP32, gaps)


#: (C, chunks, before, after): long rings, short ones, those on which a token meets itself three times.
RINGS = [(3, 4, 1, 0), (17, 1, 1, 1), (1, 2, 2, 2), (33, 2, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("R", "ring", "options"),
    [
        (1, 0, UNION),
        (2, 1, {**NO_WRAP, **UNION}),
        (3, 2, {}),
        (4, 1, BUCKETS),
        (3, 3, {}),
        (1, 3, UNION),
        (8, 1, {}),
    ],
    ids=str,
)
def test_a_token_that_sees_only_itself_is_returned_exactly(
    R: int, ring: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Bit for bit, however often it meets itself; so is every token of a row that is masked as a whole."""
    sizes = Sizes(2, 1, 5, R, *RINGS[ring])
    inputs = {name: x.to(dtype) for name, x in inputs_of(sizes, head_mask=False).items()}
    kernel, _ = calls(sizes, "whole row", {"causal": True, **options})
    out, lse = values(kernel, inputs)
    assert torch.equal(out[1], inputs["v_BTHD"][1])
    assert torch.equal(out[0, 0], inputs["v_BTHD"][0, 0])
    assert sizes.T == 1 or not torch.equal(out[0], inputs["v_BTHD"][0])
    assert ((lse[1] + 1e5).abs() < 4.0).all()


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-20, 0.0])
def test_scores_of_any_magnitude(scale: float, dtype: torch.dtype) -> None:
    """Scores in the thousands, where one key takes all; rows of nearly nothing and of nothing."""
    sizes = Sizes(1, 1, 16, 2, 16, 2, 1, 0)
    inputs = inputs_of(sizes)
    if scale > 1:
        inputs["qk_BTHD"] *= scale if dtype == FP32 else scale / 10
    else:
        inputs["qk_BTHD"][:, ::2] *= scale
    kernel, definition = calls(sizes, "right", {"causal": True})
    assert_parity(kernel, definition, inputs, dtype)


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_masked_is_never_read(deterministic: bool) -> None:
    """Other numbers there change neither values nor gradients of the others."""
    sizes = Sizes(2, 1, 5, 2, 20, 2, 1, 0)
    mask = make_mask("scattered", 2, sizes.T)
    assert mask is not None
    kernel, _ = calls(sizes, "scattered", {"causal": True, "deterministic": deterministic})

    def of_others(**x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = kernel(**x)
        return out * mask[..., None, None], lse.masked_fill(~mask[:, None, None], 0.0)

    inputs = {name: x.float() for name, x in inputs_of(sizes, head_mask=False).items()}
    strange = {name: x.masked_fill(~mask[..., None, None], 1e15) for name, x in inputs.items()}
    plain, other = outcome(of_others, inputs), outcome(of_others, strange)
    for name, x in plain.items():
        keep = mask[:, None, None].expand_as(x) if name == "lse" else mask
        assert torch.equal(x[keep], other[name][keep]), name


def test_rows_of_the_batch_are_on_their_own() -> None:
    sizes = Sizes(3, 1, 5, 2, 18, 2, 1, 0)
    order, _ = layout_of(3, 1, 2, sizes.T)
    mask, turned = make_mask("scattered", 3, sizes.T), torch.tensor([2, 0, 1])
    assert mask is not None
    inputs = {name: x.to(BF16) for name, x in inputs_of(sizes, head_mask=False).items()}
    call = partial(kernels.lsh_attention, causal=True, **window(18, 1, 0))
    out, lse = values(partial(call, sorted_positions_BHRT=order, mask_BT=mask), inputs)
    other = partial(call, sorted_positions_BHRT=order[turned], mask_BT=mask[turned])
    out_turned, lse_turned = values(other, {name: x[turned] for name, x in inputs.items()})
    assert torch.equal(out_turned, out[turned])
    assert torch.equal(lse_turned, lse[turned])
    assert not torch.equal(out_turned, out)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_run_gives_the_same_and_leaves_its_inputs(dtype: torch.dtype) -> None:
    sizes = Sizes(1, 2, 16, 3, 20, 1, 1, 0)
    kernel, _ = calls(sizes, "right", {"causal": True, **DROPOUT})
    inputs = {name: x.to(dtype) for name, x in inputs_of(sizes).items()}
    facts = {name: x for name, x in kernel.keywords.items() if isinstance(x, Tensor)}  # type: ignore[attr-defined]
    with untouched(**inputs, **facts):
        first, second = outcome(kernel, inputs), outcome(kernel, inputs)
    assert same(first, second)


def test_dropout_follows_the_seed_and_the_head() -> None:
    """Another seed drops other pairs, and so do other heads and rows of the batch."""
    sizes = Sizes(2, 2, 5, 1, 16, 2, 1, 0)
    one = randn(1, sizes.T, 1, 5, seed=1, dtype=FP32).expand(2, -1, 2, -1)
    order = torch.arange(sizes.T).expand(2, 2, 1, -1)
    call = partial(kernels.lsh_attention, sorted_positions_BHRT=order, dropout_p=0.5, **window(16, 1, 0))
    inputs = {"qk_BTHD": one, "v_BTHD": one}
    out, _ = values(partial(call, dropout_seed=seed(1)), inputs)
    other, _ = values(partial(call, dropout_seed=seed(2)), inputs)
    assert not torch.equal(out, other)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out[:, :, 0], out[:, :, 1])


@pytest.mark.parametrize("hopper", [True, False])
def test_one_gradient_alone_is_the_same(hopper: bool) -> None:
    """Values that need no gradient, a query-key projection that is frozen: the other gradient does not move."""
    sizes = Sizes(1, 1, 5, 2, 18, 2, 1, 0)
    kernel, _ = calls(sizes, "right", {"causal": True})
    inputs = {name: x.to(BF16) for name, x in inputs_of(sizes, head_mask=False).items()}
    with nullcontext() if hopper else before_hopper():
        both = outcome(kernel, inputs)
        for name, x in inputs.items():
            rest = {other: fixed for other, fixed in inputs.items() if other != name}
            alone = outcome(partial(kernel, **rest), {name: x})
            assert torch.equal(alone[f"d_{name}"], both[f"d_{name}"])
