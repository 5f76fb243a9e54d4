"""Seeds and dropout masks against a second statement of their definition, in Python's integers."""

from __future__ import annotations

import math

import pytest
import torch

from flash_reformer.ops import randomness
from tests.ops.tools import untouched

MASK_64, MASK_32 = 2**64 - 1, 2**32 - 1


def splitmix(seed: int, step: int) -> int:
    """splitmix64, as its authors write it, on unsigned words."""
    state = (seed + (step + 1) * 0x9E3779B97F4A7C15) & MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK_64
    return state ^ (state >> 31)


def kept(seed: int, row: int, column: int, p: float) -> bool:
    word = (splitmix(seed, row) ^ splitmix(seed ^ 0x632BE59BD9B4E019, column // 2)) & MASK_32
    word = (word * 0x7FEB352D) & MASK_32
    word = ((word ^ (word >> 15)) * 0x846CA68B) & MASK_32
    word ^= word >> 16
    return (word >> 16 if column % 2 else word & 0xFFFF) >= round(p * 2**16)


@pytest.mark.parametrize("seed", [0, 1, 17, 2**62 + 5, 2**63 - 1])
def test_seeds_and_masks_are_their_definition(seed: int) -> None:
    root, derived = torch.tensor(seed), seed
    for step in (0, 3, 2**40):
        derived = splitmix(derived, step)
    assert int(randomness.derive_seed(root, 0, 3, 2**40)) == derived >> 1
    rows = torch.tensor([[0, 1, 2**31], [2**33 + 7, 5, 2**40]])
    for p in (0.0, 0.05, 0.5, 0.9, 1.0):
        mask = randomness.keep_mask(root, rows, 7, p)
        assert mask.dtype == torch.bool
        expected = [[[kept(seed, int(row), c, p) for c in range(7)] for row in some] for some in rows]
        assert mask.tolist() == expected


@pytest.mark.parametrize("p", [0.05, 0.25, 0.5])
def test_masks_are_fair_and_independent(p: float) -> None:
    """Within five standard errors: the rate, overall and per column, and the agreement of neighbours and of seeds."""
    rows, width = 4096, 130
    masks = [randomness.keep_mask(torch.tensor(seed), torch.arange(rows), width, p).double() for seed in (1, 2)]

    def near(found: float, expected: float, count: int) -> None:
        assert abs(found - expected) < 5 * math.sqrt(expected * (1 - expected) / count)

    one, other = masks
    near(one.mean().item(), 1 - p, one.numel())
    for column in range(width):
        near(one[:, column].mean().item(), 1 - p, rows)
    both = (1 - p) ** 2
    for first, second in [(one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, 2:], one[:, :-2])]:
        near((first * second).mean().item(), both, first.numel())


def test_dropout_scales_what_it_keeps() -> None:
    x = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(1))
    with untouched(x=x):
        dropped = randomness.dropout(x, 0.25, torch.tensor(3))
    mask = randomness.keep_mask(torch.tensor(3), torch.arange(15).view(3, 5), 9, 0.25)
    assert torch.allclose(dropped, torch.where(mask, x / 0.75, 0.0), rtol=1e-6, atol=0.0)
    assert 0 < mask.sum() < mask.numel()
    assert not torch.equal(dropped, randomness.dropout(x, 0.25, torch.tensor(4)))
    assert torch.equal(randomness.dropout(x, 0.0, torch.tensor(3)), x)
    assert (randomness.dropout(x, 1.0, torch.tensor(3)) == 0).all()


def test_derived_seeds_differ_and_are_valid() -> None:
    """Every branch of every root is another seed, a generator takes each, and the order of a path matters."""
    paths = [(a,) for a in range(9)] + [(a, b) for a in range(9) for b in range(9)]
    seeds = {int(randomness.derive_seed(torch.tensor(root), *path)) for root in range(20) for path in paths}
    assert len(seeds) == 20 * len(paths)
    assert all(0 <= seed < 2**63 for seed in seeds)
    for root in (0, 1, 2**63 - 1):
        torch.Generator().manual_seed(int(randomness.derive_seed(torch.tensor(root), 2**40, 3)))
    five = torch.tensor(5)
    assert randomness.derive_seed(five, 1, 2) != randomness.derive_seed(five, 2, 1)


def test_neighbouring_roots_and_branches_share_no_structure() -> None:
    """Half of the 63 bits differ, on average, between neighbours of either kind."""

    def derive(root: int, step: int) -> int:
        return int(randomness.derive_seed(torch.tensor(root), step))

    for pairs in ([((n, 0), (n + 1, 0)) for n in range(200)], [((0, n), (0, n + 1)) for n in range(200)]):
        flips = [(derive(*one) ^ derive(*other)).bit_count() for one, other in pairs]
        assert 30 < sum(flips) / len(flips) < 33
