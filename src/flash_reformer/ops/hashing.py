"""Angular locality-sensitive hashing (Reformer, section 2; Andoni et al., 2015).

Letters: B batch, T positions, H heads, D head size, R rounds, M = sum(bucket factors) / 2.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def automatic_num_buckets(length: int, chunk_length: int, max_position_embeddings: int) -> list[int]:
    """Return the bucket factors that ``num_buckets=None`` stands for at ``length`` (padded) positions.

    About two chunks' worth of tokens share a bucket; a large count is factorised so that the rotations stay small.

    >>> automatic_num_buckets(1024, 64, 4096), automatic_num_buckets(2**19, 64, 2**19)
    ([32], [128, 128])
    """
    power = max(1, (2 * (length // chunk_length)).bit_length() - 1)
    limit = 2 * max(math.isqrt(max_position_embeddings // chunk_length), chunk_length)
    if 2**power <= limit:
        return [2**power]
    return [2 ** (power // 2), 2 ** (power - power // 2)]


def _draw(seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=device)


#: What was drawn on devices. While a graph is captured no generator may be used, and by then a fixed seed has been.
_drawn_before = functools.lru_cache(maxsize=8)(_draw)


@torch.library.custom_op("flash_reformer::draw_rotations", mutates_args=())
def _draw_rotations(seed: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Seeds live on the CPU: reading one waits for no device.
    if device.type == "cpu":
        return _draw(int(seed), tuple(shape), dtype, device)
    return _drawn_before(int(seed), tuple(shape), dtype, device).clone()


@_draw_rotations.register_fake
def _(seed: Tensor, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def draw_rotations(
    seed: Tensor,
    num_heads: int,
    head_size: int,
    num_hashes: int,
    bucket_factors: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Draw the random rotations ``[H, D, R, M]``, i.i.d. N(0, 1), from a private generator seeded with ``seed``.

    The user's own random state does not move. With the same seed, dtype and device the numbers equal those of
    ``torch.manual_seed(seed)`` followed by ``torch.randn`` of that shape. A registered operator, with the seed (int64,
    no dimensions, on the CPU) as an input tensor: a generator cannot be made inside a compiled graph.
    """
    return _draw_rotations(seed, (num_heads, head_size, num_hashes, sum(bucket_factors) // 2), dtype, device)


def bucket_dtype(bucket_factors: Sequence[int]) -> torch.dtype:
    """Return the narrowest dtype that holds every bucket id, the extra one for masked positions included.

    >>> bucket_dtype([32766]), bucket_dtype([32768])
    (torch.int16, torch.int32)
    """
    return torch.int16 if math.prod(bucket_factors) + 1 <= 2**15 else torch.int32


def hash_vectors(
    vectors_BTHD: Tensor,
    rotations_HDRM: Tensor,
    bucket_factors: Sequence[int],
    mask_BT: Tensor | None = None,
) -> Tensor:
    """Return the bucket of every vector in every round, ``[B, H, R, T]`` of :func:`bucket_dtype`.

    Per factor, ``argmax([x·rot ; -x·rot])``, the lowest index on ties; factors combine as digits, the first one
    least significant. Where ``mask_BT`` is False the id is ``K``, one past the last bucket, so that a sort puts
    masked positions at the end of their round. Carries no gradient.

    >>> x = torch.tensor([[[[3.0, 1.0]], [[-1.0, -2.0]]]])          # two positions, one head
    >>> hash_vectors(x, torch.eye(2).view(1, 2, 1, 2), [4]).tolist()  # axes +x, +y, -x, -y
    [[[[0, 3]]]]
    """
    rotated_BHTY = torch.matmul(vectors_BTHD.detach().transpose(1, 2), rotations_HDRM.flatten(2))
    rotated_BHTRM = rotated_BHTY.unflatten(-1, rotations_HDRM.shape[2:])
    widths = [factor // 2 for factor in bucket_factors]
    buckets_BHTR: Tensor | None = None
    stride = 1
    for factor, rotated in zip(bucket_factors, rotated_BHTRM.split(widths, dim=-1), strict=True):
        digit = torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1)
        buckets_BHTR = digit if buckets_BHTR is None else buckets_BHTR + stride * digit
        stride *= factor
    assert buckets_BHTR is not None
    buckets_BHRT = buckets_BHTR.transpose(2, 3)
    if mask_BT is not None:
        buckets_BHRT = buckets_BHRT.masked_fill(~mask_BT[:, None, None, :], stride)
    return buckets_BHRT.to(bucket_dtype(bucket_factors), memory_format=torch.contiguous_format)
