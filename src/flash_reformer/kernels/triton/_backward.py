"""Device code of the backward. A program owns the gradients of its tile's queries, keys and values.

With ``LSE`` the log-sum-exp over all rounds and ``delta = rowsum(dO * O)``, each round stands alone:
``P = exp(s - LSE)``, ``dS = P * (m * (dO v) - delta)``, m the factor of dropout. A tile meets itself, the other tiles
of its window as queries, and those whose window it is in as keys; so nobody writes to the rows of another, within a
round.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from flash_reformer.kernels.triton._launch import UNSPECIALIZED
from flash_reformer.kernels.triton._rounding import rounded
from flash_reformer.kernels.triton._tiles import (
    chunk_at,
    inverse_norms,
    kept,
    labels_of,
    load_rows,
    open_keys,
    pair_scores,
    positions_of,
    product,
    product_add,
    row_offsets,
    slots_of,
    store_rows,
    tile_of,
    unit_keys,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def delta_kernel(
    D_OUT, OUT, DELTA, length, num_heads, blocks, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr
):
    """Write ``rowsum(dO * O)`` of some positions of a ring."""
    program = tl.program_id(0)
    ring, block = program // blocks, program % blocks
    batch, head = ring // num_heads, ring % num_heads
    positions = block * BLOCK + tl.arange(0, BLOCK)
    exist = positions < length
    offsets = (batch.to(tl.int64) * length + positions) * num_heads * D + head * D
    d_out = load_rows(D_OUT, offsets, exist, D, BLOCK_D, False).to(tl.float32)
    out = load_rows(OUT, offsets, exist, D, BLOCK_D, False).to(tl.float32)
    tl.store(DELTA + ring.to(tl.int64) * length + positions, tl.sum(d_out * out, 1), mask=exist)


@triton.jit
def statistics(TOP, TOTAL, DELTA, ring, positions, exist, length):
    """Return the maximum and the sum of powers of rows over all rounds, and delta."""
    at = ring.to(tl.int64) * length + positions
    top = tl.load(TOP + at, mask=exist, other=0.0)
    total = tl.load(TOTAL + at, mask=exist, other=1.0)
    return top, total, tl.load(DELTA + at, mask=exist, other=0.0)


@triton.jit
def pair_gradients(
    scores, free, v, d_out, top, total, delta, SEED, ring, q_slots, num_slots, column, keep_scale,
    BLOCK: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, DOT: tl.constexpr,
):
    """Return the probabilities that values were weighed with, and the gradients of the scores."""
    probs = tl.exp(scores - top[:, None]) / total[:, None]
    d_probs = product(d_out, v, DOT)
    weights = probs
    if DROPOUT:
        keep = kept(SEED, ring, q_slots, num_slots, column, BLOCK, THRESHOLD)
        d_probs = tl.where(keep, d_probs * keep_scale, 0.0)
        weights = tl.where(keep, probs * keep_scale, 0.0)
    return weights, tl.where(free, probs * (d_probs - delta[:, None]), 0.0)


@triton.jit
def add_to_sum(
    SUM, RESULT, offsets, rows, exist, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr, ADD: tl.constexpr,
    LAST: tl.constexpr, ATOMIC: tl.constexpr,
):
    """Add a round's gradients to those of the rounds before it, and write the result after the last."""
    if ATOMIC:
        columns = tl.arange(0, BLOCK_D)
        there = exist[:, None] & (columns[None, :] < D)
        tl.atomic_add(SUM + offsets[:, None] + columns[None, :], rows, mask=there, sem="relaxed")
    else:
        if ADD:
            rows += load_rows(SUM, offsets, exist, D, BLOCK_D, FULL)
        if LAST:
            store_rows(RESULT, offsets, rows, exist, D, BLOCK_D, FULL)
        else:
            store_rows(SUM, offsets, rows, exist, D, BLOCK_D, FULL)


@triton.jit
def through_norm(d_units, rows, D: tl.constexpr):
    """Return the gradient of rows, given that of the rows divided by their norms: what points along a row is lost."""
    wide = rows.to(tl.float32)
    norms = inverse_norms(rows, D)
    along = tl.sum(d_units * wide, 1) / D
    return d_units * norms[:, None] - wide * (norms * norms * norms * along)[:, None]


@triton.jit
def gradient_as_queries(
    d_q, q, d_out, top, total, delta, slots, positions, exist, labels, K, V, POSITIONS, BUCKETS, CHUNK_OF, MASK, SEED,
    base, ring, batch, chunk, tile, length, stride, num_chunks, chunks_per_round, chunk_length, tiles_per_chunk,
    turns, scale, keep_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
    WIDTH: tl.constexpr, ROUNDS: tl.constexpr, SHARED: tl.constexpr, IDENTITY: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, WRAP: tl.constexpr, ACROSS: tl.constexpr,
    DUPLICATES: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Add what reaches the tile's queries from the keys of their window, its own tile apart."""
    score_scale = 1.0 if SHARED else scale
    num_slots = num_chunks * chunk_length
    itself = BEFORE * tiles_per_chunk + tile
    for step in range(WIDTH * tiles_per_chunk - 1):
        place = step + (step >= itself).to(tl.int32)
        k_tile = place % tiles_per_chunk
        offset = place // tiles_per_chunk - BEFORE
        k_chunk, inside = chunk_at(chunk, offset, num_chunks, chunks_per_round, turns)
        k_slots, k_exist = slots_of(k_chunk, k_tile, chunk_length, BLOCK)
        k_positions = positions_of(POSITIONS, ring, k_slots, k_exist, num_slots, IDENTITY, FULL)
        k_offsets = row_offsets(k_positions, stride, WIDE)
        k_labels = k_positions
        if not ACROSS:
            k_labels = labels_of(BUCKETS, ring, k_chunk, k_positions, k_exist, length, chunks_per_round, ROUNDS)
        k = load_rows(K + base, k_offsets, k_exist, D, BLOCK_D, FULL)
        v = load_rows(V + base, k_offsets, k_exist, D, BLOCK_D, FULL)
        if SHARED:
            k = unit_keys(k, scale, D)
        is_open = open_keys(MASK, batch, k_positions, k_exist, length, MASKED, FULL)
        scores, free = pair_scores(
            q, k, score_scale, positions, k_positions, exist, k_exist, is_open, labels, k_labels, inside, CHUNK_OF,
            BUCKETS, ring, length, num_chunks, BEFORE, WIDTH, ROUNDS, CAUSAL, MASKED, EXCLUDE_SELF, WRAP, ACROSS,
            DUPLICATES, FULL, DOT,
        )
        column = (offset + BEFORE) * chunk_length + k_tile * BLOCK
        _, d_scores = pair_gradients(
            scores, free, v, d_out, top, total, delta, SEED, ring, slots, num_slots, column, keep_scale, BLOCK,
            DROPOUT, THRESHOLD, DOT,
        )
        d_q = product_add(d_q, d_scores, k, DOT)
    return d_q


@triton.jit
def gradients_as_keys(
    d_k, d_v, k, v, positions, exist, is_open, labels, Q, D_OUT, TOP, TOTAL, DELTA, POSITIONS, BUCKETS, CHUNK_OF,
    MASK, SEED, base, ring, batch, chunk, tile, length, stride, num_chunks, chunks_per_round, chunk_length,
    tiles_per_chunk, turns, scale, keep_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    BEFORE: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr, SHARED: tl.constexpr, IDENTITY: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, WRAP: tl.constexpr, ACROSS: tl.constexpr,
    DUPLICATES: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Add what reaches the tile's keys and values from the queries that have them in their window, its own apart."""
    score_scale = 1.0 if SHARED else scale
    num_slots = num_chunks * chunk_length
    itself = BEFORE * tiles_per_chunk + tile
    for step in range(WIDTH * tiles_per_chunk - 1):
        place = step + (step >= itself).to(tl.int32)
        q_tile = place % tiles_per_chunk
        offset = place // tiles_per_chunk - BEFORE
        q_chunk, inside = chunk_at(chunk, -offset, num_chunks, chunks_per_round, turns)
        q_slots, q_exist = slots_of(q_chunk, q_tile, chunk_length, BLOCK)
        q_positions = positions_of(POSITIONS, ring, q_slots, q_exist, num_slots, IDENTITY, FULL)
        q_offsets = row_offsets(q_positions, stride, WIDE)
        q_labels = q_positions
        if not ACROSS:
            q_labels = labels_of(BUCKETS, ring, q_chunk, q_positions, q_exist, length, chunks_per_round, ROUNDS)
        q = load_rows(Q + base, q_offsets, q_exist, D, BLOCK_D, FULL)
        d_out = load_rows(D_OUT + base, q_offsets, q_exist, D, BLOCK_D, FULL)
        top, total, delta = statistics(TOP, TOTAL, DELTA, ring, q_positions, q_exist, length)
        scores, free = pair_scores(
            q, k, score_scale, q_positions, positions, q_exist, exist, is_open, q_labels, labels, inside, CHUNK_OF,
            BUCKETS, ring, length, num_chunks, BEFORE, WIDTH, ROUNDS, CAUSAL, MASKED, EXCLUDE_SELF, WRAP, ACROSS,
            DUPLICATES, FULL, DOT,
        )
        column = (offset + BEFORE) * chunk_length + tile * BLOCK
        weights, d_scores = pair_gradients(
            scores, free, v, d_out, top, total, delta, SEED, ring, q_slots, num_slots, column, keep_scale, BLOCK,
            DROPOUT, THRESHOLD, DOT,
        )
        d_k = product_add(d_k, tl.trans(d_scores), q, DOT)
        d_v = product_add(d_v, tl.trans(weights), d_out, DOT)
    return d_k, d_v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_backward_kernel(
    Q, K, V, POSITIONS, BUCKETS, CHUNK_OF, MASK, SEED, D_OUT, TOP, TOTAL, DELTA, SUM_Q, SUM_V, D_Q, D_K, D_V, length,
    num_heads, num_chunks, chunks_per_round, chunk_length, tiles_per_chunk: tl.constexpr, tiles_here, first_tile,
    turns, scale, keep_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr,
    WIDTH: tl.constexpr, ROUNDS: tl.constexpr, SHARED: tl.constexpr, IDENTITY: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, WRAP: tl.constexpr, ACROSS: tl.constexpr,
    DUPLICATES: tl.constexpr, DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    DOT: tl.constexpr, AS_KEYS: tl.constexpr, AS_QUERIES: tl.constexpr, ATOMIC: tl.constexpr, ADD_Q: tl.constexpr,
    LAST_Q: tl.constexpr, ADD_V: tl.constexpr, LAST_V: tl.constexpr,
):
    """Compute the gradients of a tile: as keys of the windows that it is in, as queries over its window, or both."""
    ring, chunk, tile = tile_of(tl.program_id(0), tiles_per_chunk, tiles_here, first_tile)
    batch, head = ring // num_heads, ring % num_heads
    stride = num_heads * D
    base = (batch.to(tl.int64) * length * num_heads + head) * D
    num_slots = num_chunks * chunk_length
    slots, exist = slots_of(chunk, tile, chunk_length, BLOCK)
    positions = positions_of(POSITIONS, ring, slots, exist, num_slots, IDENTITY, FULL)
    offsets = row_offsets(positions, stride, WIDE)
    q = load_rows(Q + base, offsets, exist, D, BLOCK_D, FULL)
    v = load_rows(V + base, offsets, exist, D, BLOCK_D, FULL)
    d_out = load_rows(D_OUT + base, offsets, exist, D, BLOCK_D, FULL)
    score_scale = 1.0 if SHARED else scale
    if SHARED:
        k = unit_keys(q, scale, D)
    else:
        k = load_rows(K + base, offsets, exist, D, BLOCK_D, FULL)
    top, total, delta = statistics(TOP, TOTAL, DELTA, ring, positions, exist, length)
    is_open = open_keys(MASK, batch, positions, exist, length, MASKED, FULL)
    labels = positions
    if not ACROSS:
        labels = labels_of(BUCKETS, ring, chunk, positions, exist, length, chunks_per_round, ROUNDS)

    # The tile with itself serves both sides, so the loops leave it out.
    _, inside = chunk_at(chunk, 0, num_chunks, chunks_per_round, turns)
    scores, free = pair_scores(
        q, k, score_scale, positions, positions, exist, exist, is_open, labels, labels, inside, CHUNK_OF, BUCKETS,
        ring, length, num_chunks, BEFORE, WIDTH, ROUNDS, CAUSAL, MASKED, EXCLUDE_SELF, WRAP, ACROSS, DUPLICATES, FULL,
        DOT,
    )
    weights, d_scores = pair_gradients(
        scores, free, v, d_out, top, total, delta, SEED, ring, slots, num_slots, BEFORE * chunk_length + tile * BLOCK,
        keep_scale, BLOCK, DROPOUT, THRESHOLD, DOT,
    )
    # In half the registers until its turn comes: keys and values first, so that no more than two sums live at a time.
    d_scores = rounded(d_scores, q.dtype)
    d_q = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    if AS_KEYS:
        d_k = product_add(d_q, tl.trans(d_scores.to(tl.float32)), q, DOT)
        d_v = product_add(d_q, tl.trans(weights), d_out, DOT)
        d_k, d_v = gradients_as_keys(
            d_k, d_v, k, v, positions, exist, is_open, labels, Q, D_OUT, TOP, TOTAL, DELTA, POSITIONS, BUCKETS,
            CHUNK_OF, MASK, SEED, base, ring, batch, chunk, tile, length, stride, num_chunks, chunks_per_round,
            chunk_length, tiles_per_chunk, turns, scale, keep_scale, D, BLOCK_D, BLOCK, BEFORE, WIDTH, ROUNDS, SHARED,
            IDENTITY, CAUSAL, MASKED, EXCLUDE_SELF, WRAP, ACROSS, DUPLICATES, DROPOUT, THRESHOLD, FULL, WIDE, DOT,
        )
        add_to_sum(SUM_V + base, D_V + base, offsets, d_v, exist, D, BLOCK_D, FULL, ADD_V, LAST_V, ATOMIC)
        d_k *= scale
        if SHARED:
            d_q = through_norm(d_k, q, D)
        else:
            store_rows(D_K + base, offsets, d_k, exist, D, BLOCK_D, FULL)
    if AS_QUERIES:
        d_q = product_add(d_q, d_scores.to(tl.float32), k, DOT)
        d_q = gradient_as_queries(
            d_q, q, d_out, top, total, delta, slots, positions, exist, labels, K, V, POSITIONS, BUCKETS, CHUNK_OF,
            MASK, SEED, base, ring, batch, chunk, tile, length, stride, num_chunks, chunks_per_round, chunk_length,
            tiles_per_chunk, turns, scale, keep_scale, D, BLOCK_D, BLOCK, BEFORE, WIDTH, ROUNDS, SHARED, IDENTITY,
            CAUSAL, MASKED, EXCLUDE_SELF, WRAP, ACROSS, DUPLICATES, DROPOUT, THRESHOLD, FULL, WIDE, DOT,
        )
        d_q *= score_scale
    if AS_QUERIES or SHARED:
        add_to_sum(SUM_Q + base, D_Q + base, offsets, d_q, exist, D, BLOCK_D, FULL, ADD_Q, LAST_Q, ATOMIC)
