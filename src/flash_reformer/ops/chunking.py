"""Chunks on a ring, and who sees whom (Reformer, section 2).

Letters: B batch, H heads, R rounds, T positions, S = R*T slots, C chunk length, N = S/C chunks,
W = C*(before+1+after) keys in a chunk's window, X any trailing shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_reformer.ops.sorting import invert_permutation


def gather_rows(x_BTHD: Tensor, positions_BHS: Tensor) -> Tensor:
    """Return ``[B, H, S, D]``: for every slot the row of its head and position."""
    B, T, H, D = x_BTHD.shape
    batch = torch.arange(B, device=x_BTHD.device).view(B, 1, 1)
    head = torch.arange(H, device=x_BTHD.device).view(1, H, 1)
    rows = (batch * T + positions_BHS) * H + head
    return x_BTHD.reshape(B * T * H, D).index_select(0, rows.flatten()).view(B, H, -1, D)


def split_chunks(x_BHSX: Tensor, chunk_length: int) -> Tensor:
    """Return ``[B, H, N, C, ...]`` from ``[B, H, S, ...]``; S must be a multiple of the chunk length.

    >>> split_chunks(torch.arange(4).view(1, 1, 4), 2).tolist()
    [[[[0, 1], [2, 3]]]]
    """
    return x_BHSX.unflatten(2, (-1, chunk_length))


def look_around(x_BHNCX: Tensor, num_chunks_before: int, num_chunks_after: int) -> Tensor:
    """Return each chunk's window ``[B, H, N, W, ...]``: the chunks before, itself and the chunks after, on the ring.

    Where the ring is shorter than the window, a chunk stands in it more than once.

    >>> look_around(torch.arange(3).view(1, 1, 3, 1), 1, 0).tolist()
    [[[[2, 0], [0, 1], [1, 2]]]]
    """
    if num_chunks_before == num_chunks_after == 0:
        return x_BHNCX
    offsets = range(-num_chunks_before, num_chunks_after + 1)
    return torch.cat([x_BHNCX.roll(-offset, dims=2) if offset else x_BHNCX for offset in offsets], dim=3)


def window_in_round(
    num_chunks: int, chunks_per_round: int, num_chunks_before: int, num_chunks_after: int, device: torch.device
) -> Tensor:
    """Return bool ``[N, before+1+after]``: whether a window's chunk is reached without leaving its round.

    >>> window_in_round(4, 2, 1, 0, torch.device("cpu")).tolist()
    [[False, True], [True, True], [False, True], [True, True]]
    """
    chunk = torch.arange(num_chunks, device=device).unsqueeze(-1)
    seen = chunk + torch.arange(-num_chunks_before, num_chunks_after + 1, device=device)
    return seen.div(chunks_per_round, rounding_mode="floor") == chunk.div(chunks_per_round, rounding_mode="floor")


def visible_slots(
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None,
    *,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    wrap_around: bool,
    attend_across_buckets: bool,
) -> Tensor | None:
    """Return bool, broadcastable to ``[B, H, N, C, W]``: which slots of its window a query may look at.

    None stands for all of them. Without ``wrap_around`` no window crosses the border of its round; without
    ``attend_across_buckets`` a slot must belong to the query's own round and bucket.
    """
    _, _, R, T = sorted_positions_BHRT.shape
    chunks = T // chunk_length
    visible_BHNCW: Tensor | None = None
    if not wrap_around:
        inside = window_in_round(R * chunks, chunks, num_chunks_before, num_chunks_after, sorted_positions_BHRT.device)
        visible_BHNCW = inside.repeat_interleave(chunk_length, dim=1)[None, None, :, None, :]
    if not attend_across_buckets:
        assert buckets_BHRT is not None, "attend_across_buckets=False needs the buckets"
        sorted_buckets = buckets_BHRT.long().gather(-1, sorted_positions_BHRT)
        # One number per (round, bucket): equal numbers mean same round and same bucket.
        rounds = torch.arange(R, device=sorted_buckets.device).view(1, 1, R, 1)
        labels_BHNC = split_chunks((sorted_buckets * R + rounds).flatten(2), chunk_length)
        same = labels_BHNC.unsqueeze(-1) == look_around(labels_BHNC, num_chunks_before, num_chunks_after).unsqueeze(3)
        visible_BHNCW = same if visible_BHNCW is None else visible_BHNCW & same
    return visible_BHNCW


def count_appearances(
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None,
    *,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    wrap_around: bool,
    attend_across_buckets: bool,
) -> Tensor:
    """Return int ``[B, H, N, C, W]``: in how many slots, over all windows of its query, each key appears.

    Only slots that :func:`visible_slots` allows are counted. Nothing of size T*T is made: the chunk of every
    position in every round is known, so a pair of rounds decides by arithmetic on two chunk numbers.
    """
    _, _, R, T = sorted_positions_BHRT.shape
    N = R * T // chunk_length
    width = num_chunks_before + 1 + num_chunks_after
    slots_BHRT = invert_permutation(sorted_positions_BHRT) + T * torch.arange(
        R, device=sorted_positions_BHRT.device
    ).view(1, 1, R, 1)
    chunk_of_BHRT = slots_BHRT.div(chunk_length, rounding_mode="floor")
    positions_BHS = sorted_positions_BHRT.flatten(2)

    def per_slot(facts_BHT: Tensor) -> tuple[Tensor, Tensor]:
        """Spread a fact of each position to its slots, as query ``[.., C, 1]`` and as key ``[.., 1, W]``."""
        chunked = split_chunks(facts_BHT.gather(-1, positions_BHS), chunk_length)
        return chunked.unsqueeze(-1), look_around(chunked, num_chunks_before, num_chunks_after).unsqueeze(3)

    spread = [per_slot(chunk_of_BHRT[:, :, r]) for r in range(R)]
    only_own_round = not (wrap_around and attend_across_buckets)
    counts: Tensor | int = 0
    for query_round, (query_chunk, _) in enumerate(spread):
        for key_round, (_, key_chunk) in enumerate(spread):
            if only_own_round and key_round != query_round:
                continue
            offset = key_chunk - query_chunk + num_chunks_before
            if wrap_around:
                # How many places of the window [0, width) are congruent to this offset on a ring of N chunks.
                offset = offset % N
                found = ((width - 1 - offset).div(N, rounding_mode="floor") + 1).clamp(min=0)
            else:
                found = ((offset >= 0) & (offset < width)).long()
            if not attend_across_buckets:
                assert buckets_BHRT is not None
                query_bucket, key_bucket = per_slot(buckets_BHRT[:, :, query_round].long())
                found = found * (query_bucket == key_bucket)
            counts = counts + found
    assert isinstance(counts, Tensor)
    return counts
