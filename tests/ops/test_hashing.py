"""Hashing: rotations, buckets, the extra bucket, and how many buckets there are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer.ops import hashing
from tests.ops import definitions
from tests.ops.tools import DTYPES, MASKS, B, D, H, assert_wide_integers, make_mask, randn, untouched

FACTORS = [[2], [6], [14], [2, 2], [4, 6], [6, 4], [2, 8, 4]]
CPU = torch.device("cpu")


def rotations(factors: list[int], R: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return randn(H, D, R, sum(factors) // 2, seed=seed, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("R", [1, 2, 5])
@pytest.mark.parametrize("factors", FACTORS, ids=str)
def test_buckets_are_those_of_the_definition(factors: list[int], R: int, dtype: torch.dtype) -> None:
    vectors, rotation = randn(B, 13, H, D, seed=2, dtype=dtype), rotations(factors, R, dtype=dtype)
    buckets = hashing.hash_vectors(vectors, rotation, factors)
    assert torch.equal(buckets.long(), definitions.hash_vectors(vectors, rotation, factors))
    assert buckets.unique().numel() > 1
    assert buckets.min() >= 0
    assert buckets.max() < math.prod(factors)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("factors", [[6], [4, 6]], ids=str)
def test_masked_positions_go_to_the_extra_bucket(factors: list[int], kind: str) -> None:
    vectors, rotation, mask = randn(B, 11, H, D, seed=3), rotations(factors, 2), make_mask(kind, 11)
    buckets = hashing.hash_vectors(vectors, rotation, factors, mask)
    assert torch.equal(buckets.long(), definitions.hash_vectors(vectors, rotation, factors, mask))
    masked = buckets == math.prod(factors)
    assert torch.equal(masked, torch.zeros_like(masked) if mask is None else ~mask[:, None, None].expand_as(masked))


def test_a_mask_that_hides_nothing_changes_nothing() -> None:
    vectors, rotation = randn(B, 11, H, D, seed=3), rotations([6], 2)
    plain = hashing.hash_vectors(vectors, rotation, [6])
    assert torch.equal(hashing.hash_vectors(vectors, rotation, [6], torch.ones(B, 11, dtype=torch.bool)), plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [[6], [4, 6], [64], [256, 128]], ids=str)
def test_ties_take_the_lowest_index(factors: list[int], dtype: torch.dtype) -> None:
    """Small integers are exact in every dtype and tie often; zero vectors tie everywhere."""
    vectors = randn(B, 17, H, D, seed=4).round().clamp(-1, 1).to(dtype)
    vectors[:, 5] = 0
    rotation = rotations(factors, 2).round().clamp(-1, 1).to(dtype)
    buckets = hashing.hash_vectors(vectors, rotation, factors)
    assert torch.equal(buckets.long(), definitions.hash_vectors(vectors, rotation, factors))
    assert (buckets[..., 5] == 0).all()
    assert buckets.unique().numel() > 1


def test_the_first_factor_is_the_least_significant_digit() -> None:
    """Axis 0 decides digit 0 of 2, axis 1 digit 1 of 4: all eight combinations, written out."""
    vectors = torch.tensor([[x, y, z] for x in (1.0, -1.0) for y, z in ((2, 1), (1, 2), (-2, 1), (1, -2))])
    rotation = torch.eye(3).view(1, 3, 1, 3)
    buckets = hashing.hash_vectors(vectors.view(1, 8, 1, 3), rotation, [2, 4])
    assert buckets.flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


@given(seed=st.integers(0, 2**31), factors=st.sampled_from(FACTORS), R=st.integers(1, 4), power=st.integers(-6, 6))
def test_law_buckets_depend_on_the_direction_alone(seed: int, factors: list[int], R: int, power: int) -> None:
    vectors, rotation = randn(B, 7, H, D, seed=seed, dtype=torch.float32), rotations(factors, R, dtype=torch.float32)
    buckets = hashing.hash_vectors(vectors, rotation, factors)
    assert torch.equal(hashing.hash_vectors(vectors * 2.0**power, rotation, factors), buckets)
    # Opposite vectors land half a digit apart in every factor, so they never share a bucket.
    assert (hashing.hash_vectors(-vectors, rotation, factors) != buckets).all()


@given(seed=st.integers(0, 2**31))
def test_law_batch_heads_and_positions_are_hashed_one_by_one(seed: int) -> None:
    vectors, rotation = randn(B, 7, H, D, seed=seed).mul(4).round(), rotations([4, 6], 2).mul(4).round()
    buckets = hashing.hash_vectors(vectors, rotation, [4, 6])
    swapped = hashing.hash_vectors(vectors.flip(0, 1, 2), rotation.flip(0), [4, 6])
    assert torch.equal(swapped.flip(0, 1, 3), buckets)


@pytest.mark.parametrize(
    ("factors", "dtype"),
    [
        ([2], torch.int16),
        ([32766], torch.int16),
        ([32767], torch.int16),
        ([32768], torch.int32),
        ([128, 254], torch.int16),
        ([256, 128], torch.int32),
        ([128, 256], torch.int32),
        ([512, 1024], torch.int32),
    ],
    ids=str,
)
def test_ids_fit_their_dtype(factors: list[int], dtype: torch.dtype) -> None:
    """K + 1 ids, the extra one included: 32,768 of them fit 16 bits, one more does not."""
    assert hashing.bucket_dtype(factors) == dtype
    assert (math.prod(factors) + 1 <= 32768) == (dtype == torch.int16)
    assert torch.iinfo(dtype).max >= math.prod(factors)


@pytest.mark.parametrize("factors", [[128, 254], [256, 128]], ids=str)
def test_the_extra_bucket_survives_at_the_border(factors: list[int]) -> None:
    vectors, rotation = randn(1, 9, H, D, seed=5), rotations(factors, 1)
    mask = torch.arange(9).view(1, 9) % 2 == 0
    buckets = hashing.hash_vectors(vectors, rotation, factors, mask)
    assert torch.equal(buckets.long(), definitions.hash_vectors(vectors, rotation, factors, mask))
    assert (buckets[..., 1::2] == math.prod(factors)).all()


def test_digits_combine_in_64_bits() -> None:
    factors = hashing.automatic_num_buckets(2**20, 64, 2**20)
    assert factors == [128, 256]
    vectors, rotation = randn(1, 5, H, D, seed=6, dtype=torch.float32), rotations(factors, 8, dtype=torch.float32)
    assert_wide_integers(lambda: hashing.hash_vectors(vectors, rotation, factors))


def test_hashing_carries_no_gradient_and_writes_nothing() -> None:
    vectors, rotation = randn(B, 7, H, D, seed=7).requires_grad_(), rotations([4], 2)
    mask = make_mask("right", 7)
    assert mask is not None
    with untouched(vectors=vectors, rotation=rotation, mask=mask):
        assert not hashing.hash_vectors(vectors, rotation, [4], mask).requires_grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factors", [[6], [4, 6]], ids=str)
def test_rotations_are_those_of_manual_seed_and_randn(factors: list[int], dtype: torch.dtype) -> None:
    state = torch.get_rng_state()
    drawn = hashing.draw_rotations(torch.tensor(17), H, D, 3, factors, dtype, CPU)
    assert torch.equal(torch.get_rng_state(), state), "the default generator moved"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(17)
        expected = torch.randn((H, D, 3, sum(factors) // 2), dtype=dtype)
    assert drawn.dtype == dtype
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, hashing.draw_rotations(torch.tensor(18), H, D, 3, factors, dtype, CPU))


def test_rotations_are_standard_normal() -> None:
    drawn = hashing.draw_rotations(torch.tensor(3), 4, 32, 8, [64], torch.float64, CPU)
    assert abs(drawn.mean().item()) < 0.02
    assert abs(drawn.std().item() - 1) < 0.02


def test_rotations_do_not_read_the_default_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = hashing.draw_rotations(torch.tensor(5), H, D, 1, [4], torch.float32, CPU)
        torch.manual_seed(2)
        assert torch.equal(hashing.draw_rotations(torch.tensor(5), H, D, 1, [4], torch.float32, CPU), first)


@pytest.mark.parametrize("C", [1, 3, 4, 64, 256])
@pytest.mark.parametrize("limit", [1, 512, 4096, 2**19])
def test_automatic_bucket_count_is_the_formula(C: int, limit: int) -> None:
    lengths = sorted({1, 2, 3, C - 1, C, C + 1, 7 * C, 8 * C, 100 * C, 1000, 4096, 65536, 2**19, 2**20} - {0})
    factorised = 0
    for T in lengths:
        factors = hashing.automatic_num_buckets(T, C, limit)
        assert factors == definitions.automatic_num_buckets(T, C, limit), (T, C, limit)
        assert all(factor >= 2 and factor % 2 == 0 for factor in factors)
        factorised += len(factors) == 2
    assert 0 < factorised < len(lengths)


@pytest.mark.parametrize(
    ("T", "C", "limit", "expected"),
    [
        (1, 64, 4096, [2]),
        (64, 64, 4096, [2]),
        (192, 64, 4096, [4]),
        (1024, 64, 4096, [32]),
        (4096, 64, 4096, [128]),
        (8192, 64, 8192, [16, 16]),
        (2**19, 64, 2**19, [128, 128]),
        (65536, 256, 65536, [512]),
        (2**20, 64, 2**20, [128, 256]),
    ],
)
def test_automatic_bucket_count_by_hand(T: int, C: int, limit: int, expected: list[int]) -> None:
    assert hashing.automatic_num_buckets(T, C, limit) == expected
