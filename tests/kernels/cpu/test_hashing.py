"""Hashing: the kernel's buckets are the definition's, also at ties, in every block and at the border of 16 bits."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.kernels.cpu import hashing as kernels
from flash_reformer.ops import hashing as ops
from tests.kernels.cpu.tools import DTYPES, MASKS, make_mask, strided
from tests.ops import definitions
from tests.ops.tools import randn

#: A factor of 2 has one rotation, 508, 510 and 512 lie around the last countdown that fits a byte.
FACTORS = [[2], [6], [64], [2, 2], [2, 6], [4, 6], [2, 8, 4], [508], [510], [512], [514], [1030], [4, 600, 2]]


def rotations_of(H: int, D: int, R: int, factors: list[int]) -> Tensor:
    return randn(H, D, R, sum(factors) // 2, seed=5)


def agree(vectors: Tensor, rotations: Tensor, factors: list[int], mask: Tensor | None = None) -> Tensor:
    """The kernel's buckets, which are the definition's in numbers, dtype and layout."""
    expected = ops.hash_vectors(vectors, rotations, factors, mask)
    actual = kernels.hash_vectors(vectors, rotations, factors, mask)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    assert torch.equal(actual, expected)
    return actual


@settings(max_examples=60)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 20),
    H=st.integers(1, 3),
    D=st.sampled_from([1, 2, 5, 33]),
    R=st.integers(1, 8),
    factors=st.sampled_from(FACTORS),
    mask=st.sampled_from(MASKS),
    slab=st.sampled_from([1, 64, 1000, 2**19]),
    gaps=st.booleans(),
)
def test_law_buckets_are_those_of_the_definition(
    B: int, T: int, H: int, D: int, R: int, factors: list[int], mask: str, slab: int, gaps: bool
) -> None:
    vectors = randn(B, T, H, D, seed=T)
    with mock.patch.object(kernels, "_SLAB", slab):
        agree(strided(vectors) if gaps else vectors, rotations_of(H, D, R, factors), factors, make_mask(mask, B, T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_ties_take_the_lowest_index(factors: list[int], dtype: torch.dtype) -> None:
    """Small integers are exact in every dtype and tie often, with either sign; zero vectors tie everywhere."""
    vectors = randn(2, 40, 3, 5, seed=4).round().clamp(-1, 1).to(dtype)
    vectors[:, 5] = 0.0
    vectors[:, 6] = -0.0
    rotations = rotations_of(3, 5, 2, factors).round().clamp(-1, 1).to(dtype)
    buckets = agree(vectors, rotations, factors)
    assert (buckets[..., 5:7] == 0).all()
    assert buckets.unique().numel() > 1


@pytest.mark.parametrize("factors", [[2], [6], [2, 4], [514]], ids=str)
def test_buckets_are_those_of_the_loops(factors: list[int]) -> None:
    """Against the definition that shares nothing with the package."""
    vectors, rotations, mask = randn(2, 9, 3, 5, seed=3), rotations_of(3, 5, 2, factors), make_mask("right", 2, 9)
    buckets = kernels.hash_vectors(vectors, rotations, factors, mask)
    assert torch.equal(buckets.long(), definitions.hash_vectors(vectors, rotations, factors, mask))


@pytest.mark.parametrize("factors", [[8], [16, 8], [512]], ids=str)
def test_fp32_hashes_what_is_clearly_apart_as_defined(factors: list[int]) -> None:
    """Rotated numbers that lie further apart than rounding goes; the others may fall either way."""
    vectors, rotations = randn(2, 200, 2, 16, seed=3), rotations_of(2, 16, 4, factors)
    rotated = torch.einsum("bthd,hdrm->bhrtm", vectors, rotations)
    clear = torch.ones(rotated.shape[:-1], dtype=torch.bool)
    for digits in rotated.split([factor // 2 for factor in factors], dim=-1):
        top = torch.cat([digits, -digits], dim=-1).topk(2, dim=-1).values
        clear &= top[..., 0] - top[..., 1] > 1e-4
    assert clear.double().mean() > 0.9
    expected = ops.hash_vectors(vectors, rotations, factors)
    actual = kernels.hash_vectors(vectors.float(), rotations.float(), factors)
    assert torch.equal(actual[clear], expected[clear])


@pytest.mark.parametrize(
    ("factors", "dtype"),
    [
        ([32766], torch.int16),
        ([128, 254], torch.int16),
        ([32768], torch.int32),
        ([256, 128], torch.int32),
        ([512, 1024], torch.int32),
    ],
    ids=str,
)
def test_ids_fit_their_dtype_the_extra_one_too(factors: list[int], dtype: torch.dtype) -> None:
    mask = torch.arange(9).view(1, 9) % 2 == 0
    buckets = agree(randn(1, 9, 2, 5, seed=5), rotations_of(2, 5, 1, factors), factors, mask)
    assert buckets.dtype == dtype
    assert (buckets[..., 1::2] == torch.tensor(factors).prod()).all()
    assert (buckets >= 0).all()


def test_blocks_of_the_usual_size_do_not_show() -> None:
    """More rotated numbers than one block holds, and a last block that is not full."""
    vectors, rotations = randn(2, 701, 2, 3, seed=1), rotations_of(2, 3, 4, [128])
    assert kernels._SLAB < 2 * 701 * 2 * 4 * 64
    agree(vectors, rotations, [128], make_mask("scattered", 2, 701))


@pytest.mark.parametrize("factors", [[6], [2, 2], [254, 128]], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_stays_in_range(value: float, factors: list[int]) -> None:
    """Whatever bucket it is, it is one of the buckets that are not the extra one."""
    vectors, rotations = randn(1, 6, 1, 3, seed=1), rotations_of(1, 3, 2, factors)
    vectors[0, 2, 0, 1] = value
    buckets, expected = (room.hash_vectors(vectors, rotations, factors) for room in (kernels, ops))
    assert (buckets >= 0).all()
    assert (buckets < torch.tensor(factors).prod()).all()
    clean = torch.arange(6) != 2
    assert torch.equal(buckets[..., clean], expected[..., clean])


def test_hashing_carries_no_gradient() -> None:
    vectors = randn(1, 6, 1, 3, seed=1).requires_grad_()
    assert not kernels.hash_vectors(vectors, rotations_of(1, 3, 2, [6]), [6]).requires_grad
