"""Cross-entropy in one pass over the logits, and its gradient in another. N rows, V classes, X any leading shape."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_reformer.kernels.triton._launch import UNSPECIALIZED, dtype_of, launch
from flash_reformer.kernels.triton._rounding import rounded

#: The label that takes no part in a loss.
IGNORE_INDEX = -100
#: Logits of a tile, and the most columns that it has.
_TILE, _MOST_COLUMNS = 4096, 4096


@triton.jit
def _labels(LABELS, row, N, ignore_index):
    """Return the labels of rows in 64 bits, and which rows count."""
    label = tl.load(LABELS + row, mask=row < N, other=0).to(tl.int64)
    return label, (row < N) & (label != ignore_index)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _loss_kernel(
    LOGITS,
    LABELS,
    LOSSES,
    PEAKS,
    LOG_SUMS,
    N,
    ignore_index,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label, counts = _labels(LABELS, row, N, ignore_index)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = counts[:, None] & (column[None, :] < V)
        x = tl.load(LOGITS + row[:, None] * V + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        new_peak = tl.maximum(peak, tl.max(x, 1))
        # Where all is -inf so far, nothing is subtracted, and the sum stays 0.
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        peak = new_peak
    # Rows that do not count have seen nothing.
    peak, log_sum = tl.where(counts, peak, 0.0), tl.log(tl.where(counts, total, 1.0))
    # A label that is no class gives no number, loudly: nobody may wait for the device to ask.
    known = counts & (label >= 0) & (label < V)
    x_label = tl.load(LOGITS + row * V + label, mask=known, other=float("nan")).to(tl.float32)
    # In this order, large logits cancel before anything small is added.
    tl.store(LOSSES + row, tl.where(counts, (peak - x_label) + log_sum, 0.0), mask=row < N)
    tl.store(PEAKS + row, peak, mask=row < N)
    tl.store(LOG_SUMS + row, log_sum, mask=row < N)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _loss_backward_kernel(
    D_LOSSES,
    LOGITS,
    LABELS,
    PEAKS,
    LOG_SUMS,
    D_LOGITS,
    N,
    ignore_index,
    V: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label, counts = _labels(LABELS, row, N, ignore_index)
    # As in the forward: no class, no number.
    known = (label >= 0) & (label < V)
    d_loss = tl.where(known, tl.load(D_LOSSES + row, mask=counts, other=0.0), float("nan"))
    peak = tl.load(PEAKS + row, mask=counts, other=0.0)
    log_sum = tl.load(LOG_SUMS + row, mask=counts, other=0.0)
    for start in range(0, V, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < N) & (column[None, :] < V)
        places = row[:, None] * V + column[None, :]
        x = tl.load(LOGITS + places, mask=inside & counts[:, None], other=float("-inf")).to(tl.float32)
        probability = tl.exp((x - peak[:, None]) - log_sum[:, None])
        d_x = d_loss[:, None] * tl.where(column[None, :] == label[:, None], probability - 1.0, probability)
        tl.store(D_LOGITS + places, rounded(tl.where(counts[:, None], d_x, 0.0), DTYPE), mask=inside)


def _tiles(N: int, V: int) -> dict[str, Any]:
    columns = min(triton.next_power_of_2(V), _MOST_COLUMNS)
    return {"V": V, "ROWS": min(triton.next_power_of_2(max(N, 1)), max(1, _TILE // columns)), "COLUMNS": columns}


@torch.library.custom_op("flash_reformer::triton_cross_entropy", mutates_args=())
def _cross_entropy(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's loss, largest logit and logarithm of the sum of ``exp(logit - largest)``, all fp32.

    The two are not added up: of a large logit less a large sum little would be left.
    """
    N, V = logits_NV.shape
    losses_N, peaks_N, log_sums_N = (torch.empty(N, dtype=torch.float32, device=logits_NV.device) for _ in range(3))
    tiles = _tiles(N, V)
    launch(
        _loss_kernel,
        triton.cdiv(N, tiles["ROWS"]),
        logits_NV.contiguous(),
        labels_N.contiguous(),
        losses_N,
        peaks_N,
        log_sums_N,
        N,
        ignore_index,
        **tiles,
        like=logits_NV,
        num_warps=4,
    )
    return losses_N, peaks_N, log_sums_N


@_cross_entropy.register_fake
def _(logits_NV: Tensor, labels_N: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    losses_N, peaks_N, log_sums_N = (logits_NV.new_empty(labels_N.shape, dtype=torch.float32) for _ in range(3))
    return losses_N, peaks_N, log_sums_N


@torch.library.custom_op("flash_reformer::triton_cross_entropy_backward", mutates_args=())
def _cross_entropy_backward(
    d_losses_N: Tensor, logits_NV: Tensor, labels_N: Tensor, peaks_N: Tensor, log_sums_N: Tensor, ignore_index: int
) -> Tensor:
    N, V = logits_NV.shape
    d_logits_NV = torch.empty(logits_NV.shape, dtype=logits_NV.dtype, device=logits_NV.device)
    tiles = _tiles(N, V)
    launch(
        _loss_backward_kernel,
        triton.cdiv(N, tiles["ROWS"]),
        d_losses_N.contiguous(),
        logits_NV.contiguous(),
        labels_N.contiguous(),
        peaks_N,
        log_sums_N,
        d_logits_NV,
        N,
        ignore_index,
        **tiles,
        DTYPE=dtype_of(logits_NV),
        like=logits_NV,
        num_warps=4,
    )
    return d_logits_NV


@_cross_entropy_backward.register_fake
def _(
    d_losses_N: Tensor, logits_NV: Tensor, labels_N: Tensor, peaks_N: Tensor, log_sums_N: Tensor, ignore_index: int
) -> Tensor:
    return logits_NV.new_empty(logits_NV.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_NV, labels_N, ctx.ignore_index = inputs
    _, peaks_N, log_sums_N = output
    ctx.save_for_backward(logits_NV, labels_N, peaks_N, log_sums_N)
    # What the forward keeps for the backward is nobody's result.
    ctx.mark_non_differentiable(peaks_N, log_sums_N)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_losses_N: Tensor, *_: None) -> tuple[Tensor, None, None]:
    return _cross_entropy_backward(d_losses_N, *ctx.saved_tensors, ctx.ignore_index), None, None


_cross_entropy.register_autograd(_backward, setup_context=_remember)


def cross_entropy_sum(logits_XV: Tensor, labels_X: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the summed cross-entropy (nats) of labels that are not ``ignore_index``."""
    # Row by row, then summed: in the same order on every run.
    losses_N, _, _ = _cross_entropy(logits_XV.flatten(0, -2), labels_X.flatten(), ignore_index)
    return losses_N.sum()
