"""The inverse of the converter, written from the published layout: our weights as trax would have nested them."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path
from typing import Any

import numpy as np

#: Fields that no array of a checkpoint tells.
UNTOLD = {
    "hidden_act": "relu",
    "lsh_attn_chunk_length": 4,
    "local_attn_chunk_length": 4,
    "num_buckets": 4,
    "num_hashes": 2,
    "hash_seed": 3,
}


def trax_weights(model: Any, *, nest: type = tuple, chunked: bool = False) -> Any:
    """The weights of one of our causal language models in trax's layout, as float32 numpy arrays.

    ``nest`` is what trax's containers are; ``chunked`` nests the feed-forward layers as trax does when it runs them in
    chunks.
    """
    config, state = model.config, {name: value.numpy() for name, value in model.state_dict().items()}
    heads, size = config.num_attention_heads, config.attention_head_size

    def pair(name: str) -> Any:
        return nest((state[f"{name}.weight"], state[f"{name}.bias"]))

    def dense(name: str) -> Any:
        return nest((np.ascontiguousarray(state[f"{name}.weight"].T), state[f"{name}.bias"]))

    def into_heads(name: str) -> np.ndarray:
        # Ours is [heads * size, E]; trax has [heads, E, size].
        rows = state[f"{name}.weight"]
        return np.stack([rows[head * size : (head + 1) * size].T for head in range(heads)])

    def out_of_heads(name: str) -> np.ndarray:
        columns = state[f"{name}.weight"]
        return np.stack([columns[:, head * size : (head + 1) * size].T for head in range(heads)])

    blocks: list[Any] = []
    for index, kind in enumerate(config.attn_layers):
        layer = f"reformer.encoder.layers.{index}"
        names = ("query_key", "value") if kind == "lsh" else ("query", "key", "value")
        attention = [into_heads(f"{layer}.attention.self_attention.{name}") for name in names]
        attention.append(out_of_heads(f"{layer}.attention.output.dense"))
        forward = nest(
            (
                pair(f"{layer}.feed_forward.layer_norm"),
                dense(f"{layer}.feed_forward.dense.dense"),
                nest(),
                nest(),
                dense(f"{layer}.feed_forward.output.dense"),
                nest(),
            )
        )
        if chunked:
            forward = nest((nest(), nest(), forward, nest()))
        blocks += [
            nest((nest((pair(f"{layer}.attention.layer_norm"),)), nest(attention))),
            nest(),
            nest((nest((nest(), nest((nest(), nest(), forward)))), nest())),
            nest(),
        ]
    positions = "reformer.embeddings.position_embeddings"
    if config.axial_pos_embds:
        tables: Any = nest([state[f"{positions}.weights.{axis}"][None] for axis in range(len(config.axial_pos_shape))])
    else:
        tables = state[f"{positions}.embedding.weight"][None]
    logits = nest((np.ascontiguousarray(state["lm_head.decoder.weight"].T), state["lm_head.bias"]))
    return nest(
        (
            nest(),
            state["reformer.embeddings.word_embeddings.weight"],
            nest(),
            tables,
            nest(),
            nest(blocks),
            nest(),
            pair("reformer.encoder.layer_norm"),
            nest(),
            logits,
            nest(),
        )
    )


def flat(tree: Any) -> list[Any]:
    """The arrays of a tree in order."""
    return [tree] if isinstance(tree, np.ndarray) else [leaf for child in tree for leaf in flat(child)]


def around(weights: Any) -> dict[str, Any]:
    """What else stands in a training checkpoint."""
    history = {"version": 1, "values": {"train": {"metrics/loss": [(1, 5.5), (2, np.float32(4.25))]}}}
    slots = [[np.zeros((2, 3), np.float32), np.int64(7)], None, True]
    return {"step": np.int64(500), "weights": weights, "opt_state": slots, "history": history, "loss": 1e-3}


def write(path: Path, value: Any, protocol: int = 4) -> Path:
    data = pickle.dumps(value, protocol=protocol)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path
