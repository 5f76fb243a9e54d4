"""Laws of attention: what must hold for any input, and what each option is for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import attention
from tests.ops import definitions
from tests.ops.tools import DTYPES, HALF, B, D, H, assert_close, layout_of, make_mask, randn, relative_error, untouched

SEEDS = st.integers(0, 2**31)


def window(C: int, before: int = 1, after: int = 0) -> dict[str, int]:
    return {"chunk_length": C, "num_chunks_before": before, "num_chunks_after": after}


def everyone_alone(T: int, R: int, dtype: torch.dtype, layout: dict[str, Any], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Output and values of a batch in which every key is masked: every row can see itself alone."""
    order, buckets = layout_of(T, R, seed=seed)
    qk, v = randn(B, T, H, D, seed=seed, dtype=dtype), randn(B, T, H, D, seed=seed + 1, dtype=dtype)
    mask = torch.zeros(B, T, dtype=torch.bool)
    return attention.lsh_attention(qk, v, order, buckets, mask, **layout)[0], v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", range(1, 9))
def test_a_row_that_sees_itself_alone_returns_its_own_value(R: int, dtype: torch.dtype) -> None:
    """Bit for bit (FAULTS F10: there, token 0 comes back times R)."""
    order, _ = layout_of(21, R, seed=R)
    qk, v = randn(B, 21, H, D, seed=1, dtype=dtype), randn(B, 21, H, D, seed=2, dtype=dtype)
    out, _ = attention.lsh_attention(qk, v, order, **window(3), causal=True)
    assert torch.equal(out[:, 0], v[:, 0])
    assert not torch.equal(out[:, 1], v[:, 1]), "other rows see others"
    for before, after in ((0, 0), (1, 0), (1, 1)):
        for T, C in ((21, 3), (12, 4), (14, 7), (6, 3)):
            out, v = everyone_alone(T, R, dtype, window(C, before, after))
            assert torch.equal(out, v), (T, C, before, after)


@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", range(1, 9))
def test_so_does_a_row_that_meets_itself_many_times(R: int, dtype: torch.dtype, duplicates: bool) -> None:
    """Rings shorter than their window: a token may stand three, five, seven times in one window."""
    for T, C, before, after in ((6, 3, 1, 2), (6, 3, 2, 2), (3, 3, 1, 1), (3, 3, 3, 3), (8, 4, 3, 3), (14, 7, 3, 2)):
        layout = {**window(C, before, after), "allow_duplicate_attention": duplicates}
        out, v = everyone_alone(T, R, dtype, layout)
        assert torch.equal(out, v), (T, C, before, after)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_does_a_row_whose_bucket_is_empty(dtype: torch.dtype) -> None:
    buckets = torch.arange(12).expand(B, H, 3, 12)
    v = randn(B, 12, H, D, seed=2, dtype=dtype)
    out, _ = attention.lsh_attention(v, v, buckets.contiguous(), buckets, **window(4), attend_across_buckets=False)
    assert torch.equal(out, v)
    out, _ = attention.lsh_attention(v, v, buckets.contiguous(), buckets, **window(4))
    assert not torch.equal(out, v)


@pytest.mark.parametrize("R", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merging_rounds(dtype: torch.dtype, R: int) -> None:
    out, lse = randn(B, H, R, 7, D, seed=1, dtype=dtype), randn(B, H, R, 7, seed=2) * 5
    lse[..., 3] -= 1e5
    lse = lse.to(attention.softmax_dtype(dtype))
    powers = torch.exp(lse.double() - lse.double().amax(2, keepdim=True))
    expected = (out.double() * (powers / powers.sum(2, keepdim=True)).unsqueeze(-1)).sum(2)
    merged = attention.merge_rounds(out, lse)
    assert merged.dtype == dtype
    assert_close(merged, expected, 2 * torch.finfo(dtype).eps * R)
    same = out[:, :, :1].expand_as(out)
    assert torch.equal(attention.merge_rounds(same, lse), out[:, :, 0]), "rounds that agree are returned as they are"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_unit_rows_whatever_the_scale(dtype: torch.dtype) -> None:
    """The norm is taken in at least fp32: squares of 300 overflow fp16, and its sums lose digits."""
    for scale in (1.0, 300.0, 3000.0):
        qk = randn(B, 7, H, 64, seed=1).mul(scale).to(dtype)
        keys = attention.normalize_keys(qk)
        assert keys.dtype == dtype
        expected = torch.stack([definitions.normalized_key(row) for row in qk.double().view(-1, 64)]).view(qk.shape)
        assert_close(keys, expected, torch.finfo(dtype).eps)
        if dtype not in HALF:
            assert (keys.norm(dim=-1) - 1).abs().max() < 1e-5
    zero = attention.normalize_keys(torch.zeros(1, 4, dtype=dtype, requires_grad=True))
    assert (zero == 0).all()


def test_dropout_is_what_its_seed_and_rate_say() -> None:
    probs = torch.rand(B, H, 3, 40, 50, generator=torch.Generator().manual_seed(1)) + 0.5
    with untouched(probs=probs):
        dropped = attention.scale_probs(probs, None, 0.25, torch.tensor(8))
    kept = dropped != 0
    assert abs(kept.double().mean().item() - 0.75) < 0.01
    assert relative_error(dropped[kept], probs[kept] / 0.75) < 1e-6
    assert torch.equal(attention.scale_probs(probs, None, 0.25, torch.tensor(8)), dropped)
    assert not torch.equal(attention.scale_probs(probs, None, 0.25, torch.tensor(9)), dropped)
    assert (kept[0] != kept[1]).any()
    assert (kept[:, 0] != kept[:, 1]).any()
    assert torch.equal(attention.scale_probs(probs, None, 0.0, None), probs)
    assert (attention.scale_probs(probs, None, 1.0, torch.tensor(8)) == 0).all(), "p = 1 keeps nothing, and is not NaN"


def test_head_mask_scales_the_probabilities_of_its_head() -> None:
    for shape in ((B, H, 3, 4, 8), (B, H, 7, 7)):
        probs = randn(*shape, seed=1)
        scaled = attention.scale_probs(probs, torch.tensor([0.0, 0.5, 2.0]), 0.0, None)
        for h, factor in enumerate((0.0, 0.5, 2.0)):
            assert torch.equal(scaled[:, h], probs[:, h] * factor)
        assert scaled.dtype == probs.dtype


def test_every_option_changes_the_result() -> None:
    """An option that is accepted and ignored would pass many a comparison on a tame layout."""
    order, buckets = layout_of(15, 3, seed=3)
    qk, v = randn(B, 15, H, D, seed=1), randn(B, 15, H, D, seed=2)
    plain, _ = attention.lsh_attention(qk, v, order, buckets, **window(3))
    variants: dict[str, dict[str, Any]] = {
        "causal": {"causal": True},
        "wrap_around": {"wrap_around": False},
        "attend_across_buckets": {"attend_across_buckets": False},
        "allow_duplicate_attention": {"allow_duplicate_attention": False},
        "before": {"num_chunks_before": 2},
        "after": {"num_chunks_after": 1},
        "chunk_length": {"chunk_length": 5},
        "mask": {"mask_BT": make_mask("right", 15)},
        "head_mask": {"head_mask_H": torch.tensor([0.5, 1.0, 0.0])},
        "dropout": {"dropout_p": 0.5, "dropout_seed": torch.tensor(1)},
    }
    outputs = {}
    for name, change in variants.items():
        out, _ = attention.lsh_attention(qk, v, order, buckets, **{**window(3), **change})
        assert (out - plain).abs().max() > 1e-2, name
        outputs[name] = out
    assert len({tuple(out.flatten().tolist()) for out in outputs.values()}) == len(variants)


@given(seed=SEEDS, R=st.integers(1, 5), before=st.integers(0, 3), after=st.integers(0, 3), causal=st.booleans())
def test_law_without_duplicates_it_is_the_softmax_over_the_union(
    seed: int, R: int, before: int, after: int, causal: bool
) -> None:
    order, buckets = layout_of(12, R, seed=seed)
    qk, v, mask = randn(B, 12, H, D, seed=seed), randn(B, 12, H, D, seed=seed + 1), make_mask("scattered", 12)
    for across in (True, False):
        layout = {**window(4, before, after), "attend_across_buckets": across}
        out, _ = attention.lsh_attention(
            qk, v, order, buckets, mask, **layout, causal=causal, allow_duplicate_attention=False
        )
        rows = definitions.windows(order, buckets, **layout)
        assert_close(out, definitions.union_attention(qk, v, rows, R, mask, causal), 1e-10)


@given(seed=SEEDS, R=st.integers(1, 4), windows=st.integers(0, 3), causal=st.booleans())
def test_law_one_chunk_that_covers_everything_is_exact_attention(seed: int, R: int, windows: int, causal: bool) -> None:
    """Every key is met equally often, however long the window, so the counts cancel; only the lse knows them."""
    T = 11
    order, _ = layout_of(T, R, seed=seed)
    qk, v, mask = randn(B, T, H, D, seed=seed), randn(B, T, H, D, seed=seed + 1), make_mask("right", T)
    out, lse = attention.lsh_attention(qk, v, order, None, mask, **window(T, windows), causal=causal)
    expected, expected_lse = attention.exact_attention(
        qk, attention.normalize_keys(qk), v, mask, causal=causal, exclude_self=True
    )
    assert_close(out, expected, 1e-12)
    assert_close(lse[:, :, -1], expected_lse + math.log(windows + 1), 1e-12)
    query = randn(B, T, H, D, seed=seed + 2)
    out, _ = attention.local_attention(query, qk, v, mask, **window(T, windows), causal=causal)
    assert_close(out, attention.exact_attention(query, qk / math.sqrt(D), v, mask, causal=causal)[0], 1e-12)


@given(seed=SEEDS, C=st.sampled_from([1, 2, 3, 6]), before=st.integers(0, 3), cut=st.integers(1, 17))
def test_law_local_causal_output_never_depends_on_a_later_token(seed: int, C: int, before: int, cut: int) -> None:
    """Bit for bit, with the ring closed, and although the windows may reach forward."""
    T = 18
    inputs = [randn(B, T, H, D, seed=seed + n) for n in range(3)]
    changed = [torch.cat([x[:, :cut], randn(B, T - cut, H, D, seed=seed + 7 + n)], 1) for n, x in enumerate(inputs)]
    for wrap_around in (True, False):
        options = {**window(C, before, seed % 2), "wrap_around": wrap_around}
        out, lse = attention.local_attention(*inputs, **options, causal=True)
        other, other_lse = attention.local_attention(*changed, **options, causal=True)
        assert torch.equal(out[:, :cut], other[:, :cut])
        assert torch.equal(lse[..., :cut], other_lse[..., :cut])
        assert not torch.equal(out[:, cut:], other[:, cut:])
    free, _ = attention.local_attention(*inputs, **window(6, before, 1))
    other, _ = attention.local_attention(*changed, **window(6, before, 1))
    assert not torch.equal(free[:, :cut], other[:, :cut]), "without the causal mask it does depend"


@given(seed=SEEDS, R=st.integers(2, 4), causal=st.booleans())
def test_law_lsh_never_reads_a_later_token(seed: int, R: int, causal: bool) -> None:
    """With the *layout* held fixed. A later token may move chunk borders; it is never read."""
    T, cut = 12, 5
    order, _ = layout_of(T, R, seed=seed)
    qk, v = randn(B, T, H, D, seed=seed), randn(B, T, H, D, seed=seed + 1)
    other = [torch.cat([x[:, :cut], randn(B, T - cut, H, D, seed=seed + 2)], 1) for x in (qk, v)]
    out, _ = attention.lsh_attention(qk, v, order, **window(4), causal=causal)
    changed, _ = attention.lsh_attention(*other, order, **window(4), causal=causal)
    assert torch.equal(out[:, :cut], changed[:, :cut]) == causal


@given(seed=SEEDS, kind=st.sampled_from(["left", "right", "scattered"]))
def test_law_masked_keys_are_never_read(seed: int, kind: str) -> None:
    T = 12
    order, _ = layout_of(T, 2, seed=seed)
    mask = make_mask(kind, T)
    assert mask is not None
    qk, v = randn(B, T, H, D, seed=seed), randn(B, T, H, D, seed=seed + 1)
    noisy = [torch.where(mask[:, :, None, None], x, x * 7 + 3) for x in (qk, v)]
    for call in (
        lambda a, b, m: attention.lsh_attention(a, b, order, None, m, **window(4)),
        lambda a, b, m: attention.local_attention(a, a, b, m, **window(6, 1, 1)),
    ):
        assert torch.equal(call(qk, v, mask)[0][mask], call(*noisy, mask)[0][mask])
        assert not torch.equal(call(qk, v, None)[0][mask], call(*noisy, None)[0][mask])


@given(seed=SEEDS, R=st.integers(1, 3), across=st.booleans(), duplicates=st.booleans())
def test_law_batch_and_heads_are_computed_one_by_one(seed: int, R: int, across: bool, duplicates: bool) -> None:
    order, buckets = layout_of(12, R, seed=seed)
    qk, v, mask = randn(B, 12, H, D, seed=seed), randn(B, 12, H, D, seed=seed + 1), make_mask("left", 12)
    assert mask is not None
    options = {**window(4), "attend_across_buckets": across, "allow_duplicate_attention": duplicates}
    out, lse = attention.lsh_attention(qk, v, order, buckets, mask, **options)
    swapped, swapped_lse = attention.lsh_attention(
        *(x.flip(0, 2) for x in (qk, v)), order.flip(0, 1), buckets.flip(0, 1), mask.flip(0), **options
    )
    assert_close(swapped.flip(0, 2), out, 1e-12)
    assert_close(swapped_lse.flip(0, 1), lse, 1e-12)
    alone, _ = attention.lsh_attention(qk[1:, :, :1], v[1:, :, :1], order[1:, :1], buckets[1:, :1], mask[1:], **options)
    assert_close(alone, out[1:, :, :1], 1e-12)


@given(seed=SEEDS, before=st.integers(1, 3), after=st.integers(0, 3), across=st.booleans(), duplicates=st.booleans())
def test_law_without_wrap_around_a_round_is_on_its_own(
    seed: int, before: int, after: int, across: bool, duplicates: bool
) -> None:
    """Another order in the other rounds moves nothing in this one, unless duplicates are counted over all rounds."""
    order, buckets = layout_of(12, 3, seed=seed)
    other, other_buckets = layout_of(12, 3, seed=seed + 1)
    other[:, :, 1], other_buckets[:, :, 1] = order[:, :, 1], buckets[:, :, 1]
    qk = randn(B, 12, H, D, seed=seed)
    options = {**window(4, before, after), "attend_across_buckets": across, "allow_duplicate_attention": duplicates}
    lses = [
        attention.lsh_attention(qk, qk, *layout, **options, wrap_around=wrap)[1][:, :, 1]
        for wrap in (False, True)
        for layout in ((order, buckets), (other, other_buckets))
    ]
    if duplicates:
        assert torch.equal(lses[0], lses[1])
        assert across != torch.equal(lses[2], lses[3]), "on the closed ring the neighbours matter, buckets allowing"
    else:
        assert not torch.equal(lses[0], lses[1])


@given(seed=SEEDS, before=st.integers(1, 3), after=st.integers(0, 3), pads=st.integers(1, 3))
def test_law_without_wrap_around_padding_changes_nothing(seed: int, before: int, after: int, pads: int) -> None:
    """FAULTS F14: there, the first chunk moves by 4.0 with the amount of padding."""
    T, C = 12, 4
    inputs = [randn(B, T, H, D, seed=seed + n) for n in range(3)]
    padded = [torch.cat([x, randn(B, pads * C, H, D, seed=seed + 5)], 1) for x in inputs]
    mask = torch.arange(T + pads * C).expand(B, -1) < T
    options = window(C, before, after)
    plain, _ = attention.local_attention(*inputs, **options, wrap_around=False)
    longer, _ = attention.local_attention(*padded, mask, **options, wrap_around=False)
    assert_close(longer[:, :T], plain, 1e-12)
    plain, _ = attention.local_attention(*inputs, **window(C))
    longer, _ = attention.local_attention(*padded, mask, **window(C))
    assert (longer[:, :C] - plain[:, :C]).abs().max() > 1e-3, "with it, the ring closes elsewhere"
