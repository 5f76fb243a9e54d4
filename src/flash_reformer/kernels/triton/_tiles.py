"""Device code that forward and backward share: tiles of chunks, their rows, and the scores of a pair of tiles.

A *tile* is ``BLOCK`` slots of one chunk of one ring; the last tile of a chunk may be filled up (not ``FULL``), and the
slots that do not exist are visible to nobody. Rows stay where they are, ``[B, T, H, D]``: a tile gathers its own.
Offsets that may pass 2^31 are 64 bits wide; those within one sequence are only where they must be (``WIDE``).
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from flash_reformer.kernels.triton._random import column_words, keep, row_words
from flash_reformer.kernels.triton._rounding import rounded

_FORBIDDEN = tl.constexpr(-1e9)
_SELF = tl.constexpr(-1e5)
_KEY_NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def tile_of(program, tiles_per_chunk, tiles_here, first_tile):
    """Return ring, chunk and tile within the chunk; a launch covers ``tiles_here`` tiles of every ring."""
    at = first_tile + program % tiles_here
    return program // tiles_here, at // tiles_per_chunk, at % tiles_per_chunk


@triton.jit
def chunk_at(chunk, offset, num_chunks, chunks_per_round, turns):
    """Return the chunk at an offset on the ring, and whether it is reached without leaving the round."""
    raw = chunk + offset
    begin = chunk // chunks_per_round * chunks_per_round
    inside = (raw >= begin) & (raw < begin + chunks_per_round)
    # ``turns`` whole turns make it positive: remainders of negative numbers are negative here.
    return (raw + turns * num_chunks) % num_chunks, inside


@triton.jit
def slots_of(chunk, tile, chunk_length, BLOCK: tl.constexpr):
    """Return the slots of a tile and which of them exist."""
    places = tile * BLOCK + tl.arange(0, BLOCK)
    return chunk * chunk_length + places, places < chunk_length


@triton.jit
def positions_of(POSITIONS, ring, slots, exist, num_slots, IDENTITY: tl.constexpr, FULL: tl.constexpr):
    """Return the positions at these slots of a ring; 0 where there is no slot."""
    if IDENTITY:
        positions = slots
    elif FULL:
        positions = tl.load(POSITIONS + ring.to(tl.int64) * num_slots + slots).to(tl.int32)
    else:
        positions = tl.load(POSITIONS + ring.to(tl.int64) * num_slots + slots, mask=exist, other=0).to(tl.int32)
    return positions


@triton.jit
def row_offsets(positions, stride, WIDE: tl.constexpr):
    """Return where rows begin, relative to their head's first row."""
    if WIDE:
        offsets = positions.to(tl.int64) * stride
    else:
        offsets = positions * stride
    return offsets


@triton.jit
def load_rows(X, offsets, exist, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """Return rows ``[BLOCK, BLOCK_D]``, zeros where there is nothing."""
    columns = tl.arange(0, BLOCK_D)
    at = X + offsets[:, None] + columns[None, :]
    if FULL and D == BLOCK_D:
        rows = tl.load(at)
    else:
        rows = tl.load(at, mask=exist[:, None] & (columns[None, :] < D), other=0.0)
    return rows


@triton.jit
def store_rows(X, offsets, rows, exist, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    """Write rows in the dtype of ``X``."""
    columns = tl.arange(0, BLOCK_D)
    at = X + offsets[:, None] + columns[None, :]
    rows = rounded(rows, X.dtype.element_ty)
    if FULL and D == BLOCK_D:
        tl.store(at, rows)
    else:
        tl.store(at, rows, mask=exist[:, None] & (columns[None, :] < D))


@triton.jit
def inverse_norms(rows, D: tl.constexpr):
    """Return ``1 / sqrt(mean(x^2) + eps)`` of each row, in fp32."""
    wide = rows.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) / D + _KEY_NORM_EPS)


@triton.jit
def unit_keys(rows, scale, D: tl.constexpr):
    """Return the keys that shared queries stand for, in their dtype; ``scale`` is ``1 / sqrt(D)``."""
    return rounded(rows.to(tl.float32) * (inverse_norms(rows, D) * scale)[:, None], rows.dtype)


@triton.jit
def product(a, b, DOT: tl.constexpr):
    """Return ``a b^T``, summed in fp32; fp32 numbers are products of three parts, as exact as it needs."""
    return tl.dot(a.to(DOT), tl.trans(b.to(DOT)), input_precision="tf32x3")


@triton.jit
def product_add(total, a, b, DOT: tl.constexpr):
    """Return ``total + a b``; ``a`` is rounded to the dtype of ``b`` first."""
    return tl.dot(rounded(a.to(tl.float32), b.dtype).to(DOT), b.to(DOT), total, input_precision="tf32x3")


@triton.jit
def open_keys(MASK, batch, positions, exist, length, MASKED: tl.constexpr, FULL: tl.constexpr):
    """Return which keys are real tokens."""
    if MASKED:
        at = MASK + batch.to(tl.int64) * length + positions
        if FULL:
            is_open = tl.load(at) != 0
        else:
            is_open = tl.load(at, mask=exist, other=0) != 0
    else:
        is_open = exist
    return is_open


@triton.jit
def labels_of(BUCKETS, ring, chunk, positions, exist, length, chunks_per_round, ROUNDS: tl.constexpr):
    """Return what slots must share to see each other: round and bucket, as one number."""
    at_round = chunk // chunks_per_round
    at = BUCKETS + (ring.to(tl.int64) * ROUNDS + at_round) * length + positions
    return tl.load(at, mask=exist, other=-1).to(tl.int64) * ROUNDS + at_round


@triton.jit
def appearances(
    CHUNK_OF, BUCKETS, ring, q_positions, q_exist, k_positions, k_exist, length, num_chunks, BEFORE: tl.constexpr,
    WIDTH: tl.constexpr, ROUNDS: tl.constexpr, WRAP: tl.constexpr, ACROSS: tl.constexpr,
):
    """Return how often each key appears in all windows of each query, ``[BLOCK, BLOCK]``, as fp32.

    The chunk of every position in every round is known, so a pair of rounds decides by arithmetic on two numbers.
    """
    counts = tl.zeros([q_positions.shape[0], k_positions.shape[0]], tl.int32)
    rounds = ring.to(tl.int64) * ROUNDS
    # Without wrapping, or within buckets, only a round's own windows hold what may be seen.
    key_rounds: tl.constexpr = ROUNDS if WRAP and ACROSS else 1
    for q_round in tl.range(ROUNDS, loop_unroll_factor=1):
        q_at = (rounds + q_round) * length + q_positions
        q_chunks = tl.load(CHUNK_OF + q_at, mask=q_exist, other=0)
        for step in tl.range(key_rounds, loop_unroll_factor=1):
            k_round = (q_round + step) % ROUNDS
            k_at = (rounds + k_round) * length + k_positions
            k_chunks = tl.load(CHUNK_OF + k_at, mask=k_exist, other=0)
            offsets = k_chunks[None, :] - q_chunks[:, None] + BEFORE
            if WRAP:
                offsets = (offsets % num_chunks + num_chunks) % num_chunks
                found = tl.where(offsets < WIDTH, (WIDTH - 1 - offsets) // num_chunks + 1, 0)
            else:
                found = ((offsets >= 0) & (offsets < WIDTH)).to(tl.int32)
            if not ACROSS:
                q_buckets = tl.load(BUCKETS + q_at, mask=q_exist, other=-1)
                k_buckets = tl.load(BUCKETS + k_at, mask=k_exist, other=-1)
                found = tl.where(q_buckets[:, None] == k_buckets[None, :], found, 0)
            counts += found
    return counts.to(tl.float32)


@triton.jit
def set_scores(
    scores, q_positions, k_positions, is_open, CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXCLUDE_SELF: tl.constexpr
):
    """Set the scores of forbidden pairs and of tokens with themselves; also return which are free."""
    free = tl.full(scores.shape, True, tl.int1)
    if CAUSAL:
        free = q_positions[:, None] >= k_positions[None, :]
    if MASKED:
        free = free & is_open[None, :]
    if CAUSAL or MASKED:
        scores = tl.where(free, scores, _FORBIDDEN)
    if EXCLUDE_SELF:
        own = q_positions[:, None] == k_positions[None, :]
        scores = tl.where(own, _SELF, scores)
        free = free & (q_positions[:, None] != k_positions[None, :])
    return scores, free


@triton.jit
def kept(SEED, ring, q_slots, num_slots, first_column, BLOCK: tl.constexpr, THRESHOLD: tl.constexpr):
    """Return what dropout keeps of the scores of a tile of queries with a tile of keys."""
    seed = tl.load(SEED)
    columns = first_column + tl.arange(0, BLOCK)
    rows = row_words(seed, ring.to(tl.int64) * num_slots + q_slots)
    words = column_words(seed, (columns // 2).to(tl.int64))
    return keep(rows[:, None], words[None, :], (columns % 2)[None, :], THRESHOLD)


@triton.jit
def pair_scores(
    q, k, score_scale, q_positions, k_positions, q_exist, k_exist, is_open, q_labels, k_labels, inside, CHUNK_OF,
    BUCKETS, ring, length, num_chunks, BEFORE: tl.constexpr, WIDTH: tl.constexpr, ROUNDS: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, EXCLUDE_SELF: tl.constexpr, WRAP: tl.constexpr, ACROSS: tl.constexpr,
    DUPLICATES: tl.constexpr, FULL: tl.constexpr, DOT: tl.constexpr,
):
    """Return the scores of a tile of queries with a tile of keys, and which of them a gradient flows through.

    Slots that a query may not look at score minus infinity.
    """
    scores = product(q, k, DOT) * score_scale
    scores, free = set_scores(scores, q_positions, k_positions, is_open, CAUSAL, MASKED, EXCLUDE_SELF)
    if not DUPLICATES:
        counts = appearances(
            CHUNK_OF, BUCKETS, ring, q_positions, q_exist, k_positions, k_exist, length, num_chunks, BEFORE, WIDTH,
            ROUNDS, WRAP, ACROSS,
        )
        scores -= tl.log(tl.maximum(counts, 1.0))
    if not FULL:
        scores = tl.where(k_exist[None, :], scores, float("-inf"))
    if not WRAP:
        scores = tl.where(inside, scores, float("-inf"))
    if not ACROSS:
        scores = tl.where(q_labels[:, None] == k_labels[None, :], scores, float("-inf"))
    return scores, free
