"""The same attention as :mod:`flash_reformer.ops.attention`, said without chunks: O(T²) oracles.

A sorted layout only decides *how often* query i meets key j. Given that count, LSH attention is one softmax per
row over all T keys; no rounds are merged and nothing is unsorted. Slow and plain on purpose: tests hold the fast
paths against it, and it shows what exact attention would have done. Letters as there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flash_reformer.ops.attention import attention_scores, normalize_keys
from flash_reformer.ops.chunking import look_around, split_chunks, visible_slots


def meeting_counts(
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None = None,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    wrap_around: bool = True,
    attend_across_buckets: bool = True,
) -> Tensor:
    """Return int ``[B, H, T, T]``: in how many visible slots of its windows query i meets key j.

    >>> order = torch.tensor([[[[0, 2, 1, 3]]]])
    >>> meeting_counts(order, chunk_length=2, num_chunks_before=0)[0, 0].tolist()
    [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """
    B, H, _, T = sorted_positions_BHRT.shape
    options = {"num_chunks_before": num_chunks_before, "num_chunks_after": num_chunks_after}
    positions_BHNC = split_chunks(sorted_positions_BHRT.flatten(2), chunk_length)
    keys_BHNW = look_around(positions_BHNC, **options)
    pairs_BHNCW = positions_BHNC.unsqueeze(-1) * T + keys_BHNW.unsqueeze(3)
    visible = visible_slots(
        sorted_positions_BHRT,
        buckets_BHRT,
        chunk_length=chunk_length,
        **options,
        wrap_around=wrap_around,
        attend_across_buckets=attend_across_buckets,
    )
    seen = torch.ones_like(pairs_BHNCW) if visible is None else visible.expand(pairs_BHNCW.shape).long()
    counts = torch.zeros(B, H, T * T, dtype=torch.long, device=pairs_BHNCW.device)
    return counts.scatter_add_(-1, pairs_BHNCW.flatten(2), seen.flatten(2)).view(B, H, T, T)


def dense_attention(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    counts_BHTT: Tensor,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    *,
    causal: bool = False,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return output ``[B, T, H, D]`` and total lse ``[B, H, T]``; key j counts ``counts[i, j]`` times in row i."""
    positions_11T = torch.arange(query_BTHD.shape[1], device=query_BTHD.device).view(1, 1, -1)
    scores_BHTT = attention_scores(
        query_BTHD.transpose(1, 2),
        key_BTHD.transpose(1, 2),
        positions_11T,
        positions_11T,
        None if mask_BT is None else mask_BT[:, None, :],
        causal=causal,
        exclude_self=exclude_self,
    )
    # A key never met does not exist; one met m times weighs m. As a factor: beside -1e9, adding log m would round away.
    scores_BHTT = scores_BHTT.masked_fill(counts_BHTT == 0, -math.inf)
    top_BHT1 = scores_BHTT.detach().amax(dim=-1, keepdim=True)
    powers_BHTT = counts_BHTT * torch.exp(scores_BHTT - top_BHT1)
    total_BHT1 = powers_BHTT.sum(dim=-1, keepdim=True)
    probs_BHTT = powers_BHTT / total_BHT1
    if head_mask_H is not None:
        probs_BHTT = probs_BHTT * head_mask_H.view(-1, 1, 1)
    out_BHTD = torch.matmul(probs_BHTT.to(v_BTHD.dtype), v_BTHD.transpose(1, 2))
    return out_BHTD.transpose(1, 2), (top_BHT1 + total_BHT1.log()).squeeze(-1)


def dense_lsh_attention(
    qk_BTHD: Tensor,
    v_BTHD: Tensor,
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None = None,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    wrap_around: bool = True,
    attend_across_buckets: bool = True,
    allow_duplicate_attention: bool = True,
) -> tuple[Tensor, Tensor]:
    """The dense oracle of ``lsh_attention`` at dropout 0: output ``[B, T, H, D]`` and total lse ``[B, H, T]``."""
    counts_BHTT = meeting_counts(
        sorted_positions_BHRT,
        buckets_BHRT,
        chunk_length=chunk_length,
        num_chunks_before=num_chunks_before,
        num_chunks_after=num_chunks_after,
        wrap_around=wrap_around,
        attend_across_buckets=attend_across_buckets,
    )
    if not allow_duplicate_attention:
        counts_BHTT = counts_BHTT.clamp(max=1)
    key_BTHD = normalize_keys(qk_BTHD)
    return dense_attention(
        qk_BTHD, key_BTHD, v_BTHD, counts_BHTT, mask_BT, head_mask_H, causal=causal, exclude_self=True
    )


def dense_local_attention(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    wrap_around: bool = True,
) -> tuple[Tensor, Tensor]:
    """The dense oracle of ``local_attention`` at dropout 0: output ``[B, T, H, D]`` and lse ``[B, H, T]``."""
    T, D = query_BTHD.shape[1], query_BTHD.shape[-1]
    counts_11TT = meeting_counts(
        torch.arange(T, device=query_BTHD.device).view(1, 1, 1, T),
        chunk_length=chunk_length,
        num_chunks_before=num_chunks_before,
        num_chunks_after=num_chunks_after,
        wrap_around=wrap_around,
    )
    return dense_attention(
        query_BTHD, key_BTHD / math.sqrt(D), v_BTHD, counts_11TT, mask_BT, head_mask_H, causal=causal
    )
