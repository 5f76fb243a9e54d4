"""Attention over chunks: the mathematics of LSH, local and exact attention (Reformer, sections 2 and 3).

Letters: B batch, T positions, H heads, D head size, R rounds, S = R*T slots, C chunk length, N = S/C chunks,
W keys of a chunk's window. ``lse`` is the log-sum-exp of a row of scores. Inputs are unsorted and heads come
third, ``[B, T, H, D]``, as a projection leaves them; so is the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flash_reformer.ops.chunking import count_appearances, gather_rows, look_around, split_chunks, visible_slots
from flash_reformer.ops.randomness import dropout
from flash_reformer.ops.sorting import invert_permutation

#: The score of a pair that the mask or causality forbids, and that of a token with itself. They are scores, not
#: exclusions: a row that sees nothing else sees itself, and a local row whose keys are all masked averages them.
FORBIDDEN_SCORE = -1e9
SELF_SCORE = -1e5
_KEY_NORM_EPS = 1e-6


def softmax_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for norms and softmaxes: at least fp32, and fp64 stays fp64."""
    return torch.promote_types(dtype, torch.float32)


def normalize_keys(qk_XD: Tensor) -> Tensor:
    """Return the keys that a shared query-key projection stands for: unit rows, in the input's dtype.

    ``qk / sqrt(mean(qk²) + 1e-6) / sqrt(D)``; the norm is taken in at least fp32.
    """
    wide = qk_XD.to(softmax_dtype(qk_XD.dtype))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + _KEY_NORM_EPS) / math.sqrt(qk_XD.shape[-1])
    return (wide * scale).to(qk_XD.dtype)


def attention_scores(
    query_XCD: Tensor,
    key_XWD: Tensor,
    query_positions_XC: Tensor,
    key_positions_XW: Tensor,
    key_mask_XW: Tensor | None,
    *,
    causal: bool,
    exclude_self: bool,
    visible_XCW: Tensor | None = None,
) -> Tensor:
    """Return scores ``[..., C, W]`` in at least fp32, with forbidden pairs set by original positions.

    In this order: a later key (if causal) or a masked one scores ``FORBIDDEN_SCORE``; then a token with itself (if
    ``exclude_self``) scores ``SELF_SCORE``; then a slot that is not visible does not exist at all.
    """
    scores_XCW = torch.matmul(query_XCD, key_XWD.transpose(-1, -2)).to(softmax_dtype(query_XCD.dtype))
    query_positions, key_positions = query_positions_XC.unsqueeze(-1), key_positions_XW.unsqueeze(-2)
    if causal:
        scores_XCW = scores_XCW.masked_fill(query_positions < key_positions, FORBIDDEN_SCORE)
    if key_mask_XW is not None:
        scores_XCW = scores_XCW.masked_fill(~key_mask_XW.unsqueeze(-2), FORBIDDEN_SCORE)
    if exclude_self:
        scores_XCW = scores_XCW.masked_fill(query_positions == key_positions, SELF_SCORE)
    if visible_XCW is not None:
        scores_XCW = scores_XCW.masked_fill(~visible_XCW, -math.inf)
    return scores_XCW


def scale_probs(
    probs_BHXW: Tensor, head_mask_H: Tensor | None, dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:
    """Apply dropout, as :func:`dropout` does with rows numbered in order, and the head mask."""
    if dropout_p > 0.0:
        assert dropout_seed is not None, "dropout needs a seed"
        probs_BHXW = dropout(probs_BHXW, dropout_p, dropout_seed)
    if head_mask_H is not None:
        probs_BHXW = probs_BHXW * head_mask_H.to(probs_BHXW.dtype).view(-1, *[1] * (probs_BHXW.dim() - 2))
    return probs_BHXW


def merge_rounds(out_BHRTD: Tensor, lse_BHRT: Tensor) -> Tensor:
    """Return ``[B, H, T, D]``: the rounds' outputs weighted by ``softmax_r(lse)``, in at least fp32.

    The sum is taken of differences from the first round, so rounds that agree are returned exactly as they are,
    whatever the weights round to: a token that sees only itself comes back bit for bit.

    >>> merge_rounds(torch.full((1, 1, 3, 1, 1), 0.1), torch.zeros(1, 1, 3, 1)).item() == torch.tensor(0.1).item()
    True
    """
    if out_BHRTD.shape[2] == 1:
        return out_BHRTD[:, :, 0]
    wide = out_BHRTD.to(softmax_dtype(out_BHRTD.dtype))
    weights_BHRT1 = torch.softmax(lse_BHRT, dim=2).unsqueeze(-1)
    first = wide[:, :, :1]
    merged = first[:, :, 0] + (weights_BHRT1 * (wide - first)).sum(dim=2)
    return merged.to(out_BHRTD.dtype)


def _mask_of_slots(mask_BT: Tensor | None, positions_BHS: Tensor) -> Tensor | None:
    if mask_BT is None:
        return None
    return mask_BT[:, None, :].expand(-1, positions_BHS.shape[1], -1).gather(-1, positions_BHS)


def _softmax(scores_XCW: Tensor) -> tuple[Tensor, Tensor]:
    return torch.softmax(scores_XCW, dim=-1), torch.logsumexp(scores_XCW, dim=-1)


def lsh_probs(
    qk_BTHD: Tensor,
    sorted_positions_BHRT: Tensor,
    buckets_BHRT: Tensor | None = None,
    mask_BT: Tensor | None = None,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    wrap_around: bool = True,
    attend_across_buckets: bool = True,
    allow_duplicate_attention: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return LSH attention's probabilities ``[B, H, N, C, W]`` and log-sum-exps ``[B, H, N, C]``, in sorted order."""
    window = {"num_chunks_before": num_chunks_before, "num_chunks_after": num_chunks_after}
    options: dict[str, Any] = {
        "chunk_length": chunk_length,
        **window,
        "wrap_around": wrap_around,
        "attend_across_buckets": attend_across_buckets,
    }
    positions_BHS = sorted_positions_BHRT.flatten(2)
    query_BHNCD = split_chunks(gather_rows(qk_BTHD, positions_BHS), chunk_length)
    positions_BHNC = split_chunks(positions_BHS, chunk_length)
    key_mask_BHS = _mask_of_slots(mask_BT, positions_BHS)
    scores_BHNCW = attention_scores(
        query_BHNCD,
        look_around(normalize_keys(query_BHNCD), **window),
        positions_BHNC,
        look_around(positions_BHNC, **window),
        None if key_mask_BHS is None else look_around(split_chunks(key_mask_BHS, chunk_length), **window),
        causal=causal,
        exclude_self=True,
        visible_XCW=visible_slots(sorted_positions_BHRT, buckets_BHRT, **options),
    )
    if not allow_duplicate_attention:
        counts = count_appearances(sorted_positions_BHRT, buckets_BHRT, **options)
        # A slot outside the counted windows scores -inf already; 0 appearances must not turn that into NaN.
        scores_BHNCW = scores_BHNCW - counts.clamp(min=1).to(scores_BHNCW.dtype).log()
    return _softmax(scores_BHNCW)


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
    """Attend within sorted chunks and merge the rounds; return output ``[B, T, H, D]`` and lse ``[B, H, R, T]``.

    ``qk`` holds the raw shared projections, ``sorted_positions`` a permutation of the positions per round (T a
    multiple of ``chunk_length``), ``mask`` is True at real tokens. ``buckets`` are read only where
    ``attend_across_buckets`` is off. By default the softmax counts a key once per appearance; without
    ``allow_duplicate_attention`` it is exactly the softmax over the union of a query's windows. Not ``deterministic``
    permits gradients that depend on the order in which a device happens to add them; nothing here makes use of it.
    """
    probs_BHNCW, lse_BHNC = lsh_probs(
        qk_BTHD,
        sorted_positions_BHRT,
        buckets_BHRT,
        mask_BT,
        chunk_length=chunk_length,
        num_chunks_before=num_chunks_before,
        num_chunks_after=num_chunks_after,
        causal=causal,
        wrap_around=wrap_around,
        attend_across_buckets=attend_across_buckets,
        allow_duplicate_attention=allow_duplicate_attention,
    )
    probs_BHNCW = scale_probs(probs_BHNCW, head_mask_H, dropout_p, dropout_seed)
    _, _, R, T = sorted_positions_BHRT.shape
    value_BHNCD = split_chunks(gather_rows(v_BTHD, sorted_positions_BHRT.flatten(2)), chunk_length)
    value_BHNWD = look_around(value_BHNCD, num_chunks_before, num_chunks_after)
    out_BHRTD = torch.matmul(probs_BHNCW.to(v_BTHD.dtype), value_BHNWD).flatten(2, 3).unflatten(2, (R, T))
    slots_BHRT = invert_permutation(sorted_positions_BHRT)
    lse_BHRT = lse_BHNC.flatten(2).unflatten(2, (R, T)).gather(-1, slots_BHRT)
    out_BHRTD = out_BHRTD.gather(3, slots_BHRT.unsqueeze(-1).expand(out_BHRTD.shape))
    out_BHTD = merge_rounds(out_BHRTD, lse_BHRT)
    if num_chunks_before + num_chunks_after > T // chunk_length and dropout_p == 0.0:
        # Only here can a window hold a token three times, and three rounded thirds of a value are not the value.
        alone_BHT1 = (lse_BHRT.amax(dim=2) < 0.999 * SELF_SCORE).unsqueeze(-1)
        out_BHTD = torch.where(alone_BHT1, scale_probs(v_BTHD.transpose(1, 2), head_mask_H, 0.0, None), out_BHTD)
    return out_BHTD.transpose(1, 2), lse_BHRT


def local_probs(
    query_BTHD: Tensor,
    key_BTHD: Tensor,
    mask_BT: Tensor | None = None,
    *,
    chunk_length: int,
    num_chunks_before: int = 1,
    num_chunks_after: int = 0,
    causal: bool = False,
    wrap_around: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return local attention's probabilities ``[B, H, N, C, W]`` and log-sum-exps ``[B, H, N, C]``."""
    B, T, H, D = query_BTHD.shape
    window = {"num_chunks_before": num_chunks_before, "num_chunks_after": num_chunks_after}
    query_BHNCD = split_chunks(query_BTHD.transpose(1, 2), chunk_length)
    key_BHNCD = split_chunks((key_BTHD / math.sqrt(D)).transpose(1, 2), chunk_length)
    positions_11NC = split_chunks(torch.arange(T, device=query_BTHD.device).view(1, 1, T), chunk_length)
    mask_B1NC = None if mask_BT is None else split_chunks(mask_BT[:, None, :], chunk_length)
    visible = visible_slots(
        positions_11NC.flatten(2).unsqueeze(2),
        None,
        chunk_length=chunk_length,
        **window,
        wrap_around=wrap_around,
        attend_across_buckets=True,
    )
    scores_BHNCW = attention_scores(
        query_BHNCD,
        look_around(key_BHNCD, **window),
        positions_11NC,
        look_around(positions_11NC, **window),
        None if mask_B1NC is None else look_around(mask_B1NC, **window),
        causal=causal,
        exclude_self=False,
        visible_XCW=visible,
    )
    return _softmax(scores_BHNCW)


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
    """Attend to the own chunk and its neighbours; return output ``[B, T, H, D]`` and lse ``[B, H, T]``.

    Keys are scaled by ``1/sqrt(D)``. With ``wrap_around`` the first and the last chunk are neighbours.
    """
    probs_BHNCW, lse_BHNC = local_probs(
        query_BTHD,
        key_BTHD,
        mask_BT,
        chunk_length=chunk_length,
        num_chunks_before=num_chunks_before,
        num_chunks_after=num_chunks_after,
        causal=causal,
        wrap_around=wrap_around,
    )
    probs_BHNCW = scale_probs(probs_BHNCW, head_mask_H, dropout_p, dropout_seed)
    value_BHNCD = split_chunks(v_BTHD.transpose(1, 2), chunk_length)
    value_BHNWD = look_around(value_BHNCD, num_chunks_before, num_chunks_after)
    out_BHTD = torch.matmul(probs_BHNCW.to(v_BTHD.dtype), value_BHNWD).flatten(2, 3)
    return out_BHTD.transpose(1, 2), lse_BHNC.flatten(2)


def exact_probs(
    query_BTHD: Tensor, key_BTHD: Tensor, mask_BT: Tensor | None = None, *, causal: bool, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Return exact attention's probabilities ``[B, H, T, T]`` and log-sum-exps ``[B, H, T]``; keys come scaled."""
    positions_11T = torch.arange(query_BTHD.shape[1], device=query_BTHD.device).view(1, 1, -1)
    scores_BHTT = attention_scores(
        query_BTHD.transpose(1, 2),
        key_BTHD.transpose(1, 2),
        positions_11T,
        positions_11T,
        None if mask_BT is None else mask_BT[:, None, :],
        causal=causal,
        exclude_self=exclude_self,
    )
    return _softmax(scores_BHTT)


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
    """Attend to every position; return output ``[B, T, H, D]`` and lse ``[B, H, T]``.

    What both kinds of layer do when a sequence fits one chunk. Keys come scaled: :func:`normalize_keys` of the
    query (with ``exclude_self``) for shared query-key attention, ``key / sqrt(D)`` for the local kind.
    """
    probs_BHTT, lse_BHT = exact_probs(query_BTHD, key_BTHD, mask_BT, causal=causal, exclude_self=exclude_self)
    probs_BHTT = scale_probs(probs_BHTT, head_mask_H, dropout_p, dropout_seed)
    out_BHTD = torch.matmul(probs_BHTT.to(v_BTHD.dtype), v_BTHD.transpose(1, 2))
    return out_BHTD.transpose(1, 2), lse_BHT
