"""Exact attention in blocks of queries, so that T*T scores never exist.

Letters: B batch, T positions, H heads, D head size, G = B*H, g of them at a time, Q queries of a block, K keys that
they see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flash_reformer.kernels.cpu._scores import FORBIDDEN_SCORE, SELF_SCORE, constant_below
from flash_reformer.kernels.cpu.randomness import keep_mask, kept_scale

#: Scores of one block, and the fewest queries for which a product is worth its overhead.
_BLOCK_SCORES, _FEWEST_QUERIES = 2**19, 64


class Exact(NamedTuple):
    """What decides on scores and dropout."""

    mask_BT: Tensor | None
    causal: bool
    exclude_self: bool
    dropout_p: float
    dropout_seed: Tensor | None


class _Block(NamedTuple):
    """Queries ``start`` to ``stop`` of rows ``rows``; they see keys up to ``seen``."""

    rows: slice
    start: int
    stop: int
    seen: int


def _blocks(num_rows: int, T: int, exact: Exact) -> Iterator[_Block]:
    # A row that may read no key at all averages all of them, later ones included. With exclude_self it has itself.
    all_keys = not exact.causal or (exact.mask_BT is not None and not exact.exclude_self)
    queries = min(T, max(_FEWEST_QUERIES, _BLOCK_SCORES // max(1, T)))
    together = max(1, _BLOCK_SCORES // max(1, queries * T))
    for row in range(0, num_rows, together):
        for start in range(0, T, max(1, queries)):
            stop = min(start + queries, T)
            yield _Block(slice(row, min(row + together, num_rows)), start, stop, T if all_keys else stop)


def _by_head(x_BTHD: Tensor) -> Tensor:
    """Return ``[G, T, D]`` in at least fp32, contiguous."""
    wide = torch.promote_types(x_BTHD.dtype, torch.float32)
    return x_BTHD.transpose(1, 2).to(wide).contiguous().flatten(0, 1)


def _back(x_GTD: Tensor, like_BTHD: Tensor) -> Tensor:
    B, T, H, D = like_BTHD.shape
    return x_GTD.view(B, H, T, D).transpose(1, 2).to(like_BTHD.dtype).contiguous()


def _bmm(x_GAB: Tensor, y_GBC: Tensor) -> Tensor:
    """Return the products in the precision of the operands: autocast leaves those that are given their room alone."""
    return torch.bmm(x_GAB, y_GBC, out=x_GAB.new_empty(x_GAB.shape[0], x_GAB.shape[1], y_GBC.shape[2]))


def _scores(query_GTD: Tensor, key_GTD: Tensor, block: _Block, exact: Exact, num_heads: int) -> Tensor:
    scores_gQK = _bmm(query_GTD[block.rows, block.start : block.stop], key_GTD[block.rows, : block.seen].mT)
    if exact.causal:
        # Minima are ten times as fast as masked fills.
        size = block.stop - block.start
        own_QQ = torch.full((size, size), torch.inf, dtype=scores_gQK.dtype)
        own_QQ.masked_fill_(torch.ones(size, size, dtype=torch.bool).triu_(1), FORBIDDEN_SCORE)
        own_gQQ = scores_gQK[:, :, block.start : block.stop]
        torch.minimum(own_gQQ, own_QQ, out=own_gQQ)
        scores_gQK[:, :, block.stop :] = FORBIDDEN_SCORE
    if exact.mask_BT is not None:
        batch = torch.arange(block.rows.start, block.rows.stop).div(num_heads, rounding_mode="floor")
        hidden_g1K = ~exact.mask_BT[:, : block.seen].index_select(0, batch).unsqueeze(1)
        scores_gQK.masked_fill_(hidden_g1K, FORBIDDEN_SCORE)
    if exact.exclude_self:
        scores_gQK[:, :, block.start : block.stop].diagonal(dim1=1, dim2=2).fill_(SELF_SCORE)
    return scores_gQK


def _keep(block: _Block, exact: Exact, T: int) -> Tensor | None:
    if exact.dropout_p == 0.0:
        return None
    assert exact.dropout_seed is not None, "dropout needs a seed"
    rows = torch.arange(block.rows.start, block.rows.stop).unsqueeze(-1) * T
    return keep_mask(exact.dropout_seed, rows + torch.arange(block.start, block.stop), T, exact.dropout_p)[
        ..., : block.seen
    ]


def attend_exactly(query_BTHD: Tensor, key_BTHD: Tensor, v_BTHD: Tensor, exact: Exact) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, T, H, D]`` and the log-sum-exp ``[B, H, T]``."""
    B, T, H, D = query_BTHD.shape
    query_GTD, key_GTD, value_GTD = map(_by_head, (query_BTHD, key_BTHD, v_BTHD))
    out_GTD = torch.empty_like(value_GTD)
    lse_GT = torch.empty(query_GTD.shape[:2], dtype=query_GTD.dtype)
    for block in _blocks(B * H, T, exact):
        scores_gQK = _scores(query_GTD, key_GTD, block, exact, H)
        probs_gQK = torch.softmax(scores_gQK, -1)
        # The largest probability is exp(top - lse), and never small.
        lse_gQ = scores_gQK.amax(-1).sub_(probs_gQK.amax(-1).log_())
        keep_gQK = _keep(block, exact, T)
        if keep_gQK is not None:
            torch.mul(probs_gQK, keep_gQK, out=probs_gQK)
        out_gQD = _bmm(probs_gQK, value_GTD[block.rows, : block.seen])
        if keep_gQK is not None:
            out_gQD.mul_(kept_scale(exact.dropout_p))
        out_GTD[block.rows, block.start : block.stop] = out_gQD
        lse_GT[block.rows, block.start : block.stop] = lse_gQ
    return _back(out_GTD, v_BTHD), lse_GT.view(B, H, T)


def attend_exactly_backward(
    d_out_BTHD: Tensor,
    out_BTHD: Tensor,
    lse_BHT: Tensor,
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    exact: Exact,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    B, T, H, D = query_BTHD.shape
    query_GTD, key_GTD, value_GTD, d_out_GTD, out_GTD = map(
        _by_head, (query_BTHD, key_BTHD, v_BTHD, d_out_BTHD, out_BTHD)
    )
    delta_GT1 = (d_out_GTD * out_GTD).sum(-1, keepdim=True)
    # Scores that were set are constants. Where such a score weighs anything, all of its row were set.
    constant = constant_below(exclude_self=exact.exclude_self)
    alive_GT1 = (lse_BHT.flatten(0, 1).unsqueeze(-1) >= constant).to(query_GTD.dtype)
    live_query_GTD = query_GTD * alive_GT1
    d_query_GTD, d_key_GTD, d_value_GTD = (torch.zeros_like(x) for x in (query_GTD, key_GTD, value_GTD))
    for block in _blocks(B * H, T, exact):
        rows, queries, keys = block.rows, slice(block.start, block.stop), slice(0, block.seen)
        probs_gQK = torch.softmax(_scores(query_GTD, key_GTD, block, exact, H), -1)
        d_scores_gQK = _bmm(d_out_GTD[rows, queries], value_GTD[rows, keys].mT)
        kept_gQK, keep_gQK = probs_gQK, _keep(block, exact, T)
        if keep_gQK is not None:
            kept_gQK = torch.mul(probs_gQK, keep_gQK).mul_(kept_scale(exact.dropout_p))
            torch.mul(d_scores_gQK, keep_gQK, out=d_scores_gQK).mul_(kept_scale(exact.dropout_p))
        d_value_GTD[rows, keys] += _bmm(kept_gQK.mT, d_out_GTD[rows, queries])
        d_scores_gQK.sub_(delta_GT1[rows, queries]).mul_(probs_gQK)
        d_query_GTD[rows, queries] = _bmm(d_scores_gQK, key_GTD[rows, keys]).mul_(alive_GT1[rows, queries])
        d_key_GTD[rows, keys] += _bmm(d_scores_gQK.mT, live_query_GTD[rows, queries])
    return _back(d_query_GTD, query_BTHD), _back(d_key_GTD, key_BTHD), _back(d_value_GTD, v_BTHD)
