"""Scores set by arithmetic on marks: exact up to the last position they allow."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from flash_reformer.kernels.cpu import _scores as scores
from flash_reformer.kernels.cpu import attention as kernels
from flash_reformer.kernels.cpu._slabs import Slab, Window
from flash_reformer.ops.attention import attention_scores
from tests.ops.tools import randn

LAST = scores.MOST_POSITIONS - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_marks_are_exact_and_so_are_their_differences(dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 3, 2**20, 2**21 - 1, 2**21, 2**21 + 1, 2**22 + 5, LAST - 2, LAST - 1, LAST])
    marks = scores.marks(positions, dtype)
    assert marks.dtype == dtype
    unit = int(marks[1])
    assert unit == 2**31
    assert [int(mark) for mark in marks] == [unit * position for position in positions.tolist()]
    differences = marks.unsqueeze(1) - marks
    assert torch.equal(differences.double(), (positions.unsqueeze(1) - positions).double() * unit)
    # Causal scores of the local kind add half a mark before they subtract: the sign must survive at the end too.
    halves = marks.unsqueeze(1) + unit / 2 - marks
    assert torch.equal(halves.double(), ((positions.unsqueeze(1) - positions).double() + 0.5) * unit)


def test_one_position_more_would_not_be_exact() -> None:
    """The limit is no guess: behind it, half a mark is lost."""
    beyond = scores.marks(torch.tensor([scores.MOST_POSITIONS + 1]), torch.float32)
    assert float(beyond + 2.0**30) != float(beyond.double() + 2.0**30)


def set_by_kernel(
    products: Tensor, query: Tensor, key_mask: Tensor | None, window: Window, causal: bool, exclude_self: bool
) -> Tensor:
    """Scores ``[n, C, W]`` of one ring of chunks ``[n, C]`` with these positions."""
    n, C = query.shape
    opened = None
    if key_mask is not None:
        opened = torch.full((1, n, C), torch.inf, dtype=products.dtype).masked_fill(~key_mask, scores.FORBIDDEN_SCORE)
    facts = scores.Facts(scores.marks(query, products.dtype).view(1, n, C), opened)
    rules = scores.Rules(window, causal, exclude_self, chunks_per_round=n, num_rounds=1)
    result = products.clone()
    scores.set_scores(result, torch.empty_like(result), Slab(slice(0, 1), 0, n, True, window), facts, rules)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("causal", "exclude_self", "masked"), list(product([False, True], repeat=3)))
@pytest.mark.parametrize("first", [0, 2**21 - 4, 2**22 - 1, scores.MOST_POSITIONS - 12])
def test_scores_are_set_as_defined_at_any_position(
    first: int, causal: bool, exclude_self: bool, masked: bool, dtype: torch.dtype
) -> None:
    """Neighbouring positions, in no order, at both ends of what marks can say; scores of ordinary and large size."""
    window = Window(3, 1, 1)
    positions = (first + torch.randperm(12, generator=torch.Generator().manual_seed(1))).view(4, 3)
    mask = torch.rand(4, 3, generator=torch.Generator().manual_seed(2)) < 0.5 if masked else None
    around = torch.cat([positions.roll(1, 0), positions, positions.roll(-1, 0)], dim=1)
    key_mask = None if mask is None else torch.cat([mask.roll(1, 0), mask, mask.roll(-1, 0)], dim=1)
    for scale in (1.0, 1e4):
        products = scale * randn(4, 3, 9, seed=3, dtype=dtype)
        actual = set_by_kernel(products, positions, mask, window, causal, exclude_self)
        # The identity as keys: the definition multiplies, and gets these very products.
        expected = attention_scores(
            products,
            torch.eye(9, dtype=dtype).expand(4, 9, 9),
            positions,
            around,
            key_mask,
            causal=causal,
            exclude_self=exclude_self,
        )
        assert torch.equal(actual, expected)


def test_more_positions_than_marks_can_say_are_refused() -> None:
    too_long = torch.zeros(1, 1, 1, 1).expand(1, scores.MOST_POSITIONS + 1, 1, 1)
    order = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    with pytest.raises(AssertionError, match="marks"):
        kernels.lsh_attention(too_long, too_long, order, chunk_length=1)
    with pytest.raises(AssertionError, match="marks"):
        kernels.local_attention(too_long, too_long, too_long, chunk_length=1)
