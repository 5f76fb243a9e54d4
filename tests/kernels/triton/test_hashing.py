"""Hashing: the kernel's buckets are the definition's, also at ties, in every block and at the border of 16 bits."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import hashing as ops
from tests.kernels.cpu.tools import MASKS, make_mask, strided
from tests.ops import definitions
from tests.ops.tools import randn, untouched

pytest.importorskip("triton")

from flash_reformer.kernels.triton import hashing as kernels
from tests.kernels.triton.spying import DTYPES, entered, spoiled

#: Among them factors that fill no block, one, and some.
FACTORS = [[2], [6], [64], [2, 2], [4, 6], [2, 8, 4], [34], [514], [4, 300, 2]]
OPERATOR = torch.ops.flash_reformer.triton_hash_vectors.default


def tiles(positions: int, rotations: int) -> AbstractContextManager[object]:
    return mock.patch.object(kernels, "_TILES", dict.fromkeys((2, 4), (positions, rotations, 4)))


def draw(B: int, T: int, H: int, D: int, R: int, factors: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return randn(B, T, H, D, seed=T, dtype=dtype), randn(H, D, R, sum(factors) // 2, seed=5, dtype=dtype)


def shortfall(buckets: Tensor, vectors: Tensor, rotations: Tensor, factors: list[int]) -> Tensor:
    """How far below the largest rotated number the one lies that a bucket names, in roundings; its worst digit."""
    rotated = torch.einsum("bthd,hdrm->bhrtm", vectors.double(), rotations.double())
    worst, rest = torch.zeros(buckets.shape, dtype=torch.float64), buckets.long()
    for factor, part in zip(factors, rotated.split([factor // 2 for factor in factors], dim=-1), strict=True):
        both = torch.cat([part, -part], dim=-1)
        best, picked = both.amax(-1), both.gather(-1, (rest % factor).unsqueeze(-1)).squeeze(-1)
        worst = torch.maximum(worst, (best - picked) / (best * torch.finfo(vectors.dtype).eps + 1e-6))
        rest = rest // factor
    return worst


def agree(
    vectors: Tensor, rotations: Tensor, factors: list[int], mask: Tensor | None = None, exact: bool = False
) -> Tensor:
    """The kernel's buckets, which are the definition's in dtype and layout, and in numbers but for near ties."""
    expected = ops.hash_vectors(vectors, rotations, factors, mask)
    with spoiled(), entered() as names, untouched(vectors=vectors, rotations=rotations):
        actual = kernels.hash_vectors(vectors, rotations, factors, mask)
    assert names == (["_hash_kernel"] if expected.numel() else [])
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    if exact:
        assert torch.equal(actual, expected)
        return actual
    differs = actual != expected
    if mask is not None:
        assert not (differs & ~mask[:, None, None, :]).any()
    near = shortfall(torch.where(differs, actual, 0), vectors, rotations, factors)
    assert (near[differs] <= 2).all()
    assert differs.double().mean() <= 0.01 or differs.sum() <= 1
    return actual


@settings(max_examples=30)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 40),
    H=st.integers(1, 3),
    D=st.sampled_from([1, 2, 5, 33]),
    R=st.integers(1, 3),
    factors=st.sampled_from(FACTORS),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(MASKS),
    tile=st.sampled_from([(16, 16), (32, 64), (128, 32)]),
    gaps=st.booleans(),
)
def test_law_buckets_are_those_of_the_definition(
    B: int,
    T: int,
    H: int,
    D: int,
    R: int,
    factors: list[int],
    dtype: torch.dtype,
    mask: str,
    tile: tuple[int, int],
    gaps: bool,
) -> None:
    vectors, rotations = draw(B, T, H, D, R, factors, dtype)
    with tiles(*tile):
        agree(strided(vectors) if gaps else vectors, rotations, factors, make_mask(mask, B, T))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("D", "factors"), [(64, [64, 128]), (128, [512]), (100, [6, 4])], ids=str)
def test_tiles_of_the_usual_size(D: int, factors: list[int], dtype: torch.dtype) -> None:
    """Whole tiles and one that is not full."""
    agree(*draw(1, 150, 2, D, 2, factors, dtype), factors, make_mask("right", 1, 150))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [[2], [6], [2, 8, 4], [130], [4, 66, 2]], ids=str)
def test_ties_take_the_lowest_index(factors: list[int], dtype: torch.dtype) -> None:
    """Small integers are exact in every dtype and tie often, with either sign; zero vectors tie everywhere.

    The definition breaks ties by the index in one row of all numbers; here they are in several blocks.
    """
    vectors, rotations = (x.round().clamp(-1, 1) for x in draw(2, 40, 2, 5, 2, factors, dtype))
    vectors[:, 5] = 0.0
    vectors[:, 6] = -0.0
    with tiles(32, 16):
        buckets = agree(vectors, rotations, factors, exact=True)
    assert (buckets[..., 5:7] == 0).all()
    assert buckets.unique().numel() > 1


def test_ties_between_blocks_and_signs() -> None:
    """The largest magnitude everywhere: a positive number in the last block comes before negative ones in the first."""
    rotations = -torch.ones(1, 1, 1, 40)
    rotations[..., 37] = 1.0
    vectors = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    with tiles(16, 16):
        buckets = agree(vectors, rotations, [80], exact=True)
    assert buckets.tolist() == [[[[37, 0, 0]]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_that_round_to_the_same_number_tie(dtype: torch.dtype) -> None:
    """The second product is larger, yet not in the dtype of the vectors."""
    eps = torch.finfo(dtype).eps
    vectors = torch.tensor([1.0, eps / 4]).to(dtype).view(1, 1, 1, 2)
    rotations = torch.tensor([[1.0, 1.0], [0.0, 1.0]]).to(dtype).view(1, 2, 1, 2)
    assert agree(vectors, rotations, [4], exact=True).tolist() == [[[[0]]]]
    assert agree(vectors.float(), rotations.float(), [4], exact=True).tolist() == [[[[1]]]]


@pytest.mark.parametrize("factors", [[2], [6], [2, 4], [70]], ids=str)
def test_buckets_are_those_of_the_loops(factors: list[int]) -> None:
    """Against the definition that shares nothing with the package."""
    (vectors, rotations), mask = draw(2, 9, 3, 5, 2, factors, torch.float32), make_mask("right", 2, 9)
    buckets = kernels.hash_vectors(vectors, rotations, factors, mask)
    expected = definitions.hash_vectors(vectors.double(), rotations.double(), factors, mask)
    assert torch.equal(buckets.long(), expected)


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
    with tiles(16, 1024):
        buckets = agree(*draw(1, 9, 2, 5, 1, factors, torch.float32), factors, mask)
    assert buckets.dtype == dtype
    assert (buckets[..., 1::2] == torch.tensor(factors).prod()).all()
    assert (buckets >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [[6], [2, 2], [254, 128]], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_none_stays_in_range(value: float, factors: list[int], dtype: torch.dtype) -> None:
    """Whatever bucket it is, it is one of the buckets that are not the extra one."""
    vectors, rotations = draw(1, 6, 1, 3, 2, factors, dtype)
    vectors[0, 2, 0, 1] = value
    # numpy says what it thinks of such numbers; a device does not.
    with np.errstate(all="ignore"):
        buckets = kernels.hash_vectors(vectors, rotations, factors)
    expected = ops.hash_vectors(vectors, rotations, factors)
    assert (buckets >= 0).all()
    assert (buckets < torch.tensor(factors).prod()).all()
    clean = torch.arange(6) != 2
    assert torch.equal(buckets[..., clean], expected[..., clean])


def test_views_of_everything() -> None:
    vectors, rotations = draw(2, 20, 3, 5, 2, [6], torch.float32)
    mask = make_mask("scattered", 2, 20)
    assert mask is not None
    expected = kernels.hash_vectors(vectors, rotations, [6], mask)
    views = (vectors.transpose(1, 2).contiguous().transpose(1, 2), rotations.mT.contiguous().mT, mask.T.contiguous().T)
    assert not any(view.is_contiguous() for view in views)
    assert torch.equal(kernels.hash_vectors(views[0], views[1], [6], views[2]), expected)


@pytest.mark.parametrize(("B", "T"), [(0, 5), (2, 0)])
def test_nothing_to_hash(B: int, T: int) -> None:
    agree(*draw(B, T, 2, 5, 2, [6], torch.float32), [6], torch.ones(B, T, dtype=torch.bool), exact=True)


def test_hashing_carries_no_gradient_and_repeats() -> None:
    vectors, rotations = draw(1, 6, 1, 3, 2, [6], torch.float32)
    buckets = [kernels.hash_vectors(vectors.requires_grad_(), rotations, [6]) for _ in range(2)]
    assert not buckets[0].requires_grad
    assert torch.equal(*buckets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_is_registered_as_torch_asks(dtype: torch.dtype) -> None:
    vectors, rotations = draw(2, 12, 2, 4, 2, [4, 6], dtype)
    for mask in (None, make_mask("right", 2, 12)):
        torch.library.opcheck(OPERATOR, (vectors, rotations, [4, 6], mask))
