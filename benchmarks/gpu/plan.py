"""What is run at which sizes: the measurement and its rehearsal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.shapes import NOVEL

K = 1024
#: Stages in order, and their shares of the time.
SHARES = {
    "parity": 100,
    "copy": 5,
    "attention": 140,
    "models": 50,
    "layers": 40,
    "parts": 25,
    "variants": 50,
    "decode": 30,
    "flex": 50,
    "sorting": 10,
    "longest": 45,
}

#: Twelve layers, as the published model of bytes.
BYTES: dict[str, Any] = {
    "attn_layers": ["local", "local", "lsh", "local"] * 3,
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "attention_head_size": 128,
    "feed_forward_size": 4096,
    "local_attn_chunk_length": 128,
    "lsh_attn_chunk_length": 256,
    "num_buckets": 512,
    "num_hashes": 4,
    "axial_pos_shape": (256, 256),
    "axial_pos_embds_dim": (256, 768),
    "max_position_embeddings": 65_536,
    "vocab_size": 258,
    "is_decoder": True,
}


@dataclass(frozen=True)
class Plan:
    """Sizes, and how long each thing is timed.

    Attributes:
        lengths: of the attention race, the most important first.
        long, far: the lengths of the requirements on attention.
        steps: of training, that are timed after a first one.
        lane_s: seconds that one measurement takes, about; it is cut into ``turns``, with ``most`` calls in each.
        slow: seconds; a peer that would take longer per call is predicted instead.
        caps: names and GB (1e9) of the memory in which the longest sequence is sought; None is the whole card.
    """

    name: str
    heads: int = 8
    chunk: int = 64
    head_sizes: tuple[int, ...] = (64, 128)
    rounds: tuple[int, ...] = (1, 2, 4, 8)
    lengths: tuple[int, ...] = (64 * K, 8 * K, 4 * K, 2 * K, 16 * K, 1024 * K, 256 * K, 32 * K)
    long: int = 64 * K
    far: int = 1024 * K
    few: int = 1
    many: int = 4
    variant_chunks: tuple[int, ...] = (128, 256)
    part_lengths: tuple[int, ...] = (64 * K, 1024 * K)
    graph_lengths: tuple[int, ...] = (4 * K, 16 * K, 64 * K)
    layer_lengths: tuple[int, ...] = (64 * K, 16 * K, 4 * K)
    flex_lengths: tuple[int, ...] = (64 * K, 16 * K)
    lane_s: float = 0.3
    turns: int = 3
    most: int = 20
    slow: float = 1.5
    steps: int = 5
    novel: dict[str, Any] = field(default_factory=lambda: NOVEL)
    novel_length: int = 512 * K
    bytes_model: dict[str, Any] = field(default_factory=lambda: BYTES)
    bytes_length: int = 64 * K
    #: Positions as rows and columns of the axial table.
    million: tuple[int, int] = (K, K)
    feed_forward_chunk: int = 64 * K
    novel_gb: float = 8.0
    million_gb: float = 16.0
    caps: tuple[tuple[str, float | None], ...] = (("16 GB", 16.0), ("80 GB", 80.0), ("card", None))
    longest_from: int = 512 * K
    contexts: tuple[int, ...] = (K, 16 * K, 64 * K)
    batches: tuple[int, ...] = (1, 8)
    decode_s: float = 1.5
    decode_steps: int = 512

    @property
    def measures(self) -> bool:
        """Whether times mean anything."""
        return self.name == "full"


_TOY: dict[str, Any] = {"attn_layers": ["local", "lsh"], "hidden_size": 32, "feed_forward_size": 32, "vocab_size": 20}
_TOY |= {"num_attention_heads": 2, "attention_head_size": 16, "axial_pos_embds_dim": (8, 24)}
_TOY |= {"local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16, "max_position_embeddings": 64}

FULL = Plan("full")
REHEARSAL = Plan(
    "rehearsal",
    heads=2,
    chunk=16,
    head_sizes=(16, 32),
    rounds=(1, 2),
    lengths=(32, 64),
    long=32,
    far=64,
    few=1,
    many=2,
    variant_chunks=(32,),
    part_lengths=(32,),
    graph_lengths=(32,),
    layer_lengths=(32,),
    flex_lengths=(256,),
    lane_s=0.0,
    turns=1,
    most=1,
    steps=1,
    novel={**NOVEL, **_TOY, "num_buckets": [2, 4], "axial_pos_shape": (8, 8)},
    novel_length=64,
    bytes_model={**BYTES, **_TOY, "num_buckets": 4, "num_hashes": 2, "axial_pos_shape": (8, 8)},
    bytes_length=64,
    million=(8, 16),
    feed_forward_chunk=32,
    caps=(("16 GB", 1.0), ("80 GB", 2.0), ("card", None)),
    longest_from=64,
    million_gb=16.0,
    contexts=(32,),
    batches=(1, 2),
    decode_s=0.0,
    decode_steps=2,
)
