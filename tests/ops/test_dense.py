"""The dense oracles: the same attention without chunks, and how often two positions meet."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from flash_reformer.ops import attention, dense
from tests.ops import definitions
from tests.ops.tools import (
    HEAD_MASK,
    MASKS,
    B,
    D,
    H,
    assert_agrees,
    assert_close,
    assert_wide_integers,
    layout_of,
    make_mask,
    randn,
    untouched,
)

GEOMETRIES = [(21, 3, 1, 1, 0), (12, 4, 2, 1, 1), (14, 7, 3, 0, 0), (9, 3, 4, 0, 3), (6, 3, 1, 3, 2), (7, 7, 2, 1, 0)]
LAYOUTS = [{"wrap_around": wrap, "attend_across_buckets": across} for wrap, across in product((True, False), repeat=2)]


def window(C: int, before: int, after: int) -> dict[str, int]:
    return {"chunk_length": C, "num_chunks_before": before, "num_chunks_after": after}


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: "".join("ny"[x] for x in o.values()))
@pytest.mark.parametrize(("T", "C", "R", "before", "after"), GEOMETRIES)
def test_meetings_are_counted(T: int, C: int, R: int, before: int, after: int, options: dict[str, bool]) -> None:
    order, buckets = layout_of(T, R, seed=T)
    layout = {**window(C, before, after), **options}
    counts = dense.meeting_counts(order, buckets, **layout)
    rows = definitions.windows(order, buckets, **layout)
    expected = torch.zeros(B, H, T, T, dtype=torch.long)
    for b, h, i in product(range(B), range(H), range(T)):
        for j, times in definitions.count_appearances(rows, b, h, i, R).items():
            expected[b, h, i, j] = times
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("duplicates", [True, False])
@pytest.mark.parametrize("options", LAYOUTS, ids=lambda o: "".join("ny"[x] for x in o.values()))
@pytest.mark.parametrize(("n", "geometry"), list(enumerate(GEOMETRIES)))
def test_dense_chunked_and_written_out_lsh_attention_agree(
    n: int, geometry: tuple[int, ...], options: dict[str, bool], duplicates: bool
) -> None:
    T, C, R, before, after = geometry
    order, buckets = layout_of(T, R, seed=T)
    mask, head_mask, causal = make_mask(MASKS[(n + duplicates) % 5], T), HEAD_MASK.clone(), n % 2 == 0
    layout = {**window(C, before, after), **options, "causal": causal, "allow_duplicate_attention": duplicates}
    exact = {name: randn(B, T, H, D, seed=seed).requires_grad_() for seed, name in enumerate(("qk", "v"))}
    out, lse, _ = definitions.lsh_attention(*exact.values(), order, buckets, mask, head_mask, **layout)

    def oracle(qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return dense.dense_lsh_attention(qk, v, order, buckets, mask, head_mask.to(v.dtype), **layout)

    def chunked(qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention.lsh_attention(qk, v, order, buckets, mask, head_mask.to(v.dtype), **layout)
        return out, torch.logsumexp(lse, dim=2)

    expected = out, torch.logsumexp(lse, dim=2)
    assert_agrees(oracle, expected, exact, note="dense")
    assert_agrees(chunked, expected, exact, note="chunked")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wrap_around", [False, True])
@pytest.mark.parametrize(("T", "C", "R", "before", "after"), GEOMETRIES)
def test_dense_local_attention(
    T: int, C: int, R: int, before: int, after: int, wrap_around: bool, causal: bool
) -> None:
    """A row without keys averages its window, and counts what stands there twice twice."""
    exact = {name: randn(B, T, H, D, seed=seed).requires_grad_() for seed, name in enumerate(("query", "key", "v"))}
    options = {**window(C, before, after), "wrap_around": wrap_around, "causal": causal}
    for kind in ("none", "right", "whole row"):
        mask, head_mask = make_mask(kind, T), HEAD_MASK.clone()
        out, lse, _ = definitions.local_attention(*exact.values(), mask, head_mask, **options)
        assert_agrees(
            lambda query, key, v, mask=mask, head_mask=head_mask: dense.dense_local_attention(
                query, key, v, mask, head_mask.to(v.dtype), **options
            ),
            (out, lse),
            exact,
            through_lse=kind == "none",
            note=f"under mask {kind}",
        )


def test_counts_weigh_and_zero_removes() -> None:
    """Two positions, worked by hand: key 0 counts three times, key 1 once; then key 0 does not exist."""
    query, key = torch.tensor([1.0]).view(1, 1, 1, 1), torch.tensor([2.0, 3.0]).view(1, 2, 1, 1)
    query = query.expand(1, 2, 1, 1).double()
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1).double()
    counts = torch.tensor([[3, 1], [0, 1]]).view(1, 1, 2, 2)
    out, lse = dense.dense_attention(query, key.double(), value, counts)
    weight = 3 * math.exp(2) / (3 * math.exp(2) + math.exp(3))
    assert abs(out[0, 0].item() - (10 * weight + 20 * (1 - weight))) < 1e-12
    assert out[0, 1].item() == 20.0
    assert abs(lse[0, 0, 0].item() - math.log(3 * math.exp(2) + math.exp(3))) < 1e-12


def test_counts_of_one_everywhere_are_exact_attention() -> None:
    query, key, v = (randn(B, 11, H, D, seed=seed) for seed in range(3))
    mask = make_mask("scattered", 11)
    for causal, exclude_self in product((False, True), repeat=2):
        options = {"causal": causal, "exclude_self": exclude_self}
        out, lse = dense.dense_attention(query, key, v, torch.ones(1, 1, 11, 11, dtype=torch.long), mask, **options)
        expected, expected_lse = attention.exact_attention(query, key, v, mask, **options)
        assert_close(out, expected, 1e-12)
        assert_close(lse, expected_lse, 1e-12)


def test_writes_nothing_and_stays_wide() -> None:
    order, buckets = layout_of(12, 2, seed=3)
    qk, mask = randn(B, 12, H, D, seed=1), make_mask("left", 12)
    assert mask is not None
    with untouched(qk=qk, order=order, buckets=buckets, mask=mask):
        dense.dense_lsh_attention(qk, qk, order, buckets, mask, **window(4, 1, 1), attend_across_buckets=False)
        dense.dense_local_attention(qk, qk, qk, mask, **window(4, 1, 1), wrap_around=False)
    assert_wide_integers(lambda: dense.meeting_counts(order, buckets.to(torch.int16), **window(4, 1, 1)))
