"""Folders with a small random model and a byte tokenizer, as training leaves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import flash_reformer as ours

BYTES = {
    "attention_head_size": 8,
    "attn_layers": ["local", "lsh"],
    "axial_norm_std": 0.5,
    "axial_pos_embds_dim": [5, 11],
    "axial_pos_shape": [13, 24],
    "eos_token_id": 1,
    "feed_forward_size": 17,
    "hash_seed": 0,
    "hidden_size": 16,
    "initializer_range": 0.3,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_attention_heads": 2,
    "num_buckets": 8,
    "pad_token_id": 0,
}
LIMIT = 13 * 24


def make(name: str, tokenizer: Any = None, *, seed: int = 0, **changes: Any) -> Any:
    """A model that fits the tokenizer, in evaluation mode."""
    tokenizer = ours.ReformerByteTokenizer() if tokenizer is None else tokenizer
    decoder = {"is_decoder": name == "ReformerModelWithLMHead"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(ours, name)(
            ours.ReformerConfig(**{**BYTES, **decoder, "vocab_size": len(tokenizer), **changes})
        ).eval()


def save(folder: Path, name: str, tokenizer: Any = None, **changes: Any) -> str:
    tokenizer = ours.ReformerByteTokenizer() if tokenizer is None else tokenizer
    make(name, tokenizer, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
