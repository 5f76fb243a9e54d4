"""Hashing with vectors along the last axis, where maxima over rotations run at full width.

Letters: B batch, T positions, H heads, D head size, R rounds, M = sum(bucket factors) / 2, F half a bucket factor,
X vectors of all rows or of one slab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

#: Rotated numbers of one slab.
_SLAB = 2**19


def _digit(x_HRFX: Tensor) -> Tensor:
    """Return int32 ``[H, R, X]``: ``argmax([x ; -x])`` along F, the lowest index on ties."""
    F = x_HRFX.shape[2]
    high_HR1X, low_HR1X = x_HRFX.amax(dim=2, keepdim=True), x_HRFX.amin(dim=2, keepdim=True)
    positive_HR1X = high_HR1X >= -low_HR1X
    hits_HRFX = torch.eq(x_HRFX, torch.where(positive_HR1X, high_HR1X, low_HR1X)).view(torch.uint8)
    # Of the hits the first: the largest number of a countdown, in bytes where it fits.
    kind = torch.uint8 if F < 256 else torch.int32
    countdown_F1 = torch.arange(F, 0, -1, dtype=kind).unsqueeze(-1)
    place_HRX = F - (hits_HRFX * countdown_F1).amax(dim=2).to(torch.int32)
    # Where nothing is a hit, there were numbers that are none; they too go to some bucket.
    place_HRX.clamp_(max=F - 1)
    return torch.where(positive_HR1X.squeeze(2), place_HRX, place_HRX + F)


@torch.library.custom_op("flash_reformer::cpu_hash_vectors", mutates_args=())
def _hash_vectors(
    vectors_BTHD: Tensor, rotations_HDRM: Tensor, bucket_factors: Sequence[int], mask_BT: Tensor | None = None
) -> Tensor:
    B, T, H, D = vectors_BTHD.shape
    R, M = rotations_HDRM.shape[2:]
    rotations_HYD = rotations_HDRM.flatten(2).transpose(1, 2)
    vectors_HDX = vectors_BTHD.reshape(B * T, H, D).permute(1, 2, 0)
    dtype = torch.int16 if math.prod(bucket_factors) + 1 <= 2**15 else torch.int32
    buckets_HRX = torch.empty((H, R, B * T), dtype=dtype)
    step = max(1, _SLAB // (H * R * M))
    for start in range(0, B * T, step):
        block_HDX = vectors_HDX[:, :, start : start + step]
        rotated_HRMX = torch.bmm(rotations_HYD, block_HDX).unflatten(1, (R, M))
        total: Tensor | int = 0
        stride, offset = 1, 0
        for factor in bucket_factors:
            digit = _digit(rotated_HRMX[:, :, offset : offset + factor // 2])
            total = total + stride * digit
            offset += factor // 2
            stride *= factor
        buckets_HRX[:, :, start : start + step] = total
    buckets_BHRT = buckets_HRX.unflatten(2, (B, T)).permute(2, 0, 1, 3).contiguous()
    if mask_BT is not None:
        buckets_BHRT.masked_fill_(~mask_BT[:, None, None, :], math.prod(bucket_factors))
    return buckets_BHRT


@_hash_vectors.register_fake
def _(
    vectors_BTHD: Tensor, rotations_HDRM: Tensor, bucket_factors: Sequence[int], mask_BT: Tensor | None = None
) -> Tensor:
    B, T, H, _ = vectors_BTHD.shape
    dtype = torch.int16 if math.prod(bucket_factors) + 1 <= 2**15 else torch.int32
    return vectors_BTHD.new_empty((B, H, rotations_HDRM.shape[2], T), dtype=dtype)


def hash_vectors(
    vectors_BTHD: Tensor,
    rotations_HDRM: Tensor,
    bucket_factors: Sequence[int],
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Return the bucket of every vector in every round, ``[B, H, R, T]``; see the definition in ``ops``."""
    return _hash_vectors(vectors_BTHD.detach(), rotations_HDRM, list(bucket_factors), mask_BT)
