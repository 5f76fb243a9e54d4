"""LSH, local and exact attention on a CPU, each a registered operator with a registered gradient.

Letters: B batch, T positions, H heads, D head size, R rounds, C chunk length, N chunks of a ring, G = B*H rings,
X = B*T*H rows. The gradient of an operator is itself an operator and has none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flash_reformer.kernels.cpu._deltas import saved_with_delta
from flash_reformer.kernels.cpu._exact import Exact, attend_exactly, attend_exactly_backward
from flash_reformer.kernels.cpu._rings import Rings, attend, attend_backward
from flash_reformer.kernels.cpu._scores import FORBIDDEN_SCORE, MOST_POSITIONS, Facts, Rules, marks
from flash_reformer.kernels.cpu._slabs import Window


def _rows(positions_BHS: Tensor, length: int) -> Tensor:
    """Return the row numbers ``[B, H, S]`` of positions in ``[B*T*H, D]``."""
    B, H, _ = positions_BHS.shape
    batch, head = torch.arange(B).view(B, 1, 1), torch.arange(H).view(1, H, 1)
    return (positions_BHS + batch * length).mul_(H).add_(head)


def _lsh_rings(
    dtype: torch.dtype,
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None,
    mask_BT: Tensor | None,
    window: Window,
    causal: bool,
    attend_across_buckets: bool,
    allow_duplicate_attention: bool,
    dropout: tuple[float, Tensor | None],
) -> Rings:
    B, H, R, T = sorted_positions_BHRT.shape
    C = window.chunk_length
    wide = torch.promote_types(dtype, torch.float32)
    positions_BHS = sorted_positions_BHRT.flatten(2)
    slots = (B * H, R * T // C, C)
    open_GNC = labels_GNC = chunks_RGNC = buckets_RGNC = None
    if mask_BT is not None:
        open_BT = torch.full(mask_BT.shape, torch.inf, dtype=wide).masked_fill_(~mask_BT, FORBIDDEN_SCORE)
        open_GNC = open_BT.unsqueeze(1).expand(B, H, T).gather(-1, positions_BHS).reshape(slots)
    if not attend_across_buckets:
        assert buckets_BHRT is not None, "attend_across_buckets=False needs the buckets"
        sorted_buckets = buckets_BHRT.long().gather(-1, sorted_positions_BHRT)
        # fp64 holds every number of a round and a bucket exactly; labels are only compared.
        labels_GNC = (sorted_buckets * R + torch.arange(R).view(R, 1)).double().reshape(slots)
    if not allow_duplicate_attention:
        places = torch.empty_like(sorted_positions_BHRT)
        places.scatter_(-1, sorted_positions_BHRT, torch.arange(R * T).view(R, T).expand_as(places))
        chunk_of = places.div_(C, rounding_mode="floor")
        chunks_RGNC = torch.stack([chunk_of[:, :, r].gather(-1, positions_BHS).reshape(slots) for r in range(R)]).to(
            wide
        )
        if not attend_across_buckets:
            assert buckets_BHRT is not None
            of_round = [buckets_BHRT[:, :, r].long().gather(-1, positions_BHS).reshape(slots) for r in range(R)]
            buckets_RGNC = torch.stack(of_round)
    facts = Facts(marks(positions_BHS, wide).reshape(slots), open_GNC, labels_GNC, chunks_RGNC, buckets_RGNC)
    rules = Rules(window, causal, exclude_self=True, chunks_per_round=T // C, num_rounds=R)
    return Rings(_rows(positions_BHS, T).reshape(slots), facts, rules, True, H, False, *dropout)


def _flat(x_BTHD: Tensor) -> Tensor:
    return x_BTHD.reshape(-1, x_BTHD.shape[-1])


@torch.library.custom_op("flash_reformer::cpu_lsh_attention", mutates_args=())
def _lsh(
    qk_BTHD: Tensor,
    v_BTHD: Tensor,
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    causal: bool,
    wrap_around: bool,
    attend_across_buckets: bool,
    allow_duplicate_attention: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    window = Window(chunk_length, num_chunks_before, num_chunks_after, wrap_around)
    choices = (causal, attend_across_buckets, allow_duplicate_attention, (dropout_p, dropout_seed))
    rings = _lsh_rings(qk_BTHD.dtype, sorted_positions_BHRT, buckets_BHRT, mask_BT, window, *choices)
    qk_XD = _flat(qk_BTHD)
    out_XD, lse_GNC = attend(qk_XD, qk_XD, _flat(v_BTHD), rings)
    lse_sorted = lse_GNC.view(sorted_positions_BHRT.shape)
    lse_BHRT = torch.empty_like(lse_sorted).scatter_(-1, sorted_positions_BHRT, lse_sorted)
    return out_XD.view(v_BTHD.shape).to(v_BTHD.dtype), lse_BHRT


@_lsh.register_fake
def _(qk_BTHD: Tensor, v_BTHD: Tensor, sorted_positions_BHRT: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(qk_BTHD.dtype, torch.float32)
    return v_BTHD.new_empty(v_BTHD.shape), v_BTHD.new_empty(sorted_positions_BHRT.shape, dtype=wide)


@torch.library.custom_op("flash_reformer::cpu_lsh_attention_backward", mutates_args=())
def _lsh_backward(
    d_out_BTHD: Tensor,
    delta_X: Tensor,
    lse_BHRT: Tensor,
    qk_BTHD: Tensor,
    v_BTHD: Tensor,
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    causal: bool,
    wrap_around: bool,
    attend_across_buckets: bool,
    allow_duplicate_attention: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    window = Window(chunk_length, num_chunks_before, num_chunks_after, wrap_around)
    choices = (causal, attend_across_buckets, allow_duplicate_attention, (dropout_p, dropout_seed))
    rings = _lsh_rings(qk_BTHD.dtype, sorted_positions_BHRT, buckets_BHRT, mask_BT, window, *choices)
    qk_XD = _flat(qk_BTHD)
    lse_X = lse_BHRT.logsumexp(dim=2).transpose(1, 2).reshape(-1)
    weights = None
    if lse_BHRT.shape[2] > 1:
        weights = torch.softmax(lse_BHRT, dim=2).gather(-1, sorted_positions_BHRT).reshape(rings.rows_GNC.shape)
    given = (qk_XD, qk_XD, _flat(v_BTHD), delta_X, lse_X, weights)
    d_qk_XD, _, d_v_XD = attend_backward(_flat(d_out_BTHD), *given, rings)
    return d_qk_XD.view(qk_BTHD.shape).to(qk_BTHD.dtype), d_v_XD.view(v_BTHD.shape).to(v_BTHD.dtype)


@_lsh_backward.register_fake
def _(d_out_BTHD: Tensor, delta_X: Tensor, lse_BHRT: Tensor, qk_BTHD: Tensor, v_BTHD: Tensor, *_: Any) -> Any:
    return qk_BTHD.new_empty(qk_BTHD.shape), v_BTHD.new_empty(v_BTHD.shape)


def _remember_lsh(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:6])
    ctx.options = inputs[6:]


def _lsh_gradients(ctx: Any, d_out_BTHD: Tensor, _: Any) -> tuple[Any, ...]:
    d_qk, d_v = _lsh_backward(d_out_BTHD, *saved_with_delta(ctx, d_out_BTHD), *ctx.options)
    return d_qk, d_v, *[None] * (4 + len(ctx.options))


_lsh.register_autograd(_lsh_gradients, setup_context=_remember_lsh)


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
    assert qk_BTHD.shape[1] <= MOST_POSITIONS, "marks of positions would not be exact"
    out_BTHD, lse_BHRT = _lsh(
        qk_BTHD,
        v_BTHD,
        sorted_positions_BHRT,
        None if attend_across_buckets else buckets_BHRT,
        mask_BT,
        dropout_seed,
        chunk_length,
        num_chunks_before,
        num_chunks_after,
        causal,
        wrap_around,
        attend_across_buckets,
        allow_duplicate_attention,
        dropout_p,
    )
    return _scale_heads(out_BTHD, head_mask_H), lse_BHRT.detach()


def _scale_heads(out_BTHD: Tensor, head_mask_H: Tensor | None) -> Tensor:
    return out_BTHD if head_mask_H is None else out_BTHD * head_mask_H.to(out_BTHD.dtype).unsqueeze(-1)


def _local_rings(
    query_BTHD: Tensor, mask_BT: Tensor | None, window: Window, causal: bool, dropout: tuple[float, Tensor | None]
) -> Rings:
    B, T, H, _D = query_BTHD.shape
    wide = torch.promote_types(query_BTHD.dtype, torch.float32)
    positions_BHT = torch.arange(T).expand(B, H, T)
    slots = (B * H, T // window.chunk_length, window.chunk_length)
    open_GNC = None
    if mask_BT is not None:
        open_BT = torch.full(mask_BT.shape, torch.inf, dtype=wide).masked_fill_(~mask_BT, FORBIDDEN_SCORE)
        open_GNC = open_BT.unsqueeze(1).expand(B, H, T).reshape(slots)
    facts = Facts(marks(positions_BHT, wide).reshape(slots), open_GNC)
    rules = Rules(window, causal, exclude_self=False, chunks_per_round=slots[1], num_rounds=1)
    return Rings(_rows(positions_BHT, T).reshape(slots), facts, rules, False, H, True, *dropout)


@torch.library.custom_op("flash_reformer::cpu_local_attention", mutates_args=())
def _local(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    causal: bool,
    wrap_around: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    window = Window(chunk_length, num_chunks_before, num_chunks_after, wrap_around)
    rings = _local_rings(query_BTHD, mask_BT, window, causal, (dropout_p, dropout_seed))
    out_XD, lse_GNC = attend(_flat(query_BTHD), _flat(key_BTHD), _flat(v_BTHD), rings)
    B, T, H, _ = query_BTHD.shape
    return out_XD.view(v_BTHD.shape).to(v_BTHD.dtype), lse_GNC.view(B, H, T)


@_local.register_fake
def _(query_BTHD: Tensor, key_BTHD: Tensor, v_BTHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _D = query_BTHD.shape
    wide = torch.promote_types(query_BTHD.dtype, torch.float32)
    return v_BTHD.new_empty(v_BTHD.shape), v_BTHD.new_empty((B, H, T), dtype=wide)


@torch.library.custom_op("flash_reformer::cpu_local_attention_backward", mutates_args=())
def _local_backward(
    d_out_BTHD: Tensor,
    delta_X: Tensor,
    lse_BHT: Tensor,
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    chunk_length: int,
    num_chunks_before: int,
    num_chunks_after: int,
    causal: bool,
    wrap_around: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    window = Window(chunk_length, num_chunks_before, num_chunks_after, wrap_around)
    rings = _local_rings(query_BTHD, mask_BT, window, causal, (dropout_p, dropout_seed))
    lse_X = lse_BHT.transpose(1, 2).reshape(-1)
    given = (_flat(query_BTHD), _flat(key_BTHD), _flat(v_BTHD), delta_X, lse_X, None)
    gradients = attend_backward(_flat(d_out_BTHD), *given, rings)
    pairs = zip(gradients, (query_BTHD, key_BTHD, v_BTHD), strict=True)
    d_query, d_key, d_v = (gradient.view(x.shape).to(x.dtype) for gradient, x in pairs)
    return d_query, d_key, d_v


@_local_backward.register_fake
def _(d_out: Tensor, delta: Tensor, lse: Tensor, query_BTHD: Tensor, key_BTHD: Tensor, v_BTHD: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (query_BTHD, key_BTHD, v_BTHD))


def _remember_local(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.options = inputs[5:]


def _local_gradients(ctx: Any, d_out_BTHD: Tensor, _: Any) -> tuple[Any, ...]:
    gradients = _local_backward(d_out_BTHD, *saved_with_delta(ctx, d_out_BTHD), *ctx.options)
    return *gradients, *[None] * (2 + len(ctx.options))


_local.register_autograd(_local_gradients, setup_context=_remember_local)


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
    assert query_BTHD.shape[1] <= MOST_POSITIONS, "marks of positions would not be exact"
    window = (chunk_length, num_chunks_before, num_chunks_after)
    options = (*window, causal, wrap_around, dropout_p)
    out_BTHD, lse_BHT = _local(query_BTHD, key_BTHD, v_BTHD, mask_BT, dropout_seed, *options)
    return _scale_heads(out_BTHD, head_mask_H), lse_BHT.detach()


@torch.library.custom_op("flash_reformer::cpu_exact_attention", mutates_args=())
def _exact(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    causal: bool,
    exclude_self: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    return attend_exactly(query_BTHD, key_BTHD, v_BTHD, Exact(mask_BT, causal, exclude_self, dropout_p, dropout_seed))


@_exact.register_fake
def _(query_BTHD: Tensor, key_BTHD: Tensor, v_BTHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _D = query_BTHD.shape
    wide = torch.promote_types(query_BTHD.dtype, torch.float32)
    return v_BTHD.new_empty(v_BTHD.shape), v_BTHD.new_empty((B, H, T), dtype=wide)


@torch.library.custom_op("flash_reformer::cpu_exact_attention_backward", mutates_args=())
def _exact_backward(
    d_out_BTHD: Tensor,
    out_BTHD: Tensor,
    lse_BHT: Tensor,
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    v_BTHD: Tensor,
    mask_BT: Tensor | None,
    dropout_seed: Tensor | None,
    causal: bool,
    exclude_self: bool,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    exact = Exact(mask_BT, causal, exclude_self, dropout_p, dropout_seed)
    return attend_exactly_backward(d_out_BTHD, out_BTHD, lse_BHT, query_BTHD, key_BTHD, v_BTHD, exact)


@_exact_backward.register_fake
def _(d_out: Tensor, out: Tensor, lse: Tensor, query_BTHD: Tensor, key_BTHD: Tensor, v_BTHD: Tensor, *_: Any) -> Any:
    return tuple(x.new_empty(x.shape) for x in (query_BTHD, key_BTHD, v_BTHD))


def _exact_gradients(ctx: Any, d_out_BTHD: Tensor, _: Any) -> tuple[Any, ...]:
    gradients = _exact_backward(d_out_BTHD, *ctx.saved_tensors, *ctx.options)
    return *gradients, *[None] * (2 + len(ctx.options))


_exact.register_autograd(_exact_gradients, setup_context=_remember_local)


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
    """Attend to every position, some queries at a time; see the definition in ``ops``. The lse has no gradient."""
    options = (causal, exclude_self, dropout_p)
    out_BTHD, lse_BHT = _exact(query_BTHD, key_BTHD, v_BTHD, mask_BT, dropout_seed, *options)
    return _scale_heads(out_BTHD, head_mask_H), lse_BHT.detach()
