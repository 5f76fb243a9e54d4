"""Sizes of published models that several benchmarks take."""

from __future__ import annotations

from typing import Any

#: Six layers, local and LSH, as the published model of one novel.
NOVEL: dict[str, Any] = {
    "attn_layers": ["local", "lsh"] * 3,
    "hidden_size": 256,
    "num_attention_heads": 2,
    "attention_head_size": 64,
    "feed_forward_size": 512,
    "local_attn_chunk_length": 64,
    "lsh_attn_chunk_length": 64,
    "num_buckets": [64, 128],
    "num_hashes": 1,
    "axial_pos_shape": (512, 1024),
    "axial_pos_embds_dim": (64, 192),
    "max_position_embeddings": 524_288,
    "vocab_size": 320,
    "is_decoder": True,
}
