"""Attention layers: LSH attention with shared queries and keys, local attention, and their output projection.

Letters: B batch, T positions, E hidden size, H heads, D head size, R rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flash_reformer import functional
from flash_reformer.layers.call import Call
from flash_reformer.layers.norm import LayerNorm
from flash_reformer.reversible import Record


def _fits_one_chunk(length: int, chunk_length: int | None, call: Call) -> bool:
    """Whether attention is exact: no chunks at all, a sequence within one, or a call that asks for it."""
    return call.exact or chunk_length is None or length <= chunk_length


class LSHSelfAttention(nn.Module):
    """Attention within buckets of locality-sensitive hashes (Reformer, section 2).

    Queries and keys share a projection; a key is the unit vector along its query.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads: int = config.num_attention_heads
        self.attention_head_size: int = config.attention_head_size
        self.chunk_length: int | None = config.lsh_attn_chunk_length
        self.dropout: float = config.lsh_attention_probs_dropout_prob
        self.causal: bool = config.is_decoder
        self.window: dict[str, Any] = {
            "chunk_length": config.lsh_attn_chunk_length,
            "num_chunks_before": config.lsh_num_chunks_before,
            "num_chunks_after": config.lsh_num_chunks_after,
            "causal": config.is_decoder,
            "wrap_around": config.wrap_around,
            "attend_across_buckets": config.lsh_attend_across_buckets,
            "allow_duplicate_attention": config.lsh_allow_duplicate_attention,
        }
        all_head_size = config.num_attention_heads * config.attention_head_size
        self.query_key = nn.Linear(config.hidden_size, all_head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, all_head_size, bias=False)

    def _project(self, hidden_BTE: Tensor) -> tuple[Tensor, Tensor]:
        heads = (self.num_attention_heads, self.attention_head_size)
        return self.query_key(hidden_BTE).unflatten(-1, heads), self.value(hidden_BTE).unflatten(-1, heads)

    def _hash(self, qk_BTHD: Tensor, call: Call) -> Tensor:
        rotations_HDRM = functional.draw_rotations(
            call.seed_for_rotations(self.layer_idx),
            self.num_attention_heads,
            self.attention_head_size,
            call.num_hashes,
            call.bucket_factors,
            qk_BTHD.dtype,
            qk_BTHD.device,
        )
        return functional.hash_vectors(qk_BTHD, rotations_HDRM, call.bucket_factors, call.mask_BT, backend=call.backend)

    def forward(
        self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None = None, record: Record | None = None
    ) -> tuple[Tensor, Record]:
        """Return ``[B, T, H*D]`` and the buckets, which a recomputation passes back as ``record``."""
        qk_BTHD, v_BTHD = self._project(hidden_BTE)
        dropout = call.dropout(self.dropout, self.layer_idx, self.training)
        if _fits_one_chunk(hidden_BTE.shape[1], self.chunk_length, call):
            out_BTHD, _ = functional.exact_attention(
                qk_BTHD,
                functional.normalize_keys(qk_BTHD),
                v_BTHD,
                call.mask_BT,
                head_mask_H,
                causal=self.causal,
                exclude_self=True,
                **dropout,
                backend=call.backend,
            )
            return out_BTHD.flatten(2), ()
        buckets_BHRT = self._hash(qk_BTHD, call) if record is None else record[0]
        out_BTHD, _ = functional.lsh_attention(
            qk_BTHD,
            v_BTHD,
            functional.sort_positions(buckets_BHRT, backend=call.backend),
            buckets_BHRT,
            call.mask_BT,
            head_mask_H,
            **self.window,
            **dropout,
            backend=call.backend,
        )
        return out_BTHD.flatten(2), (buckets_BHRT,)

    def probs(self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None, record: Record) -> Tensor:
        """Return this call's attention probabilities: ``[B, H, N, C, W]`` in sorted order, or ``[B, H, T, T]``."""
        qk_BTHD, _ = self._project(hidden_BTE)
        if not record:
            probs, _ = functional.exact_probs(
                qk_BTHD, functional.normalize_keys(qk_BTHD), call.mask_BT, causal=self.causal, exclude_self=True
            )
        else:
            (buckets_BHRT,) = record
            sorted_positions_BHRT = functional.sort_positions(buckets_BHRT, backend=call.backend)
            probs, _ = functional.lsh_probs(qk_BTHD, sorted_positions_BHRT, buckets_BHRT, call.mask_BT, **self.window)
        dropout = call.dropout(self.dropout, self.layer_idx, self.training)
        return functional.scale_probs(probs, head_mask_H, **dropout)


class LocalSelfAttention(nn.Module):
    """Attention to the own chunk of positions and its neighbours."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_attention_heads: int = config.num_attention_heads
        self.attention_head_size: int = config.attention_head_size
        self.chunk_length: int | None = config.local_attn_chunk_length
        self.dropout: float = config.local_attention_probs_dropout_prob
        self.causal: bool = config.is_decoder
        self.window: dict[str, Any] = {
            "chunk_length": config.local_attn_chunk_length,
            "num_chunks_before": config.local_num_chunks_before,
            "num_chunks_after": config.local_num_chunks_after,
            "causal": config.is_decoder,
            "wrap_around": config.wrap_around,
        }
        all_head_size = config.num_attention_heads * config.attention_head_size
        self.query = nn.Linear(config.hidden_size, all_head_size, bias=False)
        self.key = nn.Linear(config.hidden_size, all_head_size, bias=False)
        self.value = nn.Linear(config.hidden_size, all_head_size, bias=False)

    def _split_heads(self, x_BTX: Tensor) -> Tensor:
        return x_BTX.unflatten(-1, (self.num_attention_heads, self.attention_head_size))

    def forward(
        self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None = None, record: Record | None = None
    ) -> tuple[Tensor, Record]:
        """Return ``[B, T, H*D]`` and an empty record: nothing here is decided twice."""
        query, key, value = (self._split_heads(p(hidden_BTE)) for p in (self.query, self.key, self.value))
        options: dict[str, Any] = {**call.dropout(self.dropout, self.layer_idx, self.training), "backend": call.backend}
        if _fits_one_chunk(hidden_BTE.shape[1], self.chunk_length, call):
            key = key / math.sqrt(self.attention_head_size)
            out_BTHD, _ = functional.exact_attention(
                query, key, value, call.mask_BT, head_mask_H, causal=self.causal, **options
            )
        else:
            out_BTHD, _ = functional.local_attention(
                query, key, value, call.mask_BT, head_mask_H, **self.window, **options
            )
        return out_BTHD.flatten(2), ()

    def probs(self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None, record: Record) -> Tensor:
        """Return the attention probabilities of the same call: ``[B, H, N, C, W]``, or ``[B, H, T, T]``."""
        query, key = (self._split_heads(p(hidden_BTE)) for p in (self.query, self.key))
        if _fits_one_chunk(hidden_BTE.shape[1], self.chunk_length, call):
            key = key / math.sqrt(self.attention_head_size)
            probs, _ = functional.exact_probs(query, key, call.mask_BT, causal=self.causal, exclude_self=False)
        else:
            probs, _ = functional.local_probs(query, key, call.mask_BT, **self.window)
        dropout = call.dropout(self.dropout, self.layer_idx, self.training)
        return functional.scale_probs(probs, head_mask_H, **dropout)


class ReformerSelfOutput(nn.Module):
    """The projection of the heads back to the hidden size, then dropout."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        all_head_size = config.num_attention_heads * config.attention_head_size
        self.dense = nn.Linear(all_head_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BTX: Tensor) -> Tensor:
        """Map ``[B, T, H*D]`` to ``[B, T, E]``."""
        return self.dropout(self.dense(hidden_BTX))


class ReformerAttention(nn.Module):
    """The attention branch of a block: norm, attention of the kind ``config.attn_layers[layer_id]``, projection."""

    def __init__(self, config: Any, layer_id: int = 0) -> None:
        super().__init__()
        kinds: dict[str, Callable[[Any, int], Any]] = {"lsh": LSHSelfAttention, "local": LocalSelfAttention}
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attention = kinds[config.attn_layers[layer_id]](config, layer_id)
        self.output = ReformerSelfOutput(config)

    def forward(
        self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None = None, record: Record | None = None
    ) -> tuple[Tensor, Record]:
        """Return the branch's output ``[B, T, E]`` and the record that a recomputation passes back."""
        attended, record = self.self_attention(self.layer_norm(hidden_BTE), call, head_mask_H, record)
        return self.output(attended), record

    def probs(self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None, record: Record) -> Tensor:
        """Return the attention probabilities that the forward with this record used."""
        return self.self_attention.probs(self.layer_norm(hidden_BTE), call, head_mask_H, record)
