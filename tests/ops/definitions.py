"""Every operation again, as loops over pairs, written from the contract and from nothing else.

This file imports nothing of the package: a mistake would have to be made twice to go unseen. All of it is plain fp64
arithmetic that autograd can follow. Shapes stand in the names as in ``flash_reformer.ops``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor


def automatic_num_buckets(length: int, chunk_length: int, max_position_embeddings: int) -> list[int]:
    power = 0
    while 2 ** (power + 1) <= 2 * (length // chunk_length):
        power += 1
    power = max(power, 1)
    root = 0
    while (root + 1) ** 2 <= max_position_embeddings // chunk_length:
        root += 1
    if 2**power <= 2 * max(root, chunk_length):
        return [2**power]
    return [2 ** (power // 2), 2 ** (power - power // 2)]


def bucket_of(vector: Sequence[float], rotation_DM: Sequence[Sequence[float]], factors: Sequence[int]) -> int:
    """The bucket of one vector in one round: per factor the first largest of ``[x·rot ; -x·rot]``, as one digit."""
    bucket, stride, column = 0, 1, 0
    for factor in factors:
        rotated = []
        for m in range(column, column + factor // 2):
            rotated.append(sum(x * row[m] for x, row in zip(vector, rotation_DM, strict=True)))
        best, digit = -math.inf, -1
        for index, value in enumerate(rotated + [-x for x in rotated]):
            if value > best:
                best, digit = value, index
        bucket += digit * stride
        stride *= factor
        column += factor // 2
    return bucket


def hash_vectors(
    vectors_BTHD: Tensor, rotations_HDRM: Tensor, factors: Sequence[int], mask_BT: Tensor | None = None
) -> Tensor:
    B, T, H, _ = vectors_BTHD.shape
    R = rotations_HDRM.shape[2]
    vectors, rotations = vectors_BTHD.double(), rotations_HDRM.double()
    buckets_BHRT = torch.full((B, H, R, T), -1)
    for b, h, r, t in product(range(B), range(H), range(R), range(T)):
        real = mask_BT is None or bool(mask_BT[b, t])
        buckets_BHRT[b, h, r, t] = (
            bucket_of(vectors[b, t, h].tolist(), rotations[h, :, r].tolist(), factors) if real else math.prod(factors)
        )
    return buckets_BHRT


def sort_positions(buckets_BHRT: Tensor) -> Tensor:
    B, H, R, T = buckets_BHRT.shape
    order_BHRT = torch.full((B, H, R, T), -1)
    for b, h, r in product(range(B), range(H), range(R)):
        buckets = buckets_BHRT[b, h, r].tolist()
        order_BHRT[b, h, r] = torch.tensor(sorted(range(T), key=lambda t, ids=buckets: (ids[t], t)))
    return order_BHRT


def normalized_key(qk_D: Tensor) -> Tensor:
    return qk_D / torch.sqrt((qk_D * qk_D).mean() + 1e-6) / math.sqrt(qk_D.numel())


class Slot(NamedTuple):
    """One place of a window: the original position of its key, and whether the query may look there at all."""

    key: int
    there: bool


class Row(NamedTuple):
    """What one query sees in one round, and where it stands itself: chunk and place in the chunk."""

    chunk: int
    place: int
    slots: list[Slot]


def windows(
    order_BHRT: Tensor,
    buckets_BHRT: Tensor | None = None,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    wrap_around: bool = True,
    attend_across_buckets: bool = True,
) -> dict[tuple[int, int, int, int], Row]:
    """For every (batch, head, round, query) the slots of its window, in ring order from the first chunk before."""
    B, H, R, T = order_BHRT.shape
    num_chunks, per_round = R * T // chunk_length, T // chunk_length
    rows = {}
    for b, h in product(range(B), range(H)):
        ring = [position for one_round in order_BHRT[b, h].tolist() for position in one_round]
        ids = None if buckets_BHRT is None else buckets_BHRT[b, h].tolist()
        for slot, i in enumerate(ring):
            r, chunk = slot // T, slot // chunk_length
            seen = []
            for other in range(chunk - num_chunks_before, chunk + num_chunks_after + 1):
                inside = r * per_round <= other < (r + 1) * per_round
                for place in range(chunk_length):
                    key_slot = (other % num_chunks) * chunk_length + place
                    j, key_round = ring[key_slot], key_slot // T
                    there = wrap_around or inside
                    if not attend_across_buckets:
                        there = there and key_round == r and ids[r][j] == ids[r][i]
                    seen.append(Slot(j, there))
            rows[b, h, r, i] = Row(chunk, slot % chunk_length, seen)
    return rows


def set_score(i: int, j: int, real: Sequence[bool], causal: bool, exclude_self: bool) -> float | None:
    """The score that the rules *set* for query i and key j; None where it stays ``q·k``."""
    if exclude_self and i == j:
        return -1e5
    if (causal and j > i) or not real[j]:
        return -1e9
    return None


def scores(
    query_D: Tensor,
    keys_TD: Tensor,
    i: int,
    slots: Sequence[Slot],
    real: Sequence[bool],
    causal: bool,
    exclude_self: bool,
    appearances: Counter[int] | None = None,
) -> tuple[Tensor, list[bool]]:
    """The scores of a row over its window, and which of them are products (not set, not missing)."""
    fixed, free = [], []
    for j, there in slots:
        value = set_score(i, j, real, causal, exclude_self) if there else -math.inf
        free.append(value is None)
        fixed.append(0.0 if value is None else value)
    products = keys_TD[[slot.key for slot in slots]] @ query_D
    row = torch.where(torch.tensor(free), products, torch.tensor(fixed, dtype=query_D.dtype))
    if appearances is not None:
        row = row - torch.tensor([math.log(max(1, appearances[slot.key])) for slot in slots], dtype=query_D.dtype)
    return row, free


def softmax(row_W: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities by max-subtraction and division, and the log-sum-exp."""
    top = row_W.detach().max()
    powers = torch.exp(row_W - top)
    return powers / powers.sum(), top + torch.log(powers.sum())


def count_appearances(rows: dict, b: int, h: int, i: int, num_rounds: int) -> Counter[int]:
    """How often each key stands in the windows of query i, over all rounds."""
    return Counter(slot.key for r in range(num_rounds) for slot in rows[b, h, r, i].slots if slot.there)


def real_keys(mask_BT: Tensor | None, b: int, length: int) -> list[bool]:
    return [True] * length if mask_BT is None else mask_BT[b].tolist()


def lsh_attention(
    qk_BTHD: Tensor,
    v_BTHD: Tensor,
    order_BHRT: Tensor,
    buckets_BHRT: Tensor | None = None,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    dropout_BHNCW: Tensor | None = None,
    *,
    causal: bool = False,
    allow_duplicate_attention: bool = True,
    **layout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output ``[B, T, H, D]``, lse ``[B, H, R, T]``, probabilities ``[B, H, N, C, W]`` (no gradient) before dropout."""
    B, T, H, _ = qk_BTHD.shape
    R, C = order_BHRT.shape[2], layout["chunk_length"]
    rows = windows(order_BHRT, buckets_BHRT, **layout)
    width = len(rows[0, 0, 0, 0].slots)
    probs_BHNCW = torch.full((B, H, R * T // C, C, width), math.nan, dtype=qk_BTHD.dtype)
    outputs, lses = {}, {}
    for b, h in product(range(B), range(H)):
        queries, values, real = qk_BTHD[b, :, h], v_BTHD[b, :, h], real_keys(mask_BT, b, T)
        keys = torch.stack([normalized_key(row) for row in queries])
        for i in range(T):
            counts = None if allow_duplicate_attention else count_appearances(rows, b, h, i, R)
            per_round = []
            for r in range(R):
                chunk, place, slots = rows[b, h, r, i]
                row, _ = scores(queries[i], keys, i, slots, real, causal, True, counts)
                probs, lses[b, h, r, i] = softmax(row)
                probs_BHNCW[b, h, chunk, place] = probs.detach()
                if dropout_BHNCW is not None:
                    probs = probs * dropout_BHNCW[b, h, chunk, place]
                if head_mask_H is not None:
                    probs = probs * head_mask_H[h]
                per_round.append(probs @ values[[slot.key for slot in slots]])
            weights, _ = softmax(torch.stack([lses[b, h, r, i] for r in range(R)]))
            outputs[b, i, h] = weights @ torch.stack(per_round)
    return assemble(outputs, v_BTHD.shape), assemble(lses, (B, H, R, T)), probs_BHNCW


def assemble(entries: dict[tuple[int, ...], Tensor], shape: Sequence[int]) -> Tensor:
    """One tensor of ``shape`` from its entries."""
    lead = len(next(iter(entries)))
    return torch.stack([entries[index] for index in product(*map(range, shape[:lead]))]).reshape(tuple(shape))


def union_attention(
    qk_BTHD: Tensor, v_BTHD: Tensor, rows: dict, num_rounds: int, mask_BT: Tensor | None, causal: bool
) -> Tensor:
    """The softmax over the *set* of keys that a query meets in any of its windows: the paper's appendix."""
    B, T, H, _ = qk_BTHD.shape
    outputs = {}
    for b, i, h in product(range(B), range(T), range(H)):
        met = sorted(count_appearances(rows, b, h, i, num_rounds))
        keys = torch.stack([normalized_key(row) for row in qk_BTHD[b, :, h]])
        row, _ = scores(qk_BTHD[b, i, h], keys, i, [Slot(j, True) for j in met], real_keys(mask_BT, b, T), causal, True)
        outputs[b, i, h] = softmax(row)[0] @ v_BTHD[b, met, h]
    return assemble(outputs, v_BTHD.shape)


def lsh_backward(
    grad_BTHD: Tensor,
    qk_BTHD: Tensor,
    v_BTHD: Tensor,
    order_BHRT: Tensor,
    buckets_BHRT: Tensor | None = None,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    dropout_BHNCW: Tensor | None = None,
    *,
    causal: bool = False,
    allow_duplicate_attention: bool = True,
    **layout,
) -> tuple[Tensor, Tensor]:
    """The gradients by qk and v from the closed form: ``P = exp(s - LSE)``, ``dS = P (m dO·v - delta)``."""
    B, T, H, D = qk_BTHD.shape
    R = order_BHRT.shape[2]
    options = {"causal": causal, "allow_duplicate_attention": allow_duplicate_attention, **layout}
    out_BTHD, lse_BHRT, _ = lsh_attention(
        qk_BTHD, v_BTHD, order_BHRT, buckets_BHRT, mask_BT, head_mask_H, dropout_BHNCW, **options
    )
    rows = windows(order_BHRT, buckets_BHRT, **layout)
    grad_query, grad_key, grad_v = (torch.zeros_like(qk_BTHD) for _ in range(3))
    for b, h, i in product(range(B), range(H), range(T)):
        counts = None if allow_duplicate_attention else count_appearances(rows, b, h, i, R)
        keys = torch.stack([normalized_key(row) for row in qk_BTHD[b, :, h]])
        total = softmax(lse_BHRT[b, h, :, i])[1]
        delta = grad_BTHD[b, i, h] @ out_BTHD[b, i, h]
        for r in range(R):
            chunk, place, slots = rows[b, h, r, i]
            row, free = scores(qk_BTHD[b, i, h], keys, i, slots, real_keys(mask_BT, b, T), causal, True, counts)
            for w, (j, _) in enumerate(slots):
                factor = 1.0 if head_mask_H is None else head_mask_H[h]
                if dropout_BHNCW is not None:
                    factor = factor * dropout_BHNCW[b, h, chunk, place, w]
                prob = torch.exp(row[w] - total)
                grad_v[b, j, h] += prob * factor * grad_BTHD[b, i, h]
                if free[w]:
                    grad_score = prob * (factor * (grad_BTHD[b, i, h] @ v_BTHD[b, j, h]) - delta)
                    grad_query[b, i, h] += grad_score * keys[j]
                    grad_key[b, j, h] += grad_score * qk_BTHD[b, i, h]
    # The chain rule through k = x g / sqrt(D), g = (mean x² + eps)^(-1/2).
    power = (qk_BTHD * qk_BTHD).mean(-1, keepdim=True) + 1e-6
    along = (qk_BTHD * grad_key).sum(-1, keepdim=True) / (D * power)
    return grad_query + (grad_key - qk_BTHD * along) / torch.sqrt(power) / math.sqrt(D), grad_v


def plain_attention(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    rows: dict,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    dropout_BHNCW: Tensor | None = None,
    *,
    causal: bool = False,
    exclude_self: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention with ready keys and windows that batch and head share: output, lse ``[B, H, T]``, probabilities."""
    B, T, H, _ = query_BTHD.shape
    chunks = 1 + max(row.chunk for row in rows.values())
    places = 1 + max(row.place for row in rows.values())
    probs_BHNCW = torch.full((B, H, chunks, places, len(rows[0, 0, 0, 0].slots)), math.nan, dtype=query_BTHD.dtype)
    outputs, lses = {}, {}
    for b, h, i in product(range(B), range(H), range(T)):
        chunk, place, slots = rows[0, 0, 0, i]
        row, _ = scores(
            query_BTHD[b, i, h], key_BTHD[b, :, h], i, slots, real_keys(mask_BT, b, T), causal, exclude_self
        )
        probs, lses[b, h, i] = softmax(row)
        probs_BHNCW[b, h, chunk, place] = probs.detach()
        if dropout_BHNCW is not None:
            probs = probs * dropout_BHNCW[b, h, chunk, place]
        if head_mask_H is not None:
            probs = probs * head_mask_H[h]
        outputs[b, i, h] = probs @ v_BTHD[b, [slot.key for slot in slots], h]
    return assemble(outputs, v_BTHD.shape), assemble(lses, (B, H, T)), probs_BHNCW


def local_attention(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    dropout_BHNCW: Tensor | None = None,
    *,
    causal: bool = False,
    **layout,
) -> tuple[Tensor, Tensor, Tensor]:
    _, T, _, D = query_BTHD.shape
    rows = windows(torch.arange(T).view(1, 1, 1, T), **layout)
    key_BTHD = key_BTHD / math.sqrt(D)
    return plain_attention(query_BTHD, key_BTHD, v_BTHD, rows, mask_BT, head_mask_H, dropout_BHNCW, causal=causal)


def exact_rows(length: int) -> dict:
    """Windows for :func:`plain_attention` in which everybody sees every position once."""
    return {(0, 0, 0, i): Row(0, i, [Slot(j, True) for j in range(length)]) for i in range(length)}


def exact_shared_attention(
    qk_BTHD: Tensor, v_BTHD: Tensor, mask_BT: Tensor | None = None, *, causal: bool = False
) -> Tensor:
    """Exact attention in which the keys are the queries' directions and nobody prefers itself."""
    B, T, H, _ = qk_BTHD.shape
    keys = {(b, t, h): normalized_key(qk_BTHD[b, t, h]) for b, t, h in product(range(B), range(T), range(H))}
    return plain_attention(
        qk_BTHD,
        assemble(keys, qk_BTHD.shape),
        v_BTHD,
        exact_rows(T),
        mask_BT,
        causal=causal,
        exclude_self=True,
    )[0]
