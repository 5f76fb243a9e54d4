"""Which scores are set, by arithmetic on positions: comparisons and masked fills cost ten times as much on a CPU.

A *mark* is a position times 2**31, exact in fp32 up to position 2**23. The difference of two marks is positive and huge
for an earlier key, 0 for the token itself, negative and huge for a later key, so that a minimum with it sets scores and
leaves the others as they are.

Letters: G rings, N chunks of a ring, C chunk length, n chunks of a slab, W keys, R rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_reformer.kernels.cpu._slabs import Slab, Window

FORBIDDEN_SCORE = -1e9
SELF_SCORE = -1e5
_MARK = 2.0**31
MOST_POSITIONS = 2**23


@dataclass(frozen=True)
class Facts:
    """What is known of every slot of the rings, in their order; None where it does not matter.

    Attributes:
        marks_GNC: positions as marks.
        open_GNC: ``inf`` where a key may be read, the forbidden score where it may not.
        labels_GNC: a number per (round, bucket).
        chunks_RGNC: on which chunk of the ring the token of a slot stands in each round.
        buckets_RGNC: its bucket in each round.
    """

    marks_GNC: Tensor
    open_GNC: Tensor | None = None
    labels_GNC: Tensor | None = None
    chunks_RGNC: Tensor | None = None
    buckets_RGNC: Tensor | None = None


@dataclass(frozen=True)
class Rules:
    """Which pairs are set to a score, and which do not exist."""

    window: Window
    causal: bool
    exclude_self: bool
    chunks_per_round: int
    num_rounds: int


def constant_below(*, exclude_self: bool) -> float:
    """Return the log-sum-exp below which a row saw no key but itself, or none: its scores were set, are constants."""
    return 0.9 * (SELF_SCORE if exclude_self else FORBIDDEN_SCORE)


def marks(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """Return positions as marks."""
    return positions.to(dtype).mul_(_MARK)


def set_scores(
    scores_nCW: Tensor, scratch_nCW: Tensor, slab: Slab, facts: Facts, rules: Rules, alike: bool = False
) -> None:
    """Set in place the scores of pairs that may not be or are one token with itself; ``scratch`` is overwritten.

    ``alike`` says that in positions every chunk of the slab stands to its window as the first one does.
    """
    query_nC1, key_n1W = _pair(slab, facts.marks_GNC)
    if alike:
        query_nC1, key_n1W, scratch_nCW = query_nC1[:1], key_n1W[:1], scratch_nCW[:1]
    if rules.exclude_self:
        torch.sub(query_nC1, key_n1W, out=scratch_nCW)
        if facts.open_GNC is not None:
            _set_by_mask(scores_nCW, slab, facts.open_GNC)
        if rules.causal:
            scratch_nCW.add_(SELF_SCORE).clamp_(min=FORBIDDEN_SCORE)
        else:
            scratch_nCW.abs_().add_(SELF_SCORE)
        torch.minimum(scores_nCW, scratch_nCW, out=scores_nCW)
        if facts.open_GNC is not None:
            # A masked token scores itself like any other; this is the one place where a set score is set again.
            torch.sub(query_nC1, key_n1W, out=scratch_nCW)
            scratch_nCW.abs_().neg_().add_(SELF_SCORE)
            torch.maximum(scores_nCW, scratch_nCW, out=scores_nCW)
    else:
        if rules.causal:
            torch.sub(query_nC1 + _MARK / 2, key_n1W, out=scratch_nCW)
            torch.minimum(scores_nCW, scratch_nCW.clamp_(min=FORBIDDEN_SCORE), out=scores_nCW)
        if facts.open_GNC is not None:
            _set_by_mask(scores_nCW, slab, facts.open_GNC)
    _remove_invisible(scores_nCW, slab, facts, rules)
    if facts.chunks_RGNC is not None:
        scores_nCW.sub_(_appearances(scratch_nCW, slab, facts, rules).clamp_(min=1.0).log_())


def _pair(slab: Slab, fact_GNC: Tensor) -> tuple[Tensor, Tensor]:
    """Return a fact of queries ``[n, C, 1]`` and of the keys in their windows ``[n, 1, W]``."""
    return slab.own(fact_GNC).unsqueeze(-1), slab.windows(slab.around(fact_GNC)).unsqueeze(1)


def _set_by_mask(scores_nCW: Tensor, slab: Slab, open_GNC: Tensor) -> None:
    torch.minimum(scores_nCW, slab.windows(slab.around(open_GNC)).unsqueeze(1), out=scores_nCW)


def _remove_invisible(scores_nCW: Tensor, slab: Slab, facts: Facts, rules: Rules) -> None:
    """Give what a query may not look at the score -inf: it does not exist."""
    window = rules.window
    if not window.wrap_around:
        C, first_of_round = window.chunk_length, slab.first % rules.chunks_per_round
        scores = scores_nCW.unflatten(0, (slab.num_rings, -1))
        for chunk in range(scores.shape[1]):
            place = (first_of_round + chunk) % rules.chunks_per_round
            if place < window.before:
                scores[:, chunk, :, : (window.before - place) * C] = -math.inf
            beyond = place + window.after + 1 - rules.chunks_per_round
            if beyond > 0:
                scores[:, chunk, :, window.width - beyond * C :] = -math.inf
    if facts.labels_GNC is not None:
        query_nC1, key_n1W = _pair(slab, facts.labels_GNC)
        scores_nCW.masked_fill_(query_nC1 != key_n1W, -math.inf)


def _appearances(scratch_nCW: Tensor, slab: Slab, facts: Facts, rules: Rules) -> Tensor:
    """Return in how many slots, over all windows of its query, each key appears.

    A pair of rounds decides by two chunk numbers: the key's in one lies ``before`` to ``after`` chunks from the query's
    in the other, on the ring of N chunks, which a window may go around more than once.
    """
    assert facts.chunks_RGNC is not None
    window, R, N = rules.window, rules.num_rounds, rules.chunks_per_round * rules.num_rounds
    counts_nCW = torch.zeros_like(scratch_nCW)
    own_round_only = not window.wrap_around or facts.buckets_RGNC is not None
    turns = range(-(window.chunks // N) - 1, window.chunks // N + 2) if window.wrap_around else range(1)
    middle, half = (window.after - window.before) / 2, (window.after + window.before) / 2
    pairs = [_pair(slab, chunks_GNC) for chunks_GNC in facts.chunks_RGNC]
    for query_round in range(R):
        query_nC1, _ = pairs[query_round]
        for key_round in [query_round] if own_round_only else range(R):
            _, key_n1W = pairs[key_round]
            for turn in turns:
                if not own_round_only and not _can_meet(query_round, key_round, turn, rules):
                    continue
                # 1 where the offset is at most half from the middle, 0 where it is at least one more.
                torch.sub(key_n1W, query_nC1 + (middle - turn * N), out=scratch_nCW)
                inside = scratch_nCW.abs_().neg_().add_(half + 1.0).clamp_(0.0, 1.0)
                if facts.buckets_RGNC is not None:
                    query_bucket, key_bucket = _pair(slab, facts.buckets_RGNC[query_round])
                    inside.masked_fill_(query_bucket != key_bucket, 0.0)
                counts_nCW.add_(inside)
    return counts_nCW


def _can_meet(query_round: int, key_round: int, turn: int, rules: Rules) -> bool:
    """Whether any chunk of one round lies in the window of any chunk of the other, so many turns around the ring."""
    Nr, window = rules.chunks_per_round, rules.window
    nearest_before = (key_round + turn * rules.num_rounds - query_round) * Nr + Nr - 1
    nearest_after = (key_round + turn * rules.num_rounds - query_round) * Nr - (Nr - 1)
    return nearest_before >= -window.before and nearest_after <= window.after
