"""Sorting: the kernel's order is the definition's, for 16 and 32 bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer.kernels.cpu import sorting as kernels
from flash_reformer.ops import sorting as ops
from tests.ops import definitions
from tests.ops.tools import generator

DTYPES = [torch.int16, torch.int32]


def agree(buckets: torch.Tensor) -> torch.Tensor:
    order = kernels.sort_positions(buckets)
    assert order.dtype == torch.int64
    assert order.is_contiguous()
    assert torch.equal(order, ops.sort_positions(buckets))
    return order


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 50)),
    dtype=st.sampled_from(DTYPES),
    most=st.sampled_from([0, 1, 5, 255, 256, 32767]),
    seed=st.integers(0, 2**31),
)
def test_law_order_is_that_of_the_definition(shape: tuple[int, ...], dtype: torch.dtype, most: int, seed: int) -> None:
    agree(torch.randint(most + 1, shape, generator=generator(seed)).to(dtype))


@pytest.mark.parametrize("most", [2**16 - 1, 2**16, 2**16 + 1, 2**17, 2**24, 2**31 - 1])
def test_numbers_beyond_16_bits(most: int) -> None:
    """Both halves of a number count, the higher one more; among them those whose lower halves are out of order."""
    buckets = torch.randint(most + 1, (2, 2, 3, 500), generator=generator(most % 1000)).to(torch.int32)
    agree(buckets)
    edges = torch.tensor([most, 0, 65536, 65535, 65537, 131072, 131071, 32768, 32767, 1]).clamp(max=most)
    agree(edges.repeat(7).to(torch.int32).view(1, 1, 1, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_buckets_stay_in_order_of_position(dtype: torch.dtype) -> None:
    """Long rows of few buckets: short ones are sorted stably by accident."""
    high = 1 if dtype == torch.int16 else 65536
    buckets = (torch.randint(3, (1, 2, 2, 5003), generator=generator(2)) * high).to(dtype)
    order = agree(buckets)
    assert ((buckets.long().gather(-1, order) * 5003 + order).diff(dim=-1) > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_is_that_of_the_loops(dtype: torch.dtype) -> None:
    """Against the definition that shares nothing with the package."""
    buckets = torch.randint(4, (2, 3, 2, 13), generator=generator(3)).to(dtype)
    assert torch.equal(kernels.sort_positions(buckets), definitions.sort_positions(buckets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_empty_tensors(dtype: torch.dtype) -> None:
    wide = torch.randint(9, (2, 40, 3, 4), generator=generator(3)).to(dtype)
    agree(wide.permute(0, 2, 3, 1))
    agree(wide[:, ::2].permute(3, 0, 2, 1))
    agree(wide[:1, :, :1, :1].permute(0, 2, 3, 1).expand(2, 3, 2, 40))
    for shape in ((2, 3, 0, 5), (2, 3, 2, 0), (0, 3, 2, 5)):
        agree(torch.zeros(shape, dtype=dtype))
