"""LSH, local and exact attention on a GPU: one registered operator with a registered gradient serves the three.

Letters: B batch, T positions, H heads, D head size, R rounds. Local attention is LSH attention whose order is that of
the positions, and exact attention is local attention in one chunk. The gradient of the operator is itself an operator
and has none.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_reformer.kernels.triton._run import Facts, Rules, attend, attend_backward


@torch.library.custom_op("flash_reformer::triton_attention", mutates_args=())
def _attention(
    query_BTHD: Tensor,
    key_BTHD: Tensor | None,
    v_BTHD: Tensor,
    sorted_positions_BHRT: Tensor | None,
    buckets_BHRT: Tensor | None,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    causal: bool,
    exclude_self: bool,
    wrap_around: bool,
    attend_across_buckets: bool,
    allow_duplicate_attention: bool,
    scale: float,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    window = (chunk_length, num_chunks_before, num_chunks_after)
    choices = (causal, exclude_self, wrap_around, attend_across_buckets, allow_duplicate_attention)
    tensors = (query_BTHD, key_BTHD, v_BTHD, sorted_positions_BHRT, buckets_BHRT, mask_BT, dropout_seed)
    return attend(Facts(*tensors), Rules(*window, *choices, scale, dropout_p))


@_attention.register_fake
def _(
    query_BTHD: Tensor, key_BTHD: Tensor | None, v_BTHD: Tensor, sorted_positions_BHRT: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, _D = query_BTHD.shape
    R = 1 if sorted_positions_BHRT is None else sorted_positions_BHRT.shape[2]
    row = v_BTHD.new_empty((B, H, T), dtype=torch.float32)
    lse_BHRT = v_BTHD.new_empty((B, H, R, T), dtype=torch.float32)
    return v_BTHD.new_empty(v_BTHD.shape), lse_BHRT, row, torch.empty_like(row)


@torch.library.custom_op("flash_reformer::triton_attention_backward", mutates_args=())
def _attention_backward(
    d_out_BTHD: Tensor,
    out_BTHD: Tensor,
    top_BHT: Tensor,
    total_BHT: Tensor,
    query_BTHD: Tensor,
    key_BTHD: Tensor | None,
    v_BTHD: Tensor,
    sorted_positions_BHRT: Tensor | None,
    buckets_BHRT: Tensor | None,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    causal: bool,
    exclude_self: bool,
    wrap_around: bool,
    attend_across_buckets: bool,
    allow_duplicate_attention: bool,
    scale: float,
    dropout_p: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    window = (chunk_length, num_chunks_before, num_chunks_after)
    choices = (causal, exclude_self, wrap_around, attend_across_buckets, allow_duplicate_attention)
    tensors = (query_BTHD, key_BTHD, v_BTHD, sorted_positions_BHRT, buckets_BHRT, mask_BT, dropout_seed)
    rules = Rules(*window, *choices, scale, dropout_p)
    return attend_backward(d_out_BTHD, out_BTHD, top_BHT, total_BHT, Facts(*tensors), rules, deterministic)


@_attention_backward.register_fake
def _(
    d_out_BTHD: Tensor,
    out_BTHD: Tensor,
    top_BHT: Tensor,
    total_BHT: Tensor,
    query_BTHD: Tensor,
    key_BTHD: Tensor | None,
    v_BTHD: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (query_BTHD.shape, (0,) if key_BTHD is None else key_BTHD.shape, v_BTHD.shape)
    d_query, d_key, d_v = (v_BTHD.new_empty(shape) for shape in shapes)
    return d_query, d_key, d_v


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    out_BTHD, _lse, top_BHT, total_BHT = output
    ctx.save_for_backward(out_BTHD, top_BHT, total_BHT, *inputs[:7])
    ctx.options = inputs[7:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out_BTHD: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing = [None] * (4 + len(ctx.options))
    if d_out_BTHD is None:
        return None, None, None, *nothing
    d_query, d_key, d_v = _attention_backward(d_out_BTHD, *ctx.saved_tensors, *ctx.options)
    return d_query, d_key if ctx.needs_input_grad[1] else None, d_v, *nothing


_attention.register_autograd(_gradients, setup_context=_remember)


def _scale_heads(out_BTHD: Tensor, head_mask_H: Tensor | None) -> Tensor:
    return out_BTHD if head_mask_H is None else out_BTHD * head_mask_H.to(out_BTHD.dtype).unsqueeze(-1)


def lsh_attention(
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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend within sorted chunks and merge the rounds; see the definition in ``ops``. The lse has no gradient."""
    window = (chunk_length, num_chunks_before, num_chunks_after)
    choices = (causal, True, wrap_around, attend_across_buckets, allow_duplicate_attention)
    # Buckets are looked at only within buckets.
    buckets = None if attend_across_buckets else buckets_BHRT
    tensors = (qk_BTHD, None, v_BTHD, sorted_positions_BHRT, buckets, mask_BT, dropout_seed)
    scale = 1 / math.sqrt(qk_BTHD.shape[-1])
    out_BTHD, lse_BHRT, _, _ = _attention(*tensors, *window, *choices, scale, dropout_p, deterministic)
    return _scale_heads(out_BTHD, head_mask_H), lse_BHRT.detach()


def local_attention(
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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to the own chunk and its neighbours; see the definition in ``ops``. The lse has no gradient."""
    tensors = (query_BTHD, key_BTHD, v_BTHD, None, None, mask_BT, dropout_seed)
    window = (chunk_length, num_chunks_before, num_chunks_after)
    scale = 1 / math.sqrt(query_BTHD.shape[-1])
    choices = (causal, False, wrap_around, True, True, scale, dropout_p, True)
    out_BTHD, lse_BH1T, _, _ = _attention(*tensors, *window, *choices)
    return _scale_heads(out_BTHD, head_mask_H), lse_BH1T.detach().squeeze(2)


def exact_attention(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    mask_BT: Tensor | None = None,
    head_mask_H: Tensor | None = None,
    *,
    causal: bool = False,
    exclude_self: bool = False,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend to every position; see the definition in ``ops``. The lse has no gradient."""
    tensors = (query_BTHD, key_BTHD, v_BTHD, None, None, mask_BT, dropout_seed)
    window = (query_BTHD.shape[1], 0, 0)
    out_BTHD, lse_BH1T, _, _ = _attention(
        *tensors, *window, causal, exclude_self, True, True, True, 1.0, dropout_p, True
    )
    return _scale_heads(out_BTHD, head_mask_H), lse_BH1T.detach().squeeze(2)
