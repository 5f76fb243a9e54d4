"""Device code of the forward: attention of a tile of queries to its window, and the merge of rounds."""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from flash_reformer.kernels.triton._launch import UNSPECIALIZED
from flash_reformer.kernels.triton._tiles import (
    _SELF,
    chunk_at,
    kept,
    labels_of,
    load_rows,
    open_keys,
    pair_scores,
    positions_of,
    product_add,
    row_offsets,
    slots_of,
    store_rows,
    tile_of,
    unit_keys,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attend_kernel(
    Q, K, V, POSITIONS, BUCKETS, CHUNK_OF, MASK, SEED, OUT, LSE, TOP, TOTAL, plane, length, num_heads, num_chunks,
    chunks_per_round, chunk_length, tiles_per_chunk: tl.constexpr, tiles_here, first_tile, turns, scale, keep_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BEFORE: tl.constexpr, WIDTH: tl.constexpr,
    ROUNDS: tl.constexpr, SHARED: tl.constexpr, IDENTITY: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, WRAP: tl.constexpr, ACROSS: tl.constexpr, DUPLICATES: tl.constexpr,
    DROPOUT: tl.constexpr, THRESHOLD: tl.constexpr, EXACT_ALONE: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr,
    DOT: tl.constexpr,
):
    """Attend with one tile of queries; write outputs and statistics at their original positions.

    A row's scores have the maximum TOP and the sum of powers TOTAL, relative to it: two numbers, since beside a score
    of -1e5 the logarithm of a sum would round away.
    """
    ring, chunk, tile = tile_of(tl.program_id(0), tiles_per_chunk, tiles_here, first_tile)
    batch, head = ring // num_heads, ring % num_heads
    stride = num_heads * D
    base = (batch.to(tl.int64) * length * num_heads + head) * D
    num_slots = num_chunks * chunk_length
    q_slots, q_exist = slots_of(chunk, tile, chunk_length, BLOCK)
    q_positions = positions_of(POSITIONS, ring, q_slots, q_exist, num_slots, IDENTITY, FULL)
    q_offsets = row_offsets(q_positions, stride, WIDE)
    q = load_rows(Q + base, q_offsets, q_exist, D, BLOCK_D, FULL)
    q_labels = q_positions
    if not ACROSS:
        q_labels = labels_of(BUCKETS, ring, chunk, q_positions, q_exist, length, chunks_per_round, ROUNDS)

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    others = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for step in range(WIDTH * tiles_per_chunk):
        offset = step // tiles_per_chunk - BEFORE
        k_tile = step % tiles_per_chunk
        k_chunk, inside = chunk_at(chunk, offset, num_chunks, chunks_per_round, turns)
        k_slots, k_exist = slots_of(k_chunk, k_tile, chunk_length, BLOCK)
        k_positions = positions_of(POSITIONS, ring, k_slots, k_exist, num_slots, IDENTITY, FULL)
        k_offsets = row_offsets(k_positions, stride, WIDE)
        k = load_rows(K + base, k_offsets, k_exist, D, BLOCK_D, FULL)
        v = load_rows(V + base, k_offsets, k_exist, D, BLOCK_D, FULL)
        score_scale = scale
        if SHARED:
            k = unit_keys(k, scale, D)
            score_scale = 1.0
        k_labels = k_positions
        if not ACROSS:
            k_labels = labels_of(BUCKETS, ring, k_chunk, k_positions, k_exist, length, chunks_per_round, ROUNDS)
        is_open = open_keys(MASK, batch, k_positions, k_exist, length, MASKED, FULL)
        scores, free = pair_scores(
            q, k, score_scale, q_positions, k_positions, q_exist, k_exist, is_open, q_labels, k_labels, inside,
            CHUNK_OF, BUCKETS, ring, length, num_chunks, BEFORE, WIDTH, ROUNDS, CAUSAL, MASKED, EXCLUDE_SELF, WRAP,
            ACROSS, DUPLICATES, FULL, DOT,
        )
        new_top = tl.maximum(top, tl.max(scores, 1))
        # Before anything was visible there is no maximum to subtract.
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        powers = tl.exp(scores - shift[:, None])
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(powers, 1)
        if EXACT_ALONE:
            others = others * shrink + tl.sum(tl.where(free, powers, 0.0), 1)
        if DROPOUT:
            column = (offset + BEFORE) * chunk_length + k_tile * BLOCK
            keep = kept(SEED, ring, q_slots, num_slots, column, BLOCK, THRESHOLD)
            powers = tl.where(keep, powers * keep_scale, 0.0)
        out = product_add(out * shrink[:, None], powers, v, DOT)
        top = new_top

    if not FULL:
        # Slots that do not exist may have seen nothing.
        total = tl.where(q_exist, total, 1.0)
    out = out / total[:, None]
    if EXACT_ALONE and not DROPOUT:
        # Three rounded thirds of a value are not the value, nor are the parts of which fp32 products are made.
        own = load_rows(V + base, q_offsets, q_exist, D, BLOCK_D, FULL).to(tl.float32)
        out = tl.where(((top <= _SELF) & (others == 0.0))[:, None], own, out)
    at_round = chunk // chunks_per_round
    store_rows(OUT + at_round.to(tl.int64) * plane + base, q_offsets, out, q_exist, D, BLOCK_D, FULL)
    at = (ring.to(tl.int64) * ROUNDS + at_round) * length + q_positions
    tl.store(LSE + at, top + tl.log(total), mask=q_exist)
    tl.store(TOP + at, top, mask=q_exist)
    tl.store(TOTAL + at, total, mask=q_exist)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_kernel(
    ROUND_OUT, ROUND_TOP, ROUND_TOTAL, OUT, TOP, TOTAL, plane, length, num_heads, blocks, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):
    """Weigh the rounds of some positions of a ring by their sums of powers, relative to the highest maximum.

    The sum is taken of differences from the first round, so rounds that agree come back exactly, whatever the weights
    round to.
    """
    program = tl.program_id(0)
    ring, block = program // blocks, program % blocks
    batch, head = ring // num_heads, ring % num_heads
    positions = block * BLOCK + tl.arange(0, BLOCK)
    exist = positions < length
    stride = num_heads * D
    offsets = (batch.to(tl.int64) * length + positions) * stride + head * D
    first = ring.to(tl.int64) * ROUNDS * length + positions

    top = tl.load(ROUND_TOP + first, mask=exist, other=0.0)
    for r in range(1, ROUNDS):
        top = tl.maximum(top, tl.load(ROUND_TOP + first + r * length, mask=exist, other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(ROUNDS):
        at = first + r * length
        powers = tl.load(ROUND_TOTAL + at, mask=exist, other=1.0)
        total += powers * tl.exp(tl.load(ROUND_TOP + at, mask=exist, other=0.0) - top)
    out = load_rows(ROUND_OUT, offsets, exist, D, BLOCK_D, False).to(tl.float32)
    begin = out
    for r in range(1, ROUNDS):
        at = first + r * length
        powers = tl.load(ROUND_TOTAL + at, mask=exist, other=1.0)
        weights = powers * tl.exp(tl.load(ROUND_TOP + at, mask=exist, other=0.0) - top) / total
        ROUND_OUT += plane
        rows = load_rows(ROUND_OUT, offsets, exist, D, BLOCK_D, False).to(tl.float32)
        out += weights[:, None] * (rows - begin)
    store_rows(OUT, offsets, out, exist, D, BLOCK_D, False)
    at = ring.to(tl.int64) * length + positions
    tl.store(TOP + at, top, mask=exist)
    tl.store(TOTAL + at, total, mask=exist)
