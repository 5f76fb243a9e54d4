"""A step of decoding: one query per program, which gathers the keys and values of its window itself.

Letters: B rows, H heads, M new tokens, X keys of a window, D head size, Y rows of storage, U positions that it has room
for.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_reformer.kernels.triton._launch import UNSPECIALIZED, block_of, launch
from flash_reformer.kernels.triton._rounding import rounded

_SELF = tl.constexpr(-1e5)
#: Keys that a program looks at together.
_KEYS = 64


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attend_at_kernel(
    QUERY,
    STORAGE,
    LANES,
    POSITIONS,
    VISIBLE,
    OUT,
    num_tokens,
    num_heads,
    X: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Write the attention of query (b, h, m), programs counted in that order; its own key is the last one."""
    program = tl.program_id(0)
    lane, token = program // num_tokens, program % num_tokens
    batch, head = lane // num_heads, lane % num_heads
    columns = tl.arange(0, BLOCK_D)
    here = columns < D
    at = ((batch.to(tl.int64) * num_tokens + token) * num_heads + head) * D + columns
    query = tl.load(QUERY + at, mask=here, other=0.0).to(tl.float32)
    first_row = tl.load(LANES + lane)
    window = program.to(tl.int64) * X
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    out = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, X, KEYS):
        keys = start + tl.arange(0, KEYS)
        exist = keys < X
        rows = first_row + tl.load(POSITIONS + window + keys, mask=exist, other=0)
        places = rows[:, None] * (2 * D) + columns[None, :]
        there = exist[:, None] & here[None, :]
        key = tl.load(STORAGE + places, mask=there, other=0.0).to(tl.float32)
        value = tl.load(STORAGE + places + D, mask=there, other=0.0).to(tl.float32)
        scores = tl.sum(key * query[None, :], 1)
        seen = tl.load(VISIBLE + window + keys, mask=exist, other=0) != 0
        scores = tl.where(seen, scores, tl.where(keys == X - 1, _SELF, float("-inf")))
        new_top = tl.maximum(top, tl.max(scores, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        powers = tl.exp(scores - shift)
        shrink = tl.exp(top - shift)
        total = total * shrink + tl.sum(powers, 0)
        out = out * shrink + tl.sum(powers[:, None] * value, 0)
        top = new_top
    tl.store(OUT + at, rounded(out / total, OUT.dtype.element_ty), mask=here)


@torch.library.custom_op("flash_reformer::triton_attend_at", mutates_args=())
def _attend_at(
    query_BMHD: Tensor, keys_values_YHUX: Tensor, lanes_BH: Tensor, positions_BHMX: Tensor, visible_BHMX: Tensor
) -> Tensor:
    B, M, H, D = query_BMHD.shape
    query = query_BMHD.contiguous()
    out_BMHD = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    launch(
        _attend_at_kernel,
        B * H * M,
        query,
        keys_values_YHUX.contiguous(),
        lanes_BH.contiguous(),
        positions_BHMX.contiguous(),
        visible_BHMX.contiguous().view(torch.uint8),
        out_BMHD,
        M,
        H,
        X=positions_BHMX.shape[-1],
        D=D,
        BLOCK_D=block_of(D),
        KEYS=_KEYS,
        like=query,
        num_warps=4,
    )
    return out_BMHD


@_attend_at.register_fake
def _(
    query_BMHD: Tensor, keys_values_YHUX: Tensor, lanes_BH: Tensor, positions_BHMX: Tensor, visible_BHMX: Tensor
) -> Tensor:
    return query_BMHD.new_empty(query_BMHD.shape)


def attend_at(
    query_BMHD: Tensor,
    keys_values_YHUX: Tensor,
    lanes_BH: Tensor,
    positions_BHMX: Tensor,
    visible_BHMX: Tensor,
    head_mask_H: Tensor | None = None,
) -> Tensor:
    """Attend to stored keys at positions of each query's own; see the definition in ``ops``. It has no gradient."""
    out = _attend_at(query_BMHD.detach(), keys_values_YHUX, lanes_BH, positions_BHMX, visible_BHMX)
    return out if head_mask_H is None else out * head_mask_H.to(out.dtype).view(-1, 1)
