"""Attention layers: LSH attention with shared queries and keys, local attention, and their output projection.

Letters: B batch, T positions, E hidden size, H heads, D head size, R rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flash_reformer import functional
from flash_reformer.branches import Record
from flash_reformer.layers.call import Call
from flash_reformer.layers.decode_step import SHARED_BLOCK, WINDOW_BLOCK, Span, Step
from flash_reformer.layers.decode_storage import Fill, ordinary_tensors
from flash_reformer.layers.linear import Dropout, Linear
from flash_reformer.layers.local_state import LocalState
from flash_reformer.layers.lsh_state import LSHState
from flash_reformer.layers.norm import LayerNorm
from flash_reformer.layers.watched import is_watched


def _fits_one_chunk(length: int, chunk_length: int | None, call: Call) -> bool:
    """Whether attention is exact: no chunks at all, a sequence within one, or a call that asks for it."""
    return call.exact or chunk_length is None or length <= chunk_length


def _each_block(
    spans: list[Span], block: int, query_BTHD: Tensor, attend: Callable[[Span, int, int, Tensor], Tensor]
) -> Tensor:
    """Return ``[B, T, H, D]``, computed for the rows and some new tokens of one span at a time."""
    T = query_BTHD.shape[1]
    if len(spans) == 1 and block >= T:
        return attend(spans[0], 0, T, query_BTHD)
    out_BTHD = torch.empty_like(query_BTHD)
    for span in spans:
        rows: Any = slice(None) if span.rows is None else torch.tensor(span.rows, device=query_BTHD.device)
        for start in range(span.start, span.stop, block):
            stop = min(start + block, span.stop)
            part = attend(span, start, stop, query_BTHD[rows, start:stop])
            out_BTHD[rows, start:stop] = part.to(out_BTHD.dtype)
    return out_BTHD


class LSHSelfAttention(nn.Module):
    """Attention within buckets of locality-sensitive hashes (Reformer, section 2).

    Queries and keys share a projection; a key is the unit vector along its query.
    """

    #: Options of the windows that decoding needs; it is causal, and sees no chunks after its own.
    _STEP_OPTIONS = ("chunk_length", "num_chunks_before", "wrap_around", "attend_across_buckets")

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
        self.query_key = Linear(config.hidden_size, all_head_size, bias=False)
        self.value = Linear(config.hidden_size, all_head_size, bias=False)

    def project(self, hidden_BTE: Tensor) -> tuple[Tensor, Tensor]:
        """Return shared queries and keys, and values, ``[B, T, H, D]`` each. Every position is by itself."""
        heads = (self.num_attention_heads, self.attention_head_size)
        return self.query_key(hidden_BTE).unflatten(-1, heads), self.value(hidden_BTE).unflatten(-1, heads)

    def _hash(self, qk_BTHD: Tensor, call: Call) -> Tensor:
        all_rotations_HDRM = functional.draw_rotations(
            call.seed_for_rotations(self.layer_idx),
            self.num_attention_heads,
            self.attention_head_size,
            call.num_hashes,
            call.bucket_factors,
            qk_BTHD.dtype,
            qk_BTHD.device,
        )
        rotations_HDRM = call.exchange.my_heads(all_rotations_HDRM)
        return functional.hash_vectors(qk_BTHD, rotations_HDRM, call.bucket_factors, call.mask_BT, backend=call.backend)

    def forward(
        self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None = None, record: Record | None = None
    ) -> tuple[Tensor, Record]:
        """Return ``[B, T, H*D]`` and the buckets, which a recomputation passes back as ``record``."""
        return self.mix(self.project(hidden_BTE), call, head_mask_H, record)

    def mix(
        self, projected: Sequence[Tensor], call: Call, head_mask_H: Tensor | None, record: Record | None
    ) -> tuple[Tensor, Record]:
        """Do what :meth:`forward` does with what :meth:`project` has returned."""
        qk_BTHD, v_BTHD = map(call.exchange.to_heads, projected)
        dropout = call.dropout(self.dropout, self.layer_idx, self.training)
        # Only the forward fills a cache, not its recomputation.
        fill = call.fill if record is None else None
        if _fits_one_chunk(qk_BTHD.shape[1], self.chunk_length, call):
            if fill is not None:
                self._fill(fill, qk_BTHD, v_BTHD, None, None, call)
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
            return call.exchange.to_positions(out_BTHD).flatten(2), ()
        buckets_BHRT = self._hash(qk_BTHD, call) if record is None else record[0]
        sorted_positions_BHRT = functional.sort_positions(buckets_BHRT, backend=call.backend)
        if fill is not None:
            self._fill(fill, qk_BTHD, v_BTHD, buckets_BHRT, sorted_positions_BHRT, call)
        out_BTHD, _ = functional.lsh_attention(
            qk_BTHD,
            v_BTHD,
            sorted_positions_BHRT,
            buckets_BHRT,
            call.mask_BT,
            head_mask_H,
            **self.window,
            **dropout,
            deterministic=call.deterministic,
            backend=call.backend,
        )
        return call.exchange.to_positions(out_BTHD).flatten(2), (buckets_BHRT,)

    def _fill(
        self,
        fill: Fill,
        qk_BTHD: Tensor,
        v_BTHD: Tensor,
        buckets_BHRT: Tensor | None,
        sorted_positions_BHRT: Tensor | None,
        call: Call,
    ) -> None:
        keys_BTHD = functional.normalize_keys(qk_BTHD.detach())
        state: Any = fill.states[self.layer_idx]
        with ordinary_tensors():
            state.fill(keys_BTHD, v_BTHD, fill, buckets_BHRT, sorted_positions_BHRT, call.bucket_factors)

    def decode(self, hidden_BTE: Tensor, step: Step, state: LSHState, head_mask_H: Tensor | None = None) -> Tensor:
        """Return ``[B, T, H*D]`` for new tokens; the state grows by them."""
        qk_BTHD, v_BTHD = self.project(hidden_BTE)
        state.append(functional.normalize_keys(qk_BTHD), v_BTHD, step)

        def attend(span: Span, start: int, stop: int, query_BMHD: Tensor) -> Tensor:
            if span.factors is None:
                return self._attend_exactly(query_BMHD, span, start, stop, step, state, head_mask_H)
            if start == span.start:
                state.hash_span(qk_BTHD, span, step)
            options = {name: self.window[name] for name in self._STEP_OPTIONS}
            positions_BHMX, visible_BHMX = state.windows(span, start, stop, step, options)
            if not self.window["allow_duplicate_attention"]:
                positions_BHMX, visible_BHMX = functional.without_repeats(positions_BHMX, visible_BHMX)
            # Its own key and value come last.
            own_XM = step.lengths_after(start, stop, span.rows) - 1
            own_BHM1 = own_XM[:, None, :, None].expand(*positions_BHMX.shape[:3], 1)
            positions_BHMX = torch.cat([positions_BHMX, own_BHM1], dim=-1)
            visible_BHMX = torch.nn.functional.pad(visible_BHMX, (0, 1))
            windows = (*state.lanes(span, step), positions_BHMX, visible_BHMX)
            return functional.attend_at(query_BMHD, *windows, head_mask_H, backend=step.call.backend)

        return _each_block(step.spans(self.chunk_length, hashed=True), WINDOW_BLOCK, qk_BTHD, attend).flatten(2)

    def _attend_exactly(
        self,
        query_BMHD: Tensor,
        span: Span,
        start: int,
        stop: int,
        step: Step,
        state: LSHState,
        head_mask_H: Tensor | None,
    ) -> Tensor:
        rows = range(len(step.lengths)) if span.rows is None else span.rows
        upto = max(step.lengths[row] for row in rows) + stop
        key_BHUD, value_BHUD = state.seen(span.rows, upto)

        def bias() -> Tensor:
            positions_1U = torch.arange(upto, device=query_BMHD.device).unsqueeze(0)
            lengths_XM = step.lengths_after(start, stop, span.rows)
            dtype = functional.softmax_dtype(query_BMHD.dtype)
            return functional.exact_bias(positions_1U, lengths_XM, exclude_self=True, dtype=dtype)

        bias_XMU = step.once(("exact", start, stop, span.rows, upto), bias)
        return functional.attend_with_bias(query_BMHD, key_BHUD, value_BHUD, bias_XMU, head_mask_H)

    def probs(self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None, record: Record) -> Tensor:
        """Return this call's attention probabilities: ``[B, H, N, C, W]`` in sorted order, or ``[B, H, T, T]``."""
        qk_BTHD = call.exchange.to_heads(self.project(hidden_BTE)[0])
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
        self.query = Linear(config.hidden_size, all_head_size, bias=False)
        self.key = Linear(config.hidden_size, all_head_size, bias=False)
        self.value = Linear(config.hidden_size, all_head_size, bias=False)

    def _split_heads(self, x_BTX: Tensor) -> Tensor:
        return x_BTX.unflatten(-1, (self.num_attention_heads, self.attention_head_size))

    def forward(
        self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None = None, record: Record | None = None
    ) -> tuple[Tensor, Record]:
        """Return ``[B, T, H*D]`` and an empty record: nothing here is decided twice."""
        return self.mix(self.project(hidden_BTE), call, head_mask_H, record)

    def project(self, hidden_BTE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, ``[B, T, H, D]`` each. Every position is by itself."""
        query, key, value = (self._split_heads(p(hidden_BTE)) for p in (self.query, self.key, self.value))
        return query, key, value

    def mix(
        self, projected: Sequence[Tensor], call: Call, head_mask_H: Tensor | None, record: Record | None
    ) -> tuple[Tensor, Record]:
        """Do what :meth:`forward` does with what :meth:`project` has returned."""
        query, key, value = map(call.exchange.to_heads, projected)
        options: dict[str, Any] = {**call.dropout(self.dropout, self.layer_idx, self.training), "backend": call.backend}
        if call.fill is not None and record is None:
            scaled = key.detach() / math.sqrt(self.attention_head_size)
            state: Any = call.fill.states[self.layer_idx]
            with ordinary_tensors():
                state.fill(scaled, value, call.fill)
        if _fits_one_chunk(query.shape[1], self.chunk_length, call):
            key = key / math.sqrt(self.attention_head_size)
            out_BTHD, _ = functional.exact_attention(
                query, key, value, call.mask_BT, head_mask_H, causal=self.causal, **options
            )
        else:
            out_BTHD, _ = functional.local_attention(
                query, key, value, call.mask_BT, head_mask_H, **self.window, **options
            )
        return call.exchange.to_positions(out_BTHD).flatten(2), ()

    def decode(self, hidden_BTE: Tensor, step: Step, state: LocalState, head_mask_H: Tensor | None = None) -> Tensor:
        """Return ``[B, T, H*D]`` for new tokens; the state goes on by them."""
        query, key, value = self.project(hidden_BTE)
        state.append(key / math.sqrt(self.attention_head_size), value, step)

        def attend(span: Span, start: int, stop: int, query_BMHD: Tensor) -> Tensor:
            key_BHUD, value_BHUD, positions_XU = state.seen(step, stop)
            rows = span.rows
            if rows is not None:
                index = list(rows)
                key_BHUD, value_BHUD = key_BHUD[index], value_BHUD[index]
                positions_XU = positions_XU if positions_XU.shape[0] == 1 else positions_XU[index]

            def bias() -> Tensor:
                lengths_XM = step.lengths_after(start, stop, rows)
                dtype = functional.softmax_dtype(query_BMHD.dtype)
                if span.factors is None:
                    return functional.exact_bias(positions_XU, lengths_XM, exclude_self=False, dtype=dtype)
                options = {name: self.window[name] for name in ("chunk_length", "num_chunks_before", "wrap_around")}
                padded_XM = step.padded_after(start, stop, rows)
                return functional.window_bias(positions_XU, lengths_XM, padded_XM, **options, dtype=dtype)

            key_of_bias = (span.factors is None, start, stop, rows, tuple(state.base), key_BHUD.shape[2])
            bias_XMU = step.once(("local", *key_of_bias), bias)
            return functional.attend_with_bias(query_BMHD, key_BHUD, value_BHUD, bias_XMU, head_mask_H)

        spans = step.spans(self.chunk_length, hashed=False)
        return _each_block(spans, SHARED_BLOCK, query, attend).flatten(2)

    def probs(self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None, record: Record) -> Tensor:
        """Return the attention probabilities of the same call: ``[B, H, N, C, W]``, or ``[B, H, T, T]``."""
        query, key = (call.exchange.to_heads(self._split_heads(p(hidden_BTE))) for p in (self.query, self.key))
        if _fits_one_chunk(query.shape[1], self.chunk_length, call):
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
        self.dense = Linear(all_head_size, config.hidden_size, bias=False)
        self.dropout = Dropout(config.hidden_dropout_prob)

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
        #: Numbers per position of the widest tensor between the parts of this branch.
        self.widest: int = max(config.hidden_size, config.num_attention_heads * config.attention_head_size)

    def forward(
        self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None = None, record: Record | None = None
    ) -> tuple[Tensor, Record]:
        """Return the branch's output ``[B, T, E]`` and the record that a recomputation passes back."""
        attended, record = self.self_attention(self.layer_norm(hidden_BTE), call, head_mask_H, record)
        return self.output(attended), record

    # The same in three parts, for inputs that are too long to go at once.

    def enter(self, hidden_BTE: Tensor) -> tuple[Tensor, ...]:
        """Return the projections ``[B, T, H, D]``; every position is by itself."""
        projections: tuple[Tensor, ...] = self.self_attention.project(self.layer_norm(hidden_BTE))
        return projections

    def mix(
        self, projected: Sequence[Tensor], call: Call, head_mask_H: Tensor | None, record: Record | None
    ) -> tuple[Tensor, Record]:
        """Return ``[B, T, H*D]``, where positions meet, and the record."""
        mixed: tuple[Tensor, Record] = self.self_attention.mix(projected, call, head_mask_H, record)
        return mixed

    def leave(self, attended_BTX: Tensor) -> Tensor:
        """Return the branch's output ``[B, T, E]``; every position is by itself."""
        out_BTE: Tensor = self.output(attended_BTX)
        return out_BTE

    def is_watched(self) -> bool:
        """Whether somebody has hooks here that the three parts would pass by, or other attention in this place."""
        kinds = (kind for kind in (LSHSelfAttention, LocalSelfAttention) if isinstance(self.self_attention, kind))
        kind = next(kinds, None)
        return kind is None or is_watched(self.self_attention, kind) or is_watched(self, ReformerAttention)

    def probs(self, hidden_BTE: Tensor, call: Call, head_mask_H: Tensor | None, record: Record) -> Tensor:
        """Return the attention probabilities that the forward with this record used."""
        return self.self_attention.probs(self.layer_norm(hidden_BTE), call, head_mask_H, record)

    def decode(
        self, hidden_BTE: Tensor, step: Step, state: LSHState | LocalState, head_mask_H: Tensor | None = None
    ) -> Tensor:
        """Return the branch's output ``[B, T, E]`` for new tokens."""
        attended = self.self_attention.decode(self.layer_norm(hidden_BTE), step, state, head_mask_H)
        # Past the dropout, which does nothing in evaluation: in a step of decoding even that takes time.
        return self.output.dense(attended)
