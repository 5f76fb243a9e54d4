"""Sizes of models: their flags, the defaults of each task, and named starting points."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Model sizes by the names of their flags: flag -> (field of ReformerConfig, kind of value, help).
MODEL_OPTIONS: dict[str, tuple[str, str, str]] = {
    "layers": ("attn_layers", "names", "Kinds of the layers in order, such as local,lsh,local,lsh."),
    "hidden_size": ("hidden_size", "int", "Width of each residual stream."),
    "num_heads": ("num_attention_heads", "int", "Attention heads per layer."),
    "head_size": ("attention_head_size", "int", "Width of a head."),
    "feed_forward_size": ("feed_forward_size", "int", "Width inside the feed-forward layers."),
    "hidden_act": ("hidden_act", "str", "Activation of the feed-forward layers."),
    "local_chunk_length": ("local_attn_chunk_length", "int", "Chunk length of local attention."),
    "local_chunks_before": ("local_num_chunks_before", "int", "Chunks before its own that a local chunk sees."),
    "local_chunks_after": ("local_num_chunks_after", "int", "Chunks after its own that a local chunk sees."),
    "lsh_chunk_length": ("lsh_attn_chunk_length", "int", "Chunk length of LSH attention."),
    "lsh_chunks_before": ("lsh_num_chunks_before", "int", "Chunks before its own that a sorted chunk sees."),
    "lsh_chunks_after": ("lsh_num_chunks_after", "int", "Chunks after its own that a sorted chunk sees."),
    "num_hashes": ("num_hashes", "int", "Rounds of hashing."),
    "num_buckets": ("num_buckets", "buckets", "Buckets, one even number or factors such as 64,128; else automatic."),
    "hash_seed": ("hash_seed", "int", "Fixes the rotations of the hashing; else they are drawn anew."),
    "axial_pos_shape": ("axial_pos_shape", "integers", "Factors of the position table; else made from --seq-len."),
    "axial_pos_dims": ("axial_pos_embds_dim", "integers", "Widths of its factors; else a quarter and the rest."),
    "axial_norm_std": ("axial_norm_std", "float", "Spread of its initial values."),
    "initializer_range": ("initializer_range", "float", "Spread of the other initial weights."),
    "hidden_dropout": ("hidden_dropout_prob", "float", "Dropout on embeddings and layer outputs."),
    "local_attention_dropout": ("local_attention_probs_dropout_prob", "float", "Dropout on local attention."),
    "lsh_attention_dropout": ("lsh_attention_probs_dropout_prob", "float", "Dropout on LSH attention."),
    "classifier_dropout": ("classifier_dropout", "float", "Dropout in the classification head."),
    "classifier_pooling": ("classifier_pooling", "str", "What it reads: first, last, mean or max of the positions."),
}


@dataclass(frozen=True)
class Preset:
    """A named starting point for a task; whatever is asked for explicitly comes on top."""

    task: str
    training: Mapping[str, Any]
    model: Mapping[str, Any]


PRESETS: dict[str, Preset] = {
    # Small, so that three minutes on two CPU cores hold many steps: of the sizes tried, larger ones did not learn
    # clearly more per step.
    "demo": Preset(
        task="clm",
        training={"standard_library": True, "seq_len": 4096, "max_minutes": 3.2, "learning_rate": 5e-3},
        model={
            "attn_layers": ["local", "lsh"],
            "hidden_size": 128,
            "num_attention_heads": 4,
            "attention_head_size": 32,
            "feed_forward_size": 256,
            "local_attn_chunk_length": 4,
            "lsh_attn_chunk_length": 32,
            "initializer_range": 0.07,
            "axial_norm_std": 0.07,
        },
    )
}


def parse_model_option(flag: str, value: Any) -> Any:
    """Turn the command-line text of a model flag into the value of its config field.

    >>> parse_model_option("layers", "local,lsh")
    ['local', 'lsh']
    >>> parse_model_option("num_buckets", "64,128")
    [64, 128]
    """
    kind = MODEL_OPTIONS[flag][1]
    if kind == "names":
        return [part.strip() for part in value.split(",") if part.strip()]
    if kind in ("integers", "buckets"):
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            raise ValueError(f"{flag} must be whole numbers separated by commas, got {value!r}") from None
        return numbers[0] if kind == "buckets" and len(numbers) == 1 else numbers
    return value


def check_effect(fields: Mapping[str, Any], layers: Sequence[str]) -> None:
    """Refuse sizes of a kind of layer that the model has none of."""
    hashing = ("lsh_", "num_hashes", "num_buckets", "hash_seed")
    for kind, starts in (("lsh", hashing), ("local", ("local_",))):
        idle = [name for name in fields if name.startswith(starts) and fields[name] is not None]
        if kind not in layers and idle:
            raise ValueError(f"{', '.join(idle)} would have no effect: attn_layers has no {kind!r} layer")


def axial_shape(seq_len: int) -> list[int]:
    """Factor a length into two axes of about the same size, the product being the length or a little more.

    >>> axial_shape(4096), axial_shape(5000)
    ([64, 64], [79, 64])
    """
    columns = 2 ** max(0, round(math.log2(math.sqrt(seq_len))))
    return [math.ceil(seq_len / columns), columns]
