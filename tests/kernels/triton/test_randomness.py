"""Dropout: the kernel's masks are the definition's bit for bit."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer.ops import randomness as ops
from tests.kernels.cpu.tools import seed
from tests.ops.tools import randn, untouched

pytest.importorskip("triton")

import triton
import triton.language as tl

from flash_reformer.kernels.triton import randomness as kernels
from flash_reformer.kernels.triton._random import column_words, keep, row_words
from tests.kernels.triton.spying import DTYPES, entered, spoiled

#: Ends, what rounds to an end, and what lies half way between two of the 2**16 steps.
PROBABILITIES = [0.0, 1e-6, 2**-17, 2**-16, 0.05, 0.1, 0.5 - 2**-17, 0.5, 0.9, 1 - 2**-16, 1 - 2**-18, 1.0]
SEEDS = [0, 1, 7, 2**31, 2**63 - 1, -1, -(2**63), 0x632BE59BD9B4E019]
OPERATOR = torch.ops.flash_reformer.triton_dropout.default


@triton.jit
def mask_kernel(ROWS, SEED, OUT, X, W, THRESHOLD: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_W: tl.constexpr):
    """The mask of some rows, as any kernel may ask for it."""
    x, column = tl.arange(0, BLOCK_X), tl.arange(0, BLOCK_W)
    rows = row_words(tl.load(SEED), tl.load(ROWS + x, mask=x < X, other=0))
    columns = column_words(tl.load(SEED), column // 2)
    kept = keep(rows[:, None], columns[None, :], (column % 2)[None, :], THRESHOLD)
    tl.store(OUT + x[:, None] * W + column[None, :], kept, mask=(x[:, None] < X) & (column[None, :] < W))


def mask_of(rows_X: Tensor, width: int, p: float, number: int) -> Tensor:
    out = torch.empty((len(rows_X), width), dtype=torch.bool)
    blocks = {"BLOCK_X": triton.next_power_of_2(len(rows_X)), "BLOCK_W": triton.next_power_of_2(width)}
    mask_kernel[(1,)](rows_X, seed(number), out, len(rows_X), width, THRESHOLD=round(p * 2**16), **blocks)
    return out


@given(
    number=st.one_of(st.sampled_from(SEEDS), st.integers(-(2**63), 2**63 - 1)),
    p=st.one_of(st.sampled_from(PROBABILITIES), st.floats(0, 1)),
    width=st.integers(1, 40),
    rows=st.lists(st.one_of(st.integers(0, 50), st.integers(2**31 - 2, 2**45)), min_size=1, max_size=6),
)
def test_law_masks_are_those_of_the_definition(number: int, p: float, width: int, rows: list[int]) -> None:
    rows_X = torch.tensor(rows)
    assert torch.equal(mask_of(rows_X, width, p, number), ops.keep_mask(seed(number), rows_X, width, p))
    assert kernels.kept_scale(p) == ops.kept_scale(p)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_many_entries_are_those_of_the_definition(p: float) -> None:
    """So many that some draw every number next to the threshold, where rounding and strictness decide."""
    rows = torch.arange(2000)
    mask = mask_of(rows, 511, p, 11)
    assert torch.equal(mask, ops.keep_mask(seed(11), rows, 511, p))
    for other in (p - 2**-16, p + 2**-16):
        steps = round(min(max(other, 0.0), 1.0) * 2**16)
        if steps != round(p * 2**16):
            assert not torch.equal(mask, ops.keep_mask(seed(11), rows, 511, steps / 2**16))


def expected_of(x: Tensor, p: float, number: int) -> Tensor:
    """One product in fp32, rounded once."""
    rows = torch.arange(x[..., 0].numel()).view(x.shape[:-1])
    kept = ops.keep_mask(seed(number), rows, x.shape[-1], p)
    return torch.where(kept, x.float() * torch.tensor(ops.kept_scale(p)), 0.0).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 2**-16, 0.1, 0.5, 1 - 2**-18, 1.0])
@pytest.mark.parametrize("shape", [(5,), (7, 9), (2, 3, 8), (2, 3, 5, 1)], ids=str)
def test_dropout_and_its_gradient(shape: tuple[int, ...], p: float, dtype: torch.dtype) -> None:
    """Each entry times 0 or the scale, and so is its gradient."""
    x, d_out = randn(*shape, seed=1, dtype=dtype).requires_grad_(), randn(*shape, seed=2, dtype=dtype)
    with spoiled(), entered() as names, untouched(x=x, d_out=d_out):
        out = kernels.dropout(x, p, seed(3))
        (gradient,) = torch.autograd.grad(out, x, d_out)
    assert names == ["_dropout_kernel"] * 2
    for actual, given_x in ((out, x.detach()), (gradient, d_out)):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected_of(given_x, p, 3))


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_dropout_equals_the_definition(p: float) -> None:
    x = randn(3, 50, 33, seed=1, dtype=torch.float32)
    assert torch.equal(kernels.dropout(x, p, seed(3)), ops.dropout(x, p, seed(3)))


@pytest.mark.parametrize("shape", [(1, 1300), (9, 513), (300, 40), (5000, 1)], ids=str)
def test_tiles_of_the_usual_size(shape: tuple[int, ...]) -> None:
    x = randn(*shape, seed=1, dtype=torch.bfloat16)
    with spoiled():
        assert torch.equal(kernels.dropout(x, 0.3, seed(9)), expected_of(x, 0.3, 9))


@pytest.mark.parametrize("tile", [4, 32, 64])
def test_tiles_do_not_show(tile: int) -> None:
    x = randn(3, 5, 33, seed=1, dtype=torch.float32)
    with mock.patch.multiple(kernels, _TILE=tile, _MOST_COLUMNS=min(tile, 16)), spoiled():
        assert torch.equal(kernels.dropout(x, 0.3, seed(3)), expected_of(x, 0.3, 3))


def test_what_is_dropped_of_infinity_is_no_number() -> None:
    x = torch.full((4, 8), torch.inf)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="invalid value"):
        dropped = kernels.dropout(x, 0.5, seed(3))
    assert torch.equal(dropped.isnan(), ops.dropout(x, 0.5, seed(3)).isnan())


def test_views_are_read_as_they_are() -> None:
    def dropped(x: Tensor) -> Tensor:
        return kernels.dropout(x, 0.3, seed(3))

    base = torch.full((33, 7, 6), torch.nan)
    base[:, :, ::2] = randn(33, 7, 3, seed=1, dtype=torch.float32)
    for view in (base[:, :, ::2].permute(2, 1, 0), base[:, :, ::2].transpose(1, 2), base[:1, :1, ::2].expand(4, 5, 3)):
        assert torch.equal(dropped(view), dropped(view.contiguous()))
    x = randn(4, 6, seed=1, dtype=torch.float32).requires_grad_()
    # The gradient of a sum has no strides.
    dropped(x).sum().backward()
    assert torch.equal(x.grad, dropped(torch.ones(4, 6)))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_nothing_to_drop(shape: tuple[int, ...]) -> None:
    assert kernels.dropout(torch.ones(shape), 0.5, seed(3)).shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operator_is_registered_as_torch_asks(dtype: torch.dtype) -> None:
    x = randn(2, 3, 5, seed=1, dtype=dtype).requires_grad_()
    torch.library.opcheck(OPERATOR, (x, 0.5, seed(3)))
