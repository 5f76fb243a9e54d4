"""Decoding with a cache: the place of a new token in the sorted order, its window, and attention to what is cached.

Each head and round keeps the positions of earlier tokens in *order* of (bucket, position). New tokens are not put into
it one by one: the last few, the *recent* ones, stand beside it in order of arrival, and a slot is found in the union of
both by arithmetic. So a step costs nothing that grows with the context; now and then the recent ones are merged in.

Letters: B batch, H heads, R rounds, N positions in the order, T recent positions, M queries, D head size,
C chunk length, W slots of a window, X keys of a query, K1 = K + 2 starts of K buckets. ``starts[k]`` counts the
positions in the order with a bucket below ``k``. B may be 1 where all rows are of one length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_reformer.ops.attention import SELF_SCORE, softmax_dtype


def bucket_starts(sorted_buckets_XN: Tensor, num_starts: int) -> Tensor:
    """Return int32 ``[..., num_starts]``: how many of the sorted buckets are below 0, 1, 2, ...

    >>> bucket_starts(torch.tensor([0, 0, 2]), 5).tolist()
    [0, 2, 2, 3, 3]
    """
    bounds = torch.arange(num_starts, device=sorted_buckets_XN.device, dtype=sorted_buckets_XN.dtype)
    bounds = bounds.expand(*sorted_buckets_XN.shape[:-1], -1)
    return torch.searchsorted(sorted_buckets_XN.contiguous(), bounds.contiguous(), out_int32=True)


def _place_recent(starts_BHRK: Tensor, recent_BHRT: Tensor, present_BHRMT: Tensor, arrivals_BHRT: Tensor) -> Tensor:
    """Return slots ``[B, H, R, M, T]`` of recent tokens in order of (bucket, arrival), in their round.

    Slots never fall along T, also where a token is not there yet: it gets the slot of the next one that is.
    """
    sorted_buckets = recent_BHRT.gather(-1, arrivals_BHRT).long()
    ranks = starts_BHRK.gather(-1, sorted_buckets.add_(1)).unsqueeze(3)
    return ranks + present_BHRMT.cumsum(-1) - present_BHRMT.long()


def _window_slots(
    own_slot_BHRM: Tensor,
    first_slots_XRM: Tensor | None,
    lengths_X11M1: Tensor,
    padded_X11M1: Tensor,
    *,
    before: int,
    chunk_length: int,
    wrap_around: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slots ``[B, H, R, M, W]`` in the windows of slots, and whether they hold a token that may be seen.

    First as numbers through all rounds (round r owns the slots from its first on; None with one round), then within
    their round.
    """
    start = own_slot_BHRM - own_slot_BHRM % chunk_length
    if first_slots_XRM is not None:
        start = start + first_slots_XRM
    around = torch.arange(-before * chunk_length, chunk_length, device=start.device)
    unwrapped = start.unsqueeze(-1) + around
    if first_slots_XRM is None:
        numbers = slots = unwrapped % padded_X11M1
    else:
        numbers = unwrapped % (own_slot_BHRM.shape[2] * padded_X11M1)
        slots = numbers % padded_X11M1
    visible = slots < lengths_X11M1
    if not wrap_around:
        visible &= unwrapped >= (0 if first_slots_XRM is None else first_slots_XRM.unsqueeze(-1))
    return numbers, slots, visible


def _look_up(
    order_BHRN: Tensor,
    arrivals_BHRT: Tensor,
    present_BHMY: Tensor | None,
    keyed_BHMY: Tensor,
    numbers_BHMX: Tensor,
    slots_BHMX: Tensor,
    num_recent_X1M1: Tensor,
    lengths_X1M1: Tensor,
    padded_X1M1: Tensor,
) -> Tensor:
    """Return the positions ``[B, H, M, X]`` that stand in slots of the union of order and recent tokens.

    ``keyed`` are the recent tokens' slots numbered through all rounds, Y = R * T of them, as ``numbers`` are those
    looked for. What is returned for an empty slot is some position or other.
    """
    R, N = order_BHRN.shape[2:]
    found = torch.searchsorted(keyed_BHMY.contiguous(), numbers_BHMX.contiguous(), right=True)
    entry = (found - 1).clamp_(min=0)
    is_recent = keyed_BHMY.gather(-1, entry) == numbers_BHMX
    if present_BHMY is not None:
        is_recent &= present_BHMY.gather(-1, entry)
        found = torch.nn.functional.pad(present_BHMY.cumsum(-1), (1, 0)).gather(-1, found)
    # Recent tokens of earlier rounds are all among the found; those of the slot's own round push it back in the order.
    place = slots_BHMX - found
    if R > 1:
        rounds = (numbers_BHMX - slots_BHMX) // padded_X1M1
        place = rounds * N + (place + rounds * num_recent_X1M1).clamp_(0, N - 1)
    else:
        place = place.clamp_(0, N - 1)
    arrived = arrivals_BHRT.flatten(2).unsqueeze(2).expand(keyed_BHMY.shape).gather(-1, entry)
    in_order = order_BHRN.flatten(2).gather(-1, place.flatten(2)).view(place.shape)
    return torch.where(is_recent, arrived + (lengths_X1M1 - num_recent_X1M1), in_order)


def windows_of_new_tokens(
    order_BHRN: Tensor,
    starts_BHRK: Tensor,
    recent_BHRT: Tensor,
    num_recent_XM: Tensor,
    lengths_XM: Tensor,
    padded_XM: Tensor,
    *,
    complete: bool,
    chunk_length: int,
    num_chunks_before: int,
    wrap_around: bool,
    attend_across_buckets: bool,
) -> tuple[Tensor, Tensor]:
    """Return positions ``[B, H, M, R*W]`` that each query's windows hold, and which of them it may look at.

    Query m is the last of ``lengths[m]`` tokens, laid out on rounds of ``padded[m]`` slots; the last ``num_recent[m]``
    of them are recent, and ``recent`` holds their buckets. ``complete`` says that all T are, in every row and for every
    query: then most of the bookkeeping falls away. A query itself and empty slots are not visible; position 0 is
    returned for them.
    """
    R, T = recent_BHRT.shape[2:]
    M, device = lengths_XM.shape[1], recent_BHRT.device
    sorted_buckets, arrivals = torch.sort(recent_BHRT, dim=-1, stable=True)
    newest_X11M1, lengths_X11M1, padded_X11M1 = (
        x.view(-1, 1, 1, M, 1) for x in (num_recent_XM - 1, lengths_XM, padded_XM)
    )
    present = None
    if complete:
        slots = (starts_BHRK.gather(-1, sorted_buckets.long().add_(1)) + torch.arange(T, device=device)).unsqueeze(3)
    else:
        present = arrivals.unsqueeze(3) <= newest_X11M1
        slots = _place_recent(starts_BHRK, recent_BHRT, present, arrivals)
    own_slot_BHRM = torch.where(arrivals.unsqueeze(3) == newest_X11M1, slots, 0).amax(-1)
    first_slots_XRM = None
    keyed = slots
    if R > 1:
        first_slots_XRM = torch.arange(R, device=device).view(1, 1, R, 1) * padded_X11M1.squeeze(-1)
        keyed = slots + first_slots_XRM.unsqueeze(-1)
    numbers, window_slots, visible = _window_slots(
        own_slot_BHRM,
        first_slots_XRM,
        lengths_X11M1,
        padded_X11M1,
        before=num_chunks_before,
        chunk_length=chunk_length,
        wrap_around=wrap_around,
    )
    if not attend_across_buckets:
        bucket_start = _start_of_own_bucket(starts_BHRK, recent_BHRT, newest_X11M1)
        visible &= (window_slots >= bucket_start) & (window_slots <= own_slot_BHRM.unsqueeze(-1))
        if first_slots_XRM is not None:
            visible &= numbers - window_slots == first_slots_XRM.unsqueeze(-1)
    keyed, numbers, window_slots, visible = map(_by_query, (keyed, numbers, window_slots, visible))
    there = None if present is None else _by_query(present)
    facts = (x.view(-1, 1, M, 1) for x in (num_recent_XM, lengths_XM, padded_XM))
    positions = _look_up(order_BHRN, arrivals, there, keyed, numbers, window_slots, *facts)
    visible &= positions != (lengths_XM - 1).view(-1, 1, M, 1)
    return positions * visible, visible


def _start_of_own_bucket(starts_BHRK: Tensor, recent_BHRT: Tensor, newest_X11M1: Tensor) -> Tensor:
    """Return the first slot ``[B, H, R, M, 1]`` of each query's bucket; it itself stands in the last."""
    newest = newest_X11M1.squeeze(-1).expand(*recent_BHRT.shape[:3], -1)
    bucket = recent_BHRT.gather(-1, newest).unsqueeze(-1)
    arrived = torch.arange(recent_BHRT.shape[-1], device=recent_BHRT.device) <= newest_X11M1
    below = (recent_BHRT.unsqueeze(3) < bucket) & arrived
    return (starts_BHRK.gather(-1, bucket.squeeze(-1).long()) + below.sum(-1)).unsqueeze(-1)


def _by_query(x_BHRMX: Tensor) -> Tensor:
    """Return ``[B, H, M, R*X]``."""
    return x_BHRMX.squeeze(2) if x_BHRMX.shape[2] == 1 else x_BHRMX.transpose(2, 3).flatten(3)


def merge_recent(
    order_BHRN: Tensor, starts_BHRK: Tensor, recent_BHRT: Tensor, first_B: Tensor, num_recent_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return order ``[B, H, R, N+T]`` and starts with each row's recent positions merged in: O(N), without a sort."""
    B, H, R, T = recent_BHRT.shape
    N, K1 = order_BHRN.shape[-1], starts_BHRK.shape[-1]
    arrivals = torch.sort(recent_BHRT, dim=-1, stable=True).indices
    present = (arrivals < num_recent_B.view(-1, 1, 1, 1)).unsqueeze(3)
    slots = _place_recent(starts_BHRK, recent_BHRT, present, arrivals)
    # Who does not count goes to a slot past the end.
    slots = torch.where(present, slots, N + T).squeeze(3)
    taken = torch.zeros(B, H, R, N + T + 1, dtype=torch.int32, device=order_BHRN.device)
    taken.scatter_(-1, slots, 1)
    ranks = torch.arange(N + T + 1, dtype=torch.int32, device=order_BHRN.device) - taken.cumsum(-1, dtype=torch.int32)
    merged = order_BHRN.gather(-1, ranks.clamp_(0, N - 1).long())
    merged.scatter_(-1, slots, (arrivals + first_B.view(-1, 1, 1, 1)).to(merged.dtype))
    counted = torch.arange(T, device=order_BHRN.device) < num_recent_B.view(-1, 1, 1, 1)
    added = torch.zeros(B, H, R, K1 + 1, dtype=torch.int32, device=order_BHRN.device)
    # One place further: a start counts the buckets below it.
    added.scatter_add_(-1, recent_BHRT.long() + 1, counted.int().expand(recent_BHRT.shape))
    return merged[..., : N + T], starts_BHRK + added.cumsum(-1, dtype=torch.int32)[..., :K1]


def drop_positions(order_BHRN: Tensor, starts_BHRK: Tensor, lengths_B: Tensor, kept_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return order and starts without the positions from ``kept`` on; of each row the first ``lengths`` count."""
    N = order_BHRN.shape[-1]
    stays = (order_BHRN < kept_B.view(-1, 1, 1, 1)) & (
        torch.arange(N, device=order_BHRN.device) < lengths_B.view(-1, 1, 1, 1)
    )
    ranks = stays.cumsum(-1)
    places = torch.where(stays, ranks - 1, N)
    kept = order_BHRN.new_zeros(*order_BHRN.shape[:-1], N + 1).scatter_(-1, places, order_BHRN)
    counted = torch.nn.functional.pad(ranks, (1, 0))
    return kept[..., :N], counted.gather(-1, starts_BHRK.long()).to(starts_BHRK.dtype)


def window_bias(
    key_positions_XU: Tensor,
    lengths_XM: Tensor,
    padded_XM: Tensor,
    *,
    chunk_length: int,
    num_chunks_before: int,
    wrap_around: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return what local attention adds to the scores ``[B, M, U]`` of each query with the keys at these positions.

    The logarithm of how often a key's chunk stands in the window of the query's, on a ring of ``padded / C`` chunks;
    minus infinity where never, and for later keys. Query m is the last of ``lengths[m]`` tokens.
    """
    C = chunk_length
    ring = (padded_XM // C).unsqueeze(-1)
    ahead = (key_positions_XU // C).unsqueeze(1) - ((lengths_XM - 1) // C).unsqueeze(-1)
    if wrap_around:
        # Offsets o in [-before, 0] with o = ahead modulo the ring.
        times = (-ahead).div(ring, rounding_mode="floor")
        times = times + (num_chunks_before + ahead).div(ring, rounding_mode="floor") + 1
    else:
        times = ((ahead <= 0) & (ahead >= -num_chunks_before)).long()
    times = times.masked_fill(key_positions_XU.unsqueeze(1) >= lengths_XM.unsqueeze(-1), 0)
    return times.clamp(min=0).to(dtype).log()


def exact_bias(key_positions_XU: Tensor, lengths_XM: Tensor, *, exclude_self: bool, dtype: torch.dtype) -> Tensor:
    """Return what exact causal attention adds to scores ``[B, M, U]``; a query is the last of ``lengths`` tokens."""
    last = (lengths_XM - 1).unsqueeze(-1)
    keys = key_positions_XU.unsqueeze(1)
    bias = torch.zeros(torch.broadcast_shapes(last.shape, keys.shape), dtype=dtype, device=keys.device)
    bias = bias.masked_fill(keys > last, -torch.inf)
    return bias.masked_fill(keys == last, SELF_SCORE) if exclude_self else bias


def attend_with_bias(
    query_BMHD: Tensor, key_BHUD: Tensor, value_BHUD: Tensor, bias_XMU: Tensor, head_mask_H: Tensor | None = None
) -> Tensor:
    """Return ``[B, M, H, D]``: attention of the queries to keys that they share, in at least fp32 inside."""
    scores_BHMU = torch.matmul(query_BMHD.transpose(1, 2), key_BHUD.transpose(-1, -2))
    probs = torch.softmax(scores_BHMU.to(softmax_dtype(scores_BHMU.dtype)) + bias_XMU.unsqueeze(1), dim=-1)
    return _scale_heads(torch.matmul(probs.to(value_BHUD.dtype), value_BHUD), head_mask_H).transpose(1, 2)


def attend_to_windows(
    query_BMHD: Tensor,
    key_BHMXD: Tensor,
    value_BHMXD: Tensor,
    visible_BHMX: Tensor,
    head_mask_H: Tensor | None = None,
) -> Tensor:
    """Return ``[B, M, H, D]``: attention of each query to keys of its own and, where it sees none of them, to itself.

    The last key is the query's own. The softmax over all rounds' windows at once is the softmax within rounds merged
    by their log-sum-exps. A query that sees only itself returns its value as it is.
    """
    scores_BHM1X = torch.matmul(query_BMHD.transpose(1, 2).unsqueeze(3), key_BHMXD.transpose(-1, -2))
    scores_BHM1X = scores_BHM1X.to(softmax_dtype(scores_BHM1X.dtype))
    hidden = scores_BHM1X.new_full(visible_BHMX.shape[-1:], -torch.inf)
    hidden[-1] = SELF_SCORE
    probs_BHM1X = torch.softmax(torch.where(visible_BHMX.unsqueeze(3), scores_BHM1X, hidden), dim=-1)
    out_BHMD = torch.matmul(probs_BHM1X.to(value_BHMXD.dtype), value_BHMXD).squeeze(3)
    return _scale_heads(out_BHMD, head_mask_H).transpose(1, 2)


def attend_at(
    query_BMHD: Tensor,
    keys_values_YHUX: Tensor,
    lanes_BH: Tensor,
    positions_BHMX: Tensor,
    visible_BHMX: Tensor,
    head_mask_H: Tensor | None = None,
) -> Tensor:
    """Gather keys and values from storage and do what :func:`attend_to_windows` does with them.

    Storage holds keys and values side by side, ``[Y, H, U, 2D]``; ``lanes`` say at which of its ``Y*H*U`` rows a head
    of a row of the batch begins, and positions count from there.
    """
    index_BHMX = positions_BHMX + lanes_BH[:, :, None, None]
    found = keys_values_YHUX.flatten(0, 2).index_select(0, index_BHMX.flatten()).view(*index_BHMX.shape, -1)
    key_BHMXD, value_BHMXD = found.chunk(2, dim=-1)
    return attend_to_windows(query_BMHD, key_BHMXD, value_BHMXD, visible_BHMX, head_mask_H)


def _scale_heads(out_BHMD: Tensor, head_mask_H: Tensor | None) -> Tensor:
    return out_BHMD if head_mask_H is None else out_BHMD * head_mask_H.to(out_BHMD.dtype).view(-1, 1, 1)


def without_repeats(positions_BHMX: Tensor, visible_BHMX: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions and visibility, reordered, with every position visible once at most.

    What ``allow_duplicate_attention=False`` asks for: dividing a key's weight among its appearances is the same.
    """
    marked, _ = torch.sort(positions_BHMX.masked_fill(~visible_BHMX, -1), dim=-1)
    visible = marked >= 0
    visible[..., 1:] &= marked[..., 1:] != marked[..., :-1]
    return marked.masked_fill(~visible, 0), visible
