"""What trax wrote for its ReformerLM, read array by array.

A training checkpoint is a (gzipped) pickle of a dict. Under ``"weights"`` it holds nested tuples or lists, one entry
per layer of the model, empty for layers without weights, or under ``"flat_weights"`` the same arrays in a flat list::

    ( ),                                            shift right
    embedding [V, E],
    ( ),                                            dropout
    (table [1, n_1, 1, d_1], table [1, 1, n_2, d_2], ...)  or, without axes, one table [1, positions, E]
    ( ),                                            two streams
    (   four entries for each layer of ours:
        (((scale [E], bias [E]),), attention),      half residual: layer norm; attention is
                                                      LSH:   w_qk [H, E, D], w_v, w_o [H, D, E]
                                                      local: w_q [H, E, D], w_k, w_v, w_o [H, D, E]
        ( ),                                        swap
        (.. (scale [E], bias [E]), (W [E, F], b [F]), ( ), ( ), (W [F, E], b [E]), ..),     half residual: feed-forward
        ( ),                                        swap
    ),
    ( ),                                            join the streams
    (scale [2E], bias [2E]),                        layer norm
    ( ),                                            dropout
    (W [2E, V], b [V])                              logits

Versions of trax differ in how deep they nest, for chunked feed-forward layers above all, not in the order. So the
arrays are taken in order, each with its place in the file, and every shape is checked against those before it.
Letters: V vocabulary, E hidden size, H heads, D head size, F feed-forward size, n and d sizes of the position tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_reformer.models.safe_pickle import Array

_DEPTH = 64
_FLOATS = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Leaf:
    """One array of weights and where in the file it stands."""

    place: str
    tensor: Tensor


@dataclass
class TraxWeights:
    """What a checkpoint holds: the sizes that follow from it, as fields of a config, and a state dict of ours."""

    sizes: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def read_weights(checkpoint: Any) -> TraxWeights:
    """Map the unpickled checkpoint to our names.

    Raises:
        ValueError: for another layout, naming the place, what should stand there and what does.
    """
    if not isinstance(checkpoint, dict):
        raise ValueError(f"the checkpoint must be a dict with 'weights'; it is a {type(checkpoint).__name__}")
    name = "weights" if "weights" in checkpoint else "flat_weights"
    if name not in checkpoint:
        raise ValueError(f"the checkpoint must have an entry 'weights' or 'flat_weights'; it has {_keys(checkpoint)}")
    if isinstance(checkpoint[name], int):
        raise ValueError(f"the checkpoint's {name!r} says that its arrays are in a file of their own, .weights.npy.gz")
    return _Reader(list(_leaves(checkpoint[name], name))).read()


def _keys(checkpoint: dict[Any, Any]) -> str:
    shown = [repr(key)[:40] for key in list(checkpoint)[:8]]
    return ", ".join(shown) + (", ..." if len(checkpoint) > len(shown) else "") if shown else "none"


def _leaves(tree: Any, name: str) -> Iterator[Leaf]:
    """Yield the arrays in order. Iterative and bounded: a file may nest without end, or in itself."""
    pending: list[tuple[Any, str, int]] = [(tree, name, 0)]
    visited = 0
    while pending:
        node, place, depth = pending.pop()
        visited += 1
        if depth > _DEPTH or visited > 10**5:
            raise ValueError(f"{place}: no weights of a model nest like this")
        if isinstance(node, Array):
            if node.tensor.dtype not in _FLOATS:
                raise ValueError(f"{place} must hold floating-point numbers; it holds {node.tensor.dtype}")
            yield Leaf(place, node.tensor)
        elif isinstance(node, (tuple, list)):
            pending += [(child, f"{place}[{index}]", depth + 1) for index, child in reversed([*enumerate(node)])]
        elif not (node is None or node == {}):
            raise ValueError(f"{place} must be an array or a tuple of weights; it is a {type(node).__name__}")


class _Reader:
    """Takes the arrays in order and knows what must come next."""

    def __init__(self, leaves: list[Leaf]) -> None:
        self._leaves = leaves
        self._next = 0
        self._found = TraxWeights()

    def _peek(self, ahead: int = 0) -> Leaf | None:
        index = self._next + ahead
        return self._leaves[index] if index < len(self._leaves) else None

    def _take(self, what: str, *shape: int | str) -> Tensor:
        """Take the next array; a size given by a letter is free."""
        leaf = self._peek()
        wanted = "[" + ", ".join(map(str, shape)) + "]"
        if leaf is None:
            after = self._leaves[-1].place if self._leaves else "the beginning"
            raise ValueError(f"after {after} must come {what} {wanted}; there are no more arrays")
        sizes = leaf.tensor.shape
        fits = len(sizes) == len(shape) and all(
            isinstance(want, str) or size == want for size, want in zip(sizes, shape, strict=True)
        )
        if not fits or leaf.tensor.numel() == 0:
            raise ValueError(f"{leaf.place} must be {what} {wanted}; it has shape {list(sizes)}")
        self._next += 1
        return leaf.tensor

    def _put(self, name: str, value: Tensor) -> None:
        self._found.state[name] = value.float().contiguous()

    def read(self) -> TraxWeights:
        sizes = self._found.sizes
        embedding = self._take("the word embedding", "V", "E")
        V, E = embedding.shape
        sizes |= {"vocab_size": V, "hidden_size": E}
        self._put("reformer.embeddings.word_embeddings.weight", embedding)
        self._read_positions(E)
        kinds: list[str] = []
        while (leaf := self._peek()) is not None and tuple(leaf.tensor.shape) != (2 * E,):
            kinds.append(self._read_layer(len(kinds), E))
        if not kinds:
            self._take("the scale of layer 0's layer norm", E)
        sizes["attn_layers"] = kinds
        self._norm("reformer.encoder.layer_norm", "the last layer norm", 2 * E)
        self._dense("lm_head.decoder", "the logits' weight", 2 * E, V, bias="lm_head.bias")
        if (leaf := self._peek()) is not None:
            raise ValueError(f"{leaf.place} stands behind the logits, where a ReformerLM has no more weights")
        return self._found

    def _read_positions(self, E: int) -> None:
        sizes, prefix = self._found.sizes, "reformer.embeddings.position_embeddings"
        leaf = self._peek()
        axes = leaf.tensor.dim() - 2 if leaf is not None else 0
        sizes["axial_pos_embds"] = axes != 1
        if axes == 1:
            (table,) = self._take("the position table", 1, "positions", E)
            sizes["max_position_embeddings"] = table.shape[0]
            self._put(f"{prefix}.embedding.weight", table)
            return
        shape: list[int] = []
        dims: list[int] = []
        for axis in range(max(axes, 2)):
            wanted: list[int | str] = [1] * (max(axes, 2) + 1)
            wanted[axis + 1] = f"n_{axis + 1}"
            (table,) = self._take(f"the position table of axis {axis}", *wanted, f"d_{axis + 1}")
            shape.append(table.shape[axis])
            dims.append(table.shape[-1])
            self._put(f"{prefix}.weights.{axis}", table)
        if sum(dims) != E:
            raise ValueError(f"the position tables have {dims} features, which must sum to the word embedding's {E}")
        sizes |= {"axial_pos_shape": shape, "axial_pos_embds_dim": dims}

    def _read_layer(self, index: int, E: int) -> str:
        """Read one layer of ours, that is a half residual of attention and one of feed-forward; return its kind."""
        sizes, of = self._found.sizes, f"of layer {index}"
        name = f"reformer.encoder.layers.{index}"
        self._norm(f"{name}.attention.layer_norm", f"the attention's layer norm {of}", E)
        matrices = 0
        while (leaf := self._peek(matrices)) is not None and leaf.tensor.dim() == 3 and matrices < 4:
            matrices += 1
        kind = "local" if matrices == 4 else "lsh"
        inner = ("query", "key", "value") if kind == "local" else ("query_key", "value")
        H, D = sizes.get("num_attention_heads", "H"), sizes.get("attention_head_size", "D")
        for projection in inner:
            weight = self._take(f"the {projection} weight of the {kind} attention {of}", H, E, D)
            H, _, D = weight.shape
            # Heads are rows of ours: [H, E, D] becomes [H * D, E].
            self._put(f"{name}.attention.self_attention.{projection}.weight", weight.transpose(1, 2).reshape(H * D, E))
        output = self._take(f"the output weight of the {kind} attention {of}", H, D, E)
        self._put(f"{name}.attention.output.dense.weight", output.reshape(-1, E).T)
        sizes |= {"num_attention_heads": H, "attention_head_size": D}
        self._norm(f"{name}.feed_forward.layer_norm", f"the feed-forward's layer norm {of}", E)
        F = sizes.get("feed_forward_size", "F")
        wide = f"{name}.feed_forward.dense.dense"
        sizes["feed_forward_size"] = F = self._dense(wide, f"the first feed-forward weight {of}", E, F)
        self._dense(f"{name}.feed_forward.output.dense", f"the second feed-forward weight {of}", F, E)
        return kind

    def _norm(self, name: str, what: str, size: int) -> None:
        self._put(f"{name}.weight", self._take(f"the scale of {what}", size))
        self._put(f"{name}.bias", self._take(f"the bias of {what}", size))

    def _dense(self, name: str, what: str, inputs: int, outputs: int | str, bias: str | None = None) -> int:
        weight = self._take(what, inputs, outputs)
        self._put(f"{name}.weight", weight.T)
        self._put(bias or f"{name}.bias", self._take(f"the bias beside {what}", weight.shape[1]))
        return weight.shape[1]
