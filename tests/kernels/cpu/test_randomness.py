"""Dropout: the kernel's masks are the definition's bit for bit, and good ones."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.kernels.cpu import randomness as kernels
from flash_reformer.ops import randomness as ops
from tests.kernels.cpu.tools import DTYPES, seed
from tests.ops.tools import randn

#: Ends, what rounds to an end, and what lies half way between two of the 2**16 steps.
PROBABILITIES = [0.0, 1e-6, 2**-17, 2**-16, 0.05, 0.1, 0.5 - 2**-17, 0.5, 0.9, 1 - 2**-16, 1 - 2**-18, 1.0]
SEEDS = [0, 1, 7, 2**31, 2**63 - 1, -1, -(2**63), 0x632BE59BD9B4E019]


@given(
    number=st.one_of(st.sampled_from(SEEDS), st.integers(-(2**63), 2**63 - 1)),
    p=st.one_of(st.sampled_from(PROBABILITIES), st.floats(0, 1)),
    width=st.integers(1, 40),
    rows=st.lists(st.one_of(st.integers(0, 50), st.integers(2**31 - 2, 2**45)), min_size=1, max_size=6),
)
def test_law_masks_are_those_of_the_definition(number: int, p: float, width: int, rows: list[int]) -> None:
    rows_X = torch.tensor(rows)
    mask = kernels.keep_mask(seed(number), rows_X, width, p)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, ops.keep_mask(seed(number), rows_X, width, p))
    assert kernels.kept_scale(p) == ops.kept_scale(p)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_many_entries_are_those_of_the_definition(p: float) -> None:
    """So many that some draw every number next to the threshold, where rounding and strictness decide."""
    rows = torch.arange(2000)
    mask = kernels.keep_mask(seed(11), rows, 511, p)
    assert torch.equal(mask, ops.keep_mask(seed(11), rows, 511, p))
    for other in (p - 2**-16, p + 2**-16):
        steps = round(min(max(other, 0.0), 1.0) * 2**16)
        if steps != round(p * 2**16):
            assert not torch.equal(mask, ops.keep_mask(seed(11), rows, 511, steps / 2**16))


@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("width", [1, 2, 7, 64, 65])
def test_a_row_is_the_same_whatever_rows_are_asked_for(width: int, p: float) -> None:
    """In any order, one by one, in any shape, and not written to."""
    rows = torch.arange(60)
    whole = kernels.keep_mask(seed(5), rows, width, p)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    assert torch.equal(kernels.keep_mask(seed(5), order, width, p), whole[order])
    assert torch.equal(kernels.keep_mask(seed(5), rows.view(3, 4, 5), width, p), whole.view(3, 4, 5, width))
    assert torch.equal(kernels.keep_mask(seed(5), rows[7:8], width, p), whole[7:8])
    assert torch.equal(kernels.keep_mask(seed(5), torch.tensor(7), width, p), whole[7])
    assert torch.equal(kernels.keep_mask(seed(5), rows[::3], width, p), whole[::3])
    assert torch.equal(rows, torch.arange(60))
    # A narrower mask is the beginning of a wider one.
    assert torch.equal(kernels.keep_mask(seed(5), rows, width + 5, p)[:, :width], whole)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_entries_are_kept_as_often_as_asked_and_independently(p: float) -> None:
    """Within four standard deviations: the mean overall, by row and by column, and agreement of neighbours."""
    rows, width = 2000, 512
    one, two = (kernels.keep_mask(seed(n), torch.arange(rows), width, p).double() for n in (1, 2))
    later = kernels.keep_mask(seed(1), torch.arange(2**33, 2**33 + rows), width, p).double()
    variance = p * (1 - p)
    for mask in (one, two, later):
        assert abs(mask.mean() - (1 - p)) < 4 * (variance / mask.numel()) ** 0.5
        for dim, count in ((0, rows), (1, width)):
            means = (mask.mean(dim) - (1 - p)) * (count / variance) ** 0.5
            # Standardised means of rows or columns: none far off, and spread as independent draws would be.
            assert means.abs().max() < 5.5
            assert abs(means.var() - 1) < 4 * (2 / means.numel()) ** 0.5
    centred = one - (1 - p)
    others = {
        "the next row": centred[1:] * centred[:-1],
        "the next column": centred[:, 1:] * centred[:, :-1],
        "the other half of a word": centred[:, 1::2] * centred[:, ::2],
        "the next word": centred[:, 2:] * centred[:, :-2],
        "the next diagonal": centred[1:, 1:] * centred[:-1, :-1],
        "half the rows on": centred[rows // 2 :] * centred[: rows // 2],
        "half the columns on": centred[:, width // 2 :] * centred[:, : width // 2],
        "another seed": centred * (two - (1 - p)),
        "rows far away": centred * (later - (1 - p)),
    }
    for name, products in others.items():
        deviation = products.mean() / (variance / products.numel() ** 0.5)
        assert abs(deviation) < 4, f"{name}: {deviation:.1f} standard deviations"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", PROBABILITIES)
@pytest.mark.parametrize("shape", [(5,), (7, 9), (2, 3, 8), (2, 3, 5, 1)], ids=str)
def test_dropout_and_its_gradient(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    """Each entry times 0 or the scale, and so is its gradient."""
    x, d_out = randn(*shape, seed=1, dtype=dtype).requires_grad_(), randn(*shape, seed=2, dtype=dtype)
    rows = torch.arange(x[..., 0].numel()).view(shape[:-1])
    kept = ops.keep_mask(seed(3), rows, shape[-1], p)
    out = kernels.dropout(x, p, seed(3))
    (gradient,) = torch.autograd.grad(out, x, d_out)
    for actual, given_x in ((out, x), (gradient, d_out)):
        assert actual.dtype == dtype
        # One product in at least fp32, rounded once.
        wide = torch.promote_types(dtype, torch.float32)
        scaled = (given_x.detach().to(wide) * torch.tensor(ops.kept_scale(p), dtype=wide)).to(dtype)
        assert torch.equal(actual, torch.where(kept, scaled, 0.0))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_equals_the_definition(dtype: torch.dtype, p: float) -> None:
    x = randn(3, 50, 33, seed=1, dtype=dtype)
    assert torch.equal(kernels.dropout(x, p, seed(3)), ops.dropout(x, p, seed(3)))


@pytest.mark.parametrize("block", [1, 20, 100, 2**18])
def test_blocks_do_not_show(block: int) -> None:
    x = randn(3, 7, 33, seed=1)
    whole = kernels.dropout(x, 0.3, seed(3))
    with mock.patch.object(kernels, "_BLOCK", block):
        assert torch.equal(kernels.dropout(x, 0.3, seed(3)), whole)


def test_views_are_read_as_they_are() -> None:
    def dropped(x: Tensor) -> Tensor:
        return kernels.dropout(x, 0.3, seed(3))

    base = torch.full((33, 7, 6), torch.nan)
    base[:, :, ::2] = randn(33, 7, 3, seed=1, dtype=torch.float32)
    for view in (base[:, :, ::2].permute(2, 1, 0), base[:, :, ::2].transpose(1, 2), base[:1, :1, ::2].expand(4, 5, 3)):
        assert torch.equal(dropped(view), dropped(view.contiguous()))
    x = randn(4, 6, seed=1).requires_grad_()
    dropped(x).sum().backward()
    assert torch.equal(x.grad, dropped(torch.ones(4, 6, dtype=torch.float64)))


def test_blocks_of_the_usual_size() -> None:
    x = torch.ones(1100, 511)
    assert x.numel() > kernels._BLOCK
    expected = ops.keep_mask(seed(9), torch.arange(1100), 511, 0.5) * 2.0
    assert torch.equal(kernels.dropout(x, 0.5, seed(9)), expected)
