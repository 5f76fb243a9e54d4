"""Attention of chunks to their windows on rings, forward and backward, slab by slab.

What LSH and local attention share. Rows are those of ``[B*T*H, D]``; a ring is the order of the rows of one batch row
and head, all rounds end to end. Letters: G rings, R rounds, N chunks of a ring, C chunk length, D head size, X rows,
n chunks of a slab, W keys of a window, Y rows that a slab touches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_reformer.kernels.cpu._scores import Facts, Rules, constant_below, set_scores
from flash_reformer.kernels.cpu._slabs import Slab, slabs
from flash_reformer.kernels.cpu.randomness import keep_mask, kept_scale

_KEY_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Rings:
    """One call's rings: the order of rows, what is known of them, the rules, and dropout.

    ``shared`` keys are unit vectors along the queries; others are ``key / sqrt(D)``.
    """

    rows_GNC: Tensor
    facts: Facts
    rules: Rules
    shared: bool
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    def slabs(self) -> list[Slab]:
        rules = self.rules
        return list(slabs(self.rows_GNC.shape[0], rules.chunks_per_round, rules.num_rounds, rules.window))

    def keep(self, slab: Slab) -> Tensor | None:
        """Return bool ``[n, C, W]``: which probabilities dropout keeps; None for all."""
        if self.dropout_p == 0.0:
            return None
        assert self.dropout_seed is not None, "dropout needs a seed"
        _, N, C = self.rows_GNC.shape
        n = slab.num_rings * (slab.last - slab.first)
        first = slab.rings.start * N + slab.first
        slots_nC = torch.arange(first * C, (first + n) * C).view(n, C)
        return keep_mask(self.dropout_seed, slots_nC, self.rules.window.width, self.dropout_p)


class _Room:
    """The buffers of one call: made once, used by every slab, shared with nobody."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = torch.empty(size, dtype=self._dtype)
        return flat[:size].view(shape)


class _Operands:
    """Queries, keys and values of one slab, gathered and widened."""

    def __init__(self, rings: Rings, slab: Slab, query_XD: Tensor, key_XD: Tensor, value_XD: Tensor, room: _Room):
        self.slab, self.shared = slab, rings.shared
        C, before = rings.rules.window.chunk_length, rings.rules.window.before
        D = query_XD.shape[1]
        self.index_Y = slab.around(rings.rows_GNC).reshape(-1)
        n = slab.num_rings * (slab.last - slab.first)
        self.own = slice(0, n * C) if slab.whole else slice(before * C, (before + n) * C)
        self.index = self.index_Y[self.own]
        raw_YD = _gather(key_XD, self.index_Y, room, "key")
        if rings.shared:
            self.scale_Y1 = torch.rsqrt((raw_YD * raw_YD).mean(-1, keepdim=True) + _KEY_NORM_EPS) / math.sqrt(D)
            self.query_nCD = raw_YD[self.own].view(n, C, D)
            self.key_YD = torch.mul(raw_YD, self.scale_Y1, out=room("unit", *raw_YD.shape))
        else:
            self.query_nCD = _gather(query_XD, self.index, room, "query").view(n, C, D)
            self.key_YD = raw_YD.mul_(1.0 / math.sqrt(D))
        self.value_YD = _gather(value_XD, self.index_Y, room, "value")
        self.key_nWD = slab.windows(self.key_YD.view(-1, C, D))
        self.value_nWD = slab.windows(self.value_YD.view(-1, C, D))

    def key_gradient(self, d_key_YD: Tensor) -> Tensor:
        """Return the gradient of the rows that keys were made from."""
        if not self.shared:
            return d_key_YD.mul_(1.0 / math.sqrt(d_key_YD.shape[1]))
        along_Y1 = (d_key_YD * self.key_YD).sum(-1, keepdim=True)
        return d_key_YD.addcmul_(self.key_YD, along_Y1, value=-1.0).mul_(self.scale_Y1)


def _gather(x_XD: Tensor, index_Y: Tensor, room: _Room, name: str) -> Tensor:
    shape = (index_Y.shape[0], x_XD.shape[1])
    if x_XD.dtype != room._dtype:
        return room(name, *shape).copy_(x_XD.index_select(0, index_Y))
    return torch.index_select(x_XD, 0, index_Y, out=room(name, *shape))


def attend(query_XD: Tensor, key_XD: Tensor, value_XD: Tensor, rings: Rings) -> tuple[Tensor, Tensor]:
    """Return outputs ``[X, D]`` and the log-sum-exp of every slot ``[G, N, C]``, in at least fp32."""
    G, N, C = rings.rows_GNC.shape
    R, window = rings.rules.num_rounds, rings.rules.window
    dtype = torch.promote_types(query_XD.dtype, torch.float32)
    room = _Room(dtype)
    out_XD = torch.empty(value_XD.shape, dtype=dtype)
    lse_GNC = torch.empty((G, N, C), dtype=dtype)
    # The rounds so far, per row: the largest lse, and the sum of exp(lse - largest). As one number, beside -1e5, that
    # would lose the digits by which rounds are weighted.
    so_far_2X = torch.empty((2, out_XD.shape[0]), dtype=dtype) if R > 1 else None
    for slab in rings.slabs():
        operands = _Operands(rings, slab, query_XD, key_XD, value_XD, room)
        n = operands.query_nCD.shape[0]
        scores_nCW = torch.bmm(operands.query_nCD, operands.key_nWD.transpose(1, 2), out=room("s", n, C, window.width))
        set_scores(scores_nCW, room("t", n, C, window.width), slab, rings.facts, rings.rules)
        # torch's softmax takes a quarter of the time of its exp, which is slow for numbers that underflow.
        probs_nCW = torch.softmax(scores_nCW, -1, out=room("t", n, C, window.width))
        # The largest probability is exp(top - lse), and never small.
        lse_nC = scores_nCW.amax(-1).sub_(probs_nCW.amax(-1).log_())
        keep_nCW = rings.keep(slab)
        if keep_nCW is not None:
            torch.mul(probs_nCW, keep_nCW, out=probs_nCW)
        out_nCD = torch.bmm(probs_nCW, operands.value_nWD, out=room("o", *operands.query_nCD.shape))
        if keep_nCW is not None:
            out_nCD.mul_(kept_scale(rings.dropout_p))
        elif rings.shared and window.chunks > rings.rules.chunks_per_round + 1:
            # Only here can a window hold a token three times, and a third of three rounded values is not the value.
            alone_nC1 = (lse_nC < constant_below(exclude_self=True)).unsqueeze(-1)
            out_nCD.copy_(torch.where(alone_nC1, operands.value_YD[operands.own].view_as(out_nCD), out_nCD))
        lse_GNC[slab.rings, slab.first : slab.last] = lse_nC.view(slab.num_rings, -1, C)
        _merge(out_XD, so_far_2X, operands.index, out_nCD.view(-1, out_XD.shape[1]), lse_nC.flatten(), slab, rings)
    return out_XD, lse_GNC


def _merge(
    out_XD: Tensor, so_far_2X: Tensor | None, index: Tensor, new_XD: Tensor, lse: Tensor, slab: Slab, rings: Rings
) -> None:
    """Write a slab's outputs, or fold them into what earlier rounds wrote, weighted by ``softmax_r(lse)``.

    A step goes from what is there towards what is new, so rounds that agree leave it exactly as it is.
    """
    if so_far_2X is None:
        out_XD.index_copy_(0, index, new_XD)
        return
    per_round = rings.rules.chunks_per_round
    rounds = rings.rules.num_rounds if slab.whole else 1
    by_round = (slab.num_rings, rounds, -1) if slab.whole else (1, 1, -1)
    for r in range(rounds):
        rows = index.view(by_round)[:, r].reshape(-1)
        values = new_XD.view(*by_round, new_XD.shape[1])[:, r].reshape(-1, new_XD.shape[1])
        fresh = lse.view(by_round)[:, r].reshape(-1)
        if r == 0 and slab.first < per_round:
            out_XD.index_copy_(0, rows, values)
            so_far_2X.index_copy_(1, rows, torch.stack([fresh, torch.ones_like(fresh)]))
            continue
        before, total = so_far_2X.index_select(1, rows)
        top = torch.maximum(before, fresh)
        share = torch.exp(fresh - top)
        total = total * torch.exp(before - top) + share
        merged = out_XD.index_select(0, rows).lerp_(values, (share / total).unsqueeze(-1))
        out_XD.index_copy_(0, rows, merged)
        so_far_2X.index_copy_(1, rows, torch.stack([top, total]))


def attend_backward(
    d_out_XD: Tensor,
    query_XD: Tensor,
    key_XD: Tensor,
    value_XD: Tensor,
    out_XD: Tensor,
    lse_X: Tensor,
    weights_GNC: Tensor | None,
    rings: Rings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values; with shared keys the first two are one tensor, their sum.

    With ``delta = rowsum(dO * O)`` every round's probabilities are parts of one softmax: ``P = w * softmax(s)`` and
    ``dS = P * (m * dO v - delta)``, where w is the round's weight for that row (None: there is one round) and m
    dropout's factor. As w belongs to a row, it is applied to rows. ``lse_X`` is the log-sum-exp over all rounds.
    """
    _, _, C = rings.rows_GNC.shape
    W = rings.rules.window.width
    room = _Room(lse_X.dtype)
    d_query_XD = torch.zeros(query_XD.shape, dtype=lse_X.dtype)
    d_key_XD = d_query_XD if rings.shared else torch.zeros_like(d_query_XD)
    d_value_XD = torch.zeros_like(d_query_XD)
    delta_X = row_dots(d_out_XD, out_XD, lse_X.dtype)
    # Scores that were set are constants. Where such a score weighs anything, all of its row were set.
    constant = constant_below(exclude_self=rings.rules.exclude_self)
    alive_X = (lse_X >= constant).to(lse_X.dtype)
    for slab in rings.slabs():
        operands = _Operands(rings, slab, query_XD, key_XD, value_XD, room)
        index, (n, _, D) = operands.index, operands.query_nCD.shape
        d_out_nCD = _gather(d_out_XD, index, room, "d_out").view(n, C, D)
        scores_nCW = torch.bmm(operands.query_nCD, operands.key_nWD.transpose(1, 2), out=room("s", n, C, W))
        set_scores(scores_nCW, room("t", n, C, W), slab, rings.facts, rings.rules)
        probs_nCW = torch.softmax(scores_nCW, -1, out=room("t", n, C, W))
        d_scores_nCW = torch.bmm(d_out_nCD, operands.value_nWD.transpose(1, 2), out=room("s", n, C, W))
        kept_nCW, keep_nCW = probs_nCW, rings.keep(slab)
        if keep_nCW is not None:
            kept_nCW = torch.mul(probs_nCW, keep_nCW, out=room("kept", n, C, W)).mul_(kept_scale(rings.dropout_p))
            torch.mul(d_scores_nCW, keep_nCW, out=d_scores_nCW).mul_(kept_scale(rings.dropout_p))
        d_scores_nCW.sub_(delta_X.index_select(0, index).view(n, C, 1)).mul_(probs_nCW)
        alive_nC1 = alive_X.index_select(0, index).view(n, C, 1)
        if weights_GNC is not None:
            weights_nC1 = slab.own(weights_GNC).unsqueeze(-1)
            alive_nC1 = alive_nC1 * weights_nC1
            d_out_nCD.mul_(weights_nC1)
        d_value_nWD = torch.bmm(kept_nCW.transpose(1, 2), d_out_nCD, out=room("dv", n, W, D))
        folded_YCD = room("folded", operands.index_Y.shape[0] // C, C, D)
        d_value_XD.index_add_(0, operands.index_Y, slab.fold(d_value_nWD, folded_YCD).view(-1, D))
        d_query_nCD = torch.bmm(d_scores_nCW, operands.key_nWD, out=room("o", n, C, D)).mul_(alive_nC1)
        d_query_XD.index_add_(0, index, d_query_nCD.view(-1, D))
        live_query_nCD = torch.mul(operands.query_nCD, alive_nC1, out=room("live", n, C, D))
        d_key_nWD = torch.bmm(d_scores_nCW.transpose(1, 2), live_query_nCD, out=room("dv", n, W, D))
        d_key_YD = operands.key_gradient(slab.fold(d_key_nWD, folded_YCD).view(-1, D))
        d_key_XD.index_add_(0, operands.index_Y, d_key_YD)
    return d_query_XD, d_key_XD, d_value_XD


def row_dots(x_XD: Tensor, y_XD: Tensor, dtype: torch.dtype, block: int = 2**13) -> Tensor:
    """Return the dot product of every row of one matrix with that of the other, without a product of their size."""
    dots = [(x.to(dtype) * y.to(dtype)).sum(-1) for x, y in zip(x_XD.split(block), y_XD.split(block), strict=True)]
    return torch.cat(dots)
