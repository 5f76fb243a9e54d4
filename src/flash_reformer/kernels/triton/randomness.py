"""Dropout in one pass over the numbers. X any shape, N rows, W columns."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_reformer.kernels.triton._launch import UNSPECIALIZED, dtype_of, launch, seed_on
from flash_reformer.kernels.triton._random import DROPOUT_STEPS, column_words, keep, row_words, threshold_of
from flash_reformer.kernels.triton._rounding import rounded

#: Entries of a tile, and the most columns that it has.
_TILE, _MOST_COLUMNS = 4096, 512


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dropout_kernel(
    X,
    OUT,
    SEED,
    N,
    W,
    column_tiles,
    scale,
    THRESHOLD: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tile = tl.program_id(0)
    # In 64 bits: the entries may be too many for 32.
    row = (tile // column_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tile % column_tiles) * COLUMNS + tl.arange(0, COLUMNS)
    seed = tl.load(SEED)
    row_word, column_word = row_words(seed, row), column_words(seed, column // 2)
    kept = keep(row_word[:, None], column_word[None, :], (column % 2)[None, :], THRESHOLD)
    inside = (row[:, None] < N) & (column[None, :] < W)
    places = row[:, None] * W + column[None, :]
    x = tl.load(X + places, mask=inside, other=0.0).to(tl.float32)
    # A product in any case: where infinity is dropped there is no number, as defined.
    tl.store(OUT + places, rounded(x * tl.where(kept, scale, 0.0), DTYPE), mask=inside)


def kept_scale(p: float) -> float:
    """Return what kept entries are multiplied by, one over the probability of being kept; 1 where nothing is kept."""
    kept = DROPOUT_STEPS - threshold_of(p)
    return DROPOUT_STEPS / kept if kept else 1.0


@torch.library.custom_op("flash_reformer::triton_dropout", mutates_args=())
def _dropout(x_XW: Tensor, p: float, seed: Tensor) -> Tensor:
    x_XW = x_XW.contiguous()
    result_XW = torch.empty(x_XW.shape, dtype=x_XW.dtype, device=x_XW.device)
    if x_XW.numel() == 0:
        return result_XW
    W = x_XW.shape[-1]
    N = x_XW.numel() // W
    columns = min(triton.next_power_of_2(W), _MOST_COLUMNS)
    rows = min(triton.next_power_of_2(N), _TILE // columns)
    column_tiles = triton.cdiv(W, columns)
    launch(
        _dropout_kernel,
        triton.cdiv(N, rows) * column_tiles,
        x_XW,
        result_XW,
        seed_on(x_XW.device, seed, x_XW),
        N,
        W,
        column_tiles,
        kept_scale(p),
        THRESHOLD=threshold_of(p),
        DTYPE=dtype_of(x_XW),
        ROWS=rows,
        COLUMNS=columns,
        like=x_XW,
        num_warps=4,
    )
    return result_XW


@_dropout.register_fake
def _(x_XW: Tensor, p: float, seed: Tensor) -> Tensor:
    return x_XW.new_empty(x_XW.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.p, seed = inputs
    ctx.save_for_backward(seed)


def _dropout_backward(ctx: Any, grad_XW: Tensor) -> tuple[Tensor, None, None]:
    # Each entry is multiplied by a constant, so the gradient is.
    return _dropout(grad_XW, ctx.p, ctx.saved_tensors[0]), None, None


_dropout.register_autograd(_dropout_backward, setup_context=_remember)


def dropout(x_XW: Tensor, p: float, seed: Tensor) -> Tensor:
    """Return ``x`` with entries zeroed with probability ``p`` and the others scaled up; rows are numbered in order."""
    return _dropout(x_XW, p, seed)
