"""Sorting: the order is the definition's, for 16 and 32 bits, by counting as by torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import sorting as ops
from tests.ops import definitions
from tests.ops.tools import generator, untouched

pytest.importorskip("triton")

from flash_reformer.kernels.triton import sorting as kernels
from tests.kernels.triton.spying import entered, spoiled

DTYPES = [torch.int16, torch.int32]
WAYS = {"torch": kernels._by_torch, "counting": kernels._by_counting}
OPERATOR = torch.ops.flash_reformer.triton_sort_positions.default
#: Numbers of digits that differ, and in which places.
MOST = [0, 1, 255, 256, 32767, 65535, 65536, 65537, 2**24, 2**31 - 1]

Way = Callable[[Tensor], Tensor]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """The operator sorts in this way."""
    monkeypatch.setattr(kernels, "_sort", WAYS[request.param])
    return WAYS[request.param]


def tiles(tile: int, step: int) -> AbstractContextManager[object]:
    return mock.patch.multiple(kernels, _TILE=tile, _STEP=step)


def agree(buckets: Tensor, way: Way) -> Tensor:
    passes = buckets.element_size() if way is kernels._by_counting and buckets.numel() else 0
    with mock.patch.object(kernels, "_sort", way), spoiled(), entered() as names, untouched(buckets=buckets):
        order = kernels.sort_positions(buckets)
    assert names == ["_count_kernel", "_move_kernel"] * passes
    assert order.dtype == torch.int64
    assert order.is_contiguous()
    assert torch.equal(order, ops.sort_positions(buckets))
    return order


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 80)),
    dtype=st.sampled_from(DTYPES),
    most=st.sampled_from(MOST),
    tile=st.sampled_from([(16, 16), (32, 16), (64, 64)]),
    seed=st.integers(0, 2**31),
)
def test_law_order_is_that_of_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, most: int, tile: tuple[int, int], seed: int
) -> None:
    buckets = torch.randint(min(most, torch.iinfo(dtype).max) + 1, shape, generator=generator(seed)).to(dtype)
    with tiles(*tile):
        for each in WAYS.values():
            agree(buckets, each)


@pytest.mark.parametrize("most", [2**16 - 1, 2**16, 2**16 + 1, 2**17, 2**24, 2**31 - 1])
def test_numbers_beyond_16_bits(most: int, way: Way) -> None:
    """Every byte of a number counts, the higher one more; among them those whose lower bytes are out of order."""
    edges = torch.tensor([most, 0, 65536, 65535, 65537, 131072, 131071, 2**24 + 1, 2**24 - 1, 256, 255, 257, 1])
    with tiles(128, 64):
        agree(torch.randint(most + 1, (1, 2, 1, 300), generator=generator(most % 1000)).to(torch.int32), way)
        agree(edges.clamp(max=most).repeat(7).to(torch.int32).view(1, 1, 1, -1), way)


@pytest.mark.parametrize("T", [1, 128, 129, 2048, 5003])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_buckets_stay_in_order_of_position(dtype: torch.dtype, T: int, way: Way) -> None:
    """Few buckets, around the borders of steps and tiles of the usual size."""
    high = 1 if dtype == torch.int16 else 65536
    buckets = (torch.randint(3, (1, 1, 1, T), generator=generator(2)) * high).to(dtype)
    order = agree(buckets, way)
    assert ((buckets.long().gather(-1, order) * T + order).diff(dim=-1) > 0).all()


def test_one_bucket_and_one_bucket_each(way: Way) -> None:
    """All digits equal, all keys different, in order and in reverse."""
    places = torch.arange(2500)
    for buckets in (torch.zeros_like(places), places, 2499 - places, 2499 - places // 2):
        agree(buckets.to(torch.int16).view(1, 1, 1, -1), way)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_is_that_of_the_loops(dtype: torch.dtype, way: Way) -> None:
    """Against the definition that shares nothing with the package."""
    buckets = torch.randint(4, (2, 3, 1, 13), generator=generator(3)).to(dtype)
    with tiles(16, 16):
        assert torch.equal(kernels.sort_positions(buckets), definitions.sort_positions(buckets))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_and_empty_tensors(dtype: torch.dtype, way: Way) -> None:
    wide = torch.randint(9, (2, 40, 3, 4), generator=generator(3)).to(dtype)
    with tiles(64, 64):
        agree(wide.permute(0, 2, 3, 1), way)
        agree(wide[:1, ::2, 1:].permute(3, 0, 2, 1), way)
        agree(wide[:1, :, :1, :1].permute(0, 2, 3, 1).expand(2, 1, 2, 40), way)
    for shape in ((2, 3, 0, 5), (2, 3, 2, 0), (0, 3, 2, 5)):
        agree(torch.zeros(shape, dtype=dtype), way)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_is_registered_as_torch_asks(dtype: torch.dtype, way: Way) -> None:
    buckets = torch.randint(400, (2, 2, 1, 20), generator=generator(4)).to(dtype)
    with tiles(32, 32):
        torch.library.opcheck(OPERATOR, (buckets,))
        torch.library.opcheck(OPERATOR, (buckets.mT.contiguous().mT,))


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(AssertionError, match="int16 or int32"):
        kernels.sort_positions(torch.zeros(1, 1, 1, 4, dtype=torch.int64))
