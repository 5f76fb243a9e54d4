"""Sorting: stable by bucket, ties by position, and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer.ops import sorting
from tests.ops import definitions
from tests.ops.tools import B, H, generator, untouched

DTYPES = [torch.int16, torch.int32, torch.int64]


def draw_buckets(K: int, R: int, T: int, dtype: torch.dtype = torch.int64, seed: int = 1) -> torch.Tensor:
    return torch.randint(K, (B, H, R, T), generator=generator(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "R", "T"), [(2, 1, 7), (3, 2, 13), (5, 5, 29), (64, 3, 31), (1, 2, 11), (4, 1, 1)])
def test_order_is_that_of_the_definition(K: int, R: int, T: int, dtype: torch.dtype) -> None:
    buckets = draw_buckets(K, R, T, dtype)
    order = sorting.sort_positions(buckets)
    assert order.dtype == torch.int64
    assert torch.equal(order, definitions.sort_positions(buckets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sort_is_stable_where_an_unstable_one_would_not_be(dtype: torch.dtype) -> None:
    """Long rows of few buckets: short ones are sorted stably by accident."""
    buckets = torch.randint(3, (1, 1, 2, 5003), generator=generator(2)).to(dtype)
    order = sorting.sort_positions(buckets)
    keys = buckets.long().gather(-1, order) * 5003 + order
    assert (keys.diff(dim=-1) > 0).all()


def test_ids_at_the_border_keep_their_order() -> None:
    """The largest ids of both dtypes: nothing is added to or multiplied with a bucket on the way."""
    for dtype, top in ((torch.int16, 32767), (torch.int32, 2**31 - 1)):
        buckets = torch.tensor([top, 0, top - 1, top, 1, 0], dtype=dtype).view(1, 1, 1, 6)
        assert sorting.sort_positions(buckets).flatten().tolist() == [1, 5, 4, 2, 0, 3]


@given(seed=st.integers(0, 2**31), K=st.integers(1, 40), R=st.integers(1, 5), T=st.integers(1, 41))
def test_law_sort_then_unsort_is_the_identity(seed: int, K: int, R: int, T: int) -> None:
    buckets = draw_buckets(K, R, T, seed=seed)
    order = sorting.sort_positions(buckets)
    inverse = sorting.invert_permutation(order)
    positions = torch.arange(T).expand_as(order)
    assert torch.equal(order.gather(-1, inverse), positions)
    assert torch.equal(inverse.gather(-1, order), positions)
    assert torch.equal(buckets.gather(-1, order).gather(-1, inverse), buckets)
    assert (buckets.gather(-1, order).diff(dim=-1) >= 0).all()


def test_unsorting_is_not_the_sorting() -> None:
    """A permutation that is its own inverse would hide a swap of the two."""
    order = sorting.sort_positions(draw_buckets(5, 2, 13))
    assert not torch.equal(sorting.invert_permutation(order), order)


@pytest.mark.parametrize("shape", [(7,), (2, 7), (2, 3, 4, 7)], ids=str)
def test_inverse_takes_any_leading_shape(shape: tuple[int, ...]) -> None:
    permutation = torch.rand(shape, generator=generator(3)).argsort(-1)
    inverse = sorting.invert_permutation(permutation)
    for row, back in zip(permutation.reshape(-1, 7).tolist(), inverse.reshape(-1, 7).tolist(), strict=True):
        assert [row.index(t) for t in range(7)] == back


def test_writes_nothing() -> None:
    buckets = draw_buckets(4, 2, 13)
    order = sorting.sort_positions(buckets)
    with untouched(buckets=buckets, order=order):
        sorting.sort_positions(buckets)
        sorting.invert_permutation(order)
