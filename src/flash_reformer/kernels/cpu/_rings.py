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

from flash_reformer import buffers
from flash_reformer.kernels.cpu._room import Room, room_for
from flash_reformer.kernels.cpu._scores import Facts, Rules, constant_below, set_scores
from flash_reformer.kernels.cpu._slabs import Slab, slabs
from flash_reformer.kernels.cpu.randomness import keep_mask, kept_scale

_KEY_NORM_EPS = 1e-6


@dataclass(frozen=True)
class Rings:
    """One call's rings: the order of rows, what is known of them, the rules, and dropout.

    ``shared`` keys are unit vectors along the queries; others are ``key / sqrt(D)``. ``straight`` rings are in order of
    position, and ``num_heads`` rows apart.
    """

    rows_GNC: Tensor
    facts: Facts
    rules: Rules
    shared: bool
    num_heads: int
    straight: bool
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None

    def slabs(self) -> list[Slab]:
        rules = self.rules
        return list(slabs(self.rows_GNC.shape[0], rules.chunks_per_round, rules.num_rounds, rules.window))

    def within(self, slab: Slab) -> bool:
        """Whether a slab's rows, its neighbours' included, are a part of a straight ring."""
        inside = slab.first >= slab.window.before and slab.last + slab.window.after <= self.rows_GNC.shape[1]
        return self.straight and not slab.whole and inside

    def part(self, slab: Slab, first: int, last: int) -> slice:
        """Return the rows of chunks ``first`` to ``last`` of a slab's straight ring."""
        _, N, C = self.rows_GNC.shape
        batch, head = divmod(slab.rings.start, self.num_heads)
        low, high = ((batch * N + chunk) * C * self.num_heads + head for chunk in (first, last))
        return slice(low, high, self.num_heads)

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


class _Place:
    """Some rows of ``[X, D]``: by number, or as a slice, which is faster."""

    def __init__(self, rows: Tensor | slice) -> None:
        self.rows = rows

    def take(self, x_XD: Tensor, room: Room, name: str) -> Tensor:
        """Return a copy of the rows in the room."""
        if isinstance(self.rows, slice):
            # A view would do, but products of rows that lie apart take half as long again.
            found = x_XD[self.rows]
            return room(name, *found.shape).copy_(found)
        shape = (self.rows.shape[0], x_XD.shape[1])
        if x_XD.dtype != room.dtype:
            return room(name, *shape).copy_(x_XD.index_select(0, self.rows))
        return torch.index_select(x_XD, 0, self.rows, out=room(name, *shape))

    def put(self, x_XD: Tensor, values: Tensor) -> None:
        """Write to the rows."""
        if isinstance(self.rows, slice):
            x_XD[self.rows] = values
        else:
            x_XD.index_copy_(0, self.rows, values)

    def add(self, x_XD: Tensor, values: Tensor) -> None:
        """Add to the rows; one that stands there twice gets both."""
        if isinstance(self.rows, slice):
            x_XD[self.rows] += values
        else:
            x_XD.index_add_(0, self.rows, values)


class _Operands:
    """Queries, keys and values of one slab, gathered and widened."""

    def __init__(self, rings: Rings, slab: Slab, query_XD: Tensor, key_XD: Tensor, value_XD: Tensor, room: Room):
        self.shared = rings.shared
        window, D = rings.rules.window, query_XD.shape[1]
        C, before = window.chunk_length, window.before
        index_Y = slab.around(rings.rows_GNC).reshape(-1)
        n = slab.num_rings * (slab.last - slab.first)
        self.own_rows = slice(0, n * C) if slab.whole else slice(before * C, (before + n) * C)
        self.index = index_Y[self.own_rows]
        self.own, self.around = _Place(self.index), _Place(index_Y)
        if rings.within(slab):
            self.own = _Place(rings.part(slab, slab.first, slab.last))
            self.around = _Place(rings.part(slab, slab.first - before, slab.last + window.after))
        raw_YD = self.around.take(key_XD, room, "key")
        if rings.shared:
            self.scale_Y1 = torch.rsqrt((raw_YD * raw_YD).mean(-1, keepdim=True) + _KEY_NORM_EPS) / math.sqrt(D)
            self.query_nCD = raw_YD[self.own_rows].view(n, C, D)
            self.key_YD = torch.mul(raw_YD, self.scale_Y1, out=room("unit", *raw_YD.shape))
            self.scale = 1.0
        else:
            self.key_YD, self.scale = raw_YD, 1.0 / math.sqrt(D)
            # The scale of keys, applied to fewer numbers.
            self.query_nCD = self.own.take(query_XD, room, "query").mul_(self.scale).unflatten(0, (n, C))
        self.value_YD = self.around.take(value_XD, room, "value")
        self.key_nWD = slab.windows(self.key_YD.unflatten(0, (-1, C)))
        self.value_nWE = slab.windows(self.value_YD.unflatten(0, (-1, C)))

    def scores(self, out_nCW: Tensor) -> Tensor:
        """Write the scores to ``out`` and return it."""
        return torch.bmm(self.query_nCD, self.key_nWD.transpose(1, 2), out=out_nCW)

    def key_gradient(self, d_key_YD: Tensor) -> Tensor:
        """Return the gradient of the rows that keys were made from."""
        if not self.shared:
            return d_key_YD
        along_Y1 = (d_key_YD * self.key_YD).sum(-1, keepdim=True)
        return d_key_YD.addcmul_(self.key_YD, along_Y1, value=-1.0).mul_(self.scale_Y1)


def attend(query_XD: Tensor, key_XD: Tensor, value_XD: Tensor, rings: Rings) -> tuple[Tensor, Tensor]:
    """Return outputs ``[X, D]`` and the log-sum-exp of every slot ``[G, N, C]``, in at least fp32."""
    G, N, C = rings.rows_GNC.shape
    R, window = rings.rules.num_rounds, rings.rules.window
    dtype = torch.promote_types(query_XD.dtype, torch.float32)
    room = room_for(dtype)
    out_XD = buffers.empty(tuple(value_XD.shape), dtype)
    lse_GNC = torch.empty((G, N, C), dtype=dtype)
    # The rounds so far, per row: the largest lse, and the sum of exp(lse - largest). As one number, beside -1e5, that
    # would lose the digits by which rounds are weighted.
    so_far_2X = torch.empty((2, out_XD.shape[0]), dtype=dtype) if R > 1 else None
    for slab in rings.slabs():
        operands = _Operands(rings, slab, query_XD, key_XD, value_XD, room)
        n = operands.query_nCD.shape[0]
        scores_nCW = operands.scores(room("s", n, C, window.width))
        set_scores(scores_nCW, room("t", n, C, window.width), slab, rings.facts, rings.rules, rings.within(slab))
        # torch's softmax takes a quarter of the time of its exp, which is slow for numbers that underflow.
        probs_nCW = torch.softmax(scores_nCW, -1, out=room("t", n, C, window.width))
        # The largest probability is exp(top - lse), and never small.
        lse_nC = scores_nCW.amax(-1).sub_(probs_nCW.amax(-1).log_())
        keep_nCW = rings.keep(slab)
        if keep_nCW is not None:
            torch.mul(probs_nCW, keep_nCW, out=probs_nCW)
        out_nCE = torch.bmm(probs_nCW, operands.value_nWE, out=room("o", n, C, value_XD.shape[1]))
        if keep_nCW is not None:
            out_nCE.mul_(kept_scale(rings.dropout_p))
        elif rings.shared and window.chunks > rings.rules.chunks_per_round + 1:
            # Only here can a window hold a token three times, and a third of three rounded values is not the value.
            alone_nC1 = (lse_nC < constant_below(exclude_self=True)).unsqueeze(-1)
            out_nCE.copy_(torch.where(alone_nC1, operands.value_YD[operands.own_rows].view_as(out_nCE), out_nCE))
        lse_GNC[slab.rings, slab.first : slab.last] = lse_nC.view(slab.num_rings, -1, C)
        if so_far_2X is None:
            operands.own.put(out_XD, out_nCE.flatten(0, 1))
        else:
            _merge(out_XD, so_far_2X, operands.index, out_nCE.flatten(0, 1), lse_nC.flatten(), slab, rings)
    return out_XD, lse_GNC


def _merge(
    out_XD: Tensor, so_far_2X: Tensor, index: Tensor, new_XD: Tensor, lse: Tensor, slab: Slab, rings: Rings
) -> None:
    """Write a slab's outputs, or fold them into what earlier rounds wrote, weighted by ``softmax_r(lse)``.

    A step goes from what is there towards what is new, so rounds that agree leave it exactly as it is.
    """
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
    delta_X: Tensor,
    lse_X: Tensor,
    weights_GNC: Tensor | None,
    rings: Rings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values; with shared keys the first two are one tensor, their sum.

    With ``delta_X = rowsum(dO * O)`` every round's probabilities are parts of one softmax: ``P = w * softmax(s)`` and
    ``dS = P * (m * dO v - delta)``, where w is the round's weight for that row (None: there is one round) and m
    dropout's factor. As w belongs to a row, it is applied to rows. ``lse_X`` is the log-sum-exp over all rounds.
    """
    _, _, C = rings.rows_GNC.shape
    W = rings.rules.window.width
    room = room_for(lse_X.dtype)
    d_query_XD = buffers.zeros(tuple(query_XD.shape), lse_X.dtype)
    d_key_XD = d_query_XD if rings.shared else buffers.zeros(tuple(key_XD.shape), lse_X.dtype)
    d_value_XD = buffers.zeros(tuple(value_XD.shape), lse_X.dtype)
    # Scores that were set are constants. Where such a score weighs anything, all of its row were set.
    constant = constant_below(exclude_self=rings.rules.exclude_self)
    alive_X = (lse_X >= constant).to(lse_X.dtype)
    for slab in rings.slabs():
        operands = _Operands(rings, slab, query_XD, key_XD, value_XD, room)
        index, (n, _, D), E = operands.index, operands.query_nCD.shape, value_XD.shape[1]
        d_out_nCE = operands.own.take(d_out_XD, room, "d_out").unflatten(0, (n, C))
        scores_nCW = operands.scores(room("s", n, C, W))
        set_scores(scores_nCW, room("t", n, C, W), slab, rings.facts, rings.rules, rings.within(slab))
        probs_nCW = torch.softmax(scores_nCW, -1, out=room("t", n, C, W))
        d_scores_nCW = torch.bmm(d_out_nCE, operands.value_nWE.transpose(1, 2), out=room("s", n, C, W))
        kept_nCW, keep_nCW = probs_nCW, rings.keep(slab)
        if keep_nCW is not None:
            kept_nCW = torch.mul(probs_nCW, keep_nCW, out=room("kept", n, C, W)).mul_(kept_scale(rings.dropout_p))
            torch.mul(d_scores_nCW, keep_nCW, out=d_scores_nCW).mul_(kept_scale(rings.dropout_p))
        d_scores_nCW.sub_(delta_X.index_select(0, index).view(n, C, 1)).mul_(probs_nCW)
        factor_nC1 = alive_X.index_select(0, index).view(n, C, 1)
        if weights_GNC is not None:
            weights_nC1 = slab.own(weights_GNC).unsqueeze(-1)
            factor_nC1.mul_(weights_nC1)
            d_out_nCE = torch.mul(d_out_nCE, weights_nC1, out=room("weighted", n, C, E))
        d_value_nWE = torch.bmm(kept_nCW.transpose(1, 2), d_out_nCE, out=room("windows", n, W, E))
        num_chunks = operands.key_YD.shape[0] // C
        operands.around.add(d_value_XD, slab.fold(d_value_nWE, room("folded", num_chunks, C, E)).flatten(0, 1))
        d_query_nCD = torch.bmm(d_scores_nCW, operands.key_nWD, out=room("o", n, C, D)).mul_(
            factor_nC1 * operands.scale
        )
        operands.own.add(d_query_XD, d_query_nCD.flatten(0, 1))
        live_query_nCD = torch.mul(operands.query_nCD, factor_nC1, out=room("live", n, C, D))
        d_key_nWD = torch.bmm(d_scores_nCW.transpose(1, 2), live_query_nCD, out=room("windows", n, W, D))
        d_key_YD = slab.fold(d_key_nWD, room("folded", num_chunks, C, D)).flatten(0, 1)
        operands.around.add(d_key_XD, operands.key_gradient(d_key_YD))
    return d_query_XD, d_key_XD, d_value_XD
