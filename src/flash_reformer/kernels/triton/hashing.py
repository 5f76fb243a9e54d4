"""Hashing in one pass over the vectors: rotated numbers are compared where they are made and never written.

Letters: B batch, T positions, H heads, D head size, R rounds, M = sum(bucket factors) / 2, F half a bucket factor,
N positions of a tile.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_reformer.kernels.triton._launch import block_of, dot_dtype, dtype_of, launch
from flash_reformer.kernels.triton._rounding import rounded

#: Positions of a tile, rotations that are compared at a time (at most) and warps, by bytes of a number. Exact fp32
#: products keep their operands in registers.
_TILES = {2: (128, 64, 4), 4: (64, 32, 8)}


@triton.jit
def _digit(x_ND, ROTATIONS, place, step, D: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Return int32 ``[N]``: ``argmax([x·rot ; -x·rot])`` over F rotations that start at ``place``.

    The largest of both signs is the largest magnitude. Of equal ones the lowest index counts, positive numbers before
    negative ones; so of equals in two blocks it may stand in the later one.
    """
    N: tl.constexpr = x_ND.shape[0]
    d = tl.arange(0, x_ND.shape[1])
    best_N = tl.full([N], -1.0, tl.float32)
    index_N = tl.zeros([N], tl.int32)
    for start in range(0, F, BLOCK):
        f = start + tl.arange(0, BLOCK)
        inside = (d[:, None] < D) & (f[None, :] < F)
        rotations = tl.load(ROTATIONS + (place + d[:, None] * step + f[None, :]), mask=inside, other=0.0)
        rotated = tl.dot(x_ND, rotations.to(x_ND.dtype), input_precision="ieee")
        # As defined: products in the dtype of the vectors, so that what ties there ties here.
        rotated = rounded(rotated, DTYPE).to(tl.float32)
        # What is no number counts as the largest, so that some index comes out. It is in range: rotations that do not
        # exist give 0, or no number where a vector has infinities, and of equals the lowest index is less than 2 F.
        size = tl.where(rotated == rotated, tl.abs(rotated), float("inf"))
        most_N = tl.max(size, 1)
        indices = tl.where(rotated < 0, f[None, :] + F, f[None, :])
        first_N = tl.min(tl.where(size == most_N[:, None], indices, 2 * F), 1)
        both_N = tl.minimum(index_N, first_N)
        index_N = tl.where(most_N > best_N, first_N, tl.where(most_N == best_N, both_N, index_N))
        best_N = tl.maximum(best_N, most_N)
    return index_N


@triton.jit
def _hash_kernel(
    VECTORS,
    ROTATIONS,
    MASK,
    BUCKETS,
    T,
    H,
    R: tl.constexpr,
    M: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    N: tl.constexpr,
):
    """One tile of positions of one head: all rounds, all factors."""
    tiles = tl.cdiv(T, N)
    row = tl.program_id(0) // tiles
    b, h = row // H, row % H
    t = (tl.program_id(0) % tiles) * N + tl.arange(0, N)
    d = tl.arange(0, BLOCK_D)
    places = (b.to(tl.int64) * T + t[:, None]) * (H * D) + h * D + d[None, :]
    x_ND = tl.load(VECTORS + places, mask=(t[:, None] < T) & (d[None, :] < D), other=0.0).to(DOT)
    for r in range(R):
        bucket_N = tl.zeros([N], tl.int32)
        place = h.to(tl.int64) * (D * R * M) + r * M
        stride = 1
        for i in tl.static_range(len(HALVES)):
            bucket_N += stride * _digit(x_ND, ROTATIONS, place, R * M, D, HALVES[i], BLOCKS[i], DTYPE)
            place += HALVES[i]
            stride *= 2 * HALVES[i]
        if HAS_MASK:
            real = tl.load(MASK + b.to(tl.int64) * T + t, mask=t < T, other=False)
            bucket_N = tl.where(real, bucket_N, stride)
        out = (row.to(tl.int64) * R + r) * T + t
        tl.store(BUCKETS + out, bucket_N.to(BUCKETS.dtype.element_ty), mask=t < T)


def _empty_buckets(vectors_BTHD: Tensor, rotations_HDRM: Tensor, bucket_factors: Sequence[int]) -> Tensor:
    B, T, H, _ = vectors_BTHD.shape
    dtype = torch.int16 if math.prod(bucket_factors) + 1 <= 2**15 else torch.int32
    return torch.empty((B, H, rotations_HDRM.shape[2], T), dtype=dtype, device=vectors_BTHD.device)


@torch.library.custom_op("flash_reformer::triton_hash_vectors", mutates_args=())
def _hash_vectors(
    vectors_BTHD: Tensor, rotations_HDRM: Tensor, bucket_factors: Sequence[int], mask_BT: Tensor | None = None
) -> Tensor:
    B, T, H, D = vectors_BTHD.shape
    buckets_BHRT = _empty_buckets(vectors_BTHD, rotations_HDRM, bucket_factors)
    halves = tuple(factor // 2 for factor in bucket_factors)
    positions, rotations, num_warps = _TILES[vectors_BTHD.element_size()]
    launch(
        _hash_kernel,
        B * H * triton.cdiv(T, positions),
        vectors_BTHD.contiguous(),
        rotations_HDRM.contiguous(),
        buckets_BHRT if mask_BT is None else mask_BT.contiguous(),
        buckets_BHRT,
        T,
        H,
        R=rotations_HDRM.shape[2],
        M=rotations_HDRM.shape[3],
        D=D,
        BLOCK_D=block_of(D),
        HALVES=halves,
        BLOCKS=tuple(min(rotations, block_of(half)) for half in halves),
        DTYPE=dtype_of(vectors_BTHD),
        DOT=dot_dtype(vectors_BTHD),
        HAS_MASK=mask_BT is not None,
        N=positions,
        like=vectors_BTHD,
        num_warps=num_warps,
    )
    return buckets_BHRT


@_hash_vectors.register_fake
def _(
    vectors_BTHD: Tensor, rotations_HDRM: Tensor, bucket_factors: Sequence[int], mask_BT: Tensor | None = None
) -> Tensor:
    return _empty_buckets(vectors_BTHD, rotations_HDRM, bucket_factors)


def hash_vectors(
    vectors_BTHD: Tensor,
    rotations_HDRM: Tensor,
    bucket_factors: Sequence[int],
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Return the bucket of every vector in every round, ``[B, H, R, T]``; see the definition in ``ops``."""
    return _hash_vectors(vectors_BTHD.detach(), rotations_HDRM, list(bucket_factors), mask_BT)
