"""The contestants of the speed benchmark: what is timed, at one size with one set of options.

Sizes everywhere: E 256, 4 heads of 64, chunks of 64, causal, fp32.

A layer is the projections of query-key and value (local: query, key and value) and the attention, without the output
projection and without residuals. ``sdpa`` has the two projections of the LSH layer and
``scaled_dot_product_attention`` with ``is_causal``, fed with the shared query-key as it is: keys are not normalised,
which only helps it. ``ours-exact`` is our LSH layer told to attend exactly. ``reformer-pytorch`` is its own
``LSHSelfAttention``, the output projection included, as it cannot be had without.

A model is 6 layers, local and LSH in turn, FF 1024, 320 tokens, axial positions; a step is forward with labels and
backward, without an optimizer. Ours is told not to return logits, as our recipes do. ``reformer-pytorch`` mixes its
kinds of attention by head, not by layer: two heads of each kind in all 6 layers, local windows of two times 128.

Letters: B batch, T positions, E hidden size, H heads, D head size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.reformer import ReformerConfig as TheirConfig
from transformers.models.reformer import modeling_reformer as theirs

from flash_reformer import ReformerConfig, ReformerModelWithLMHead, functional
from flash_reformer.layers.attention import LocalSelfAttention, LSHSelfAttention
from flash_reformer.layers.call import Call
from flash_reformer.ops.hashing import automatic_num_buckets

HIDDEN, HEADS, HEAD_SIZE, CHUNK, FEED_FORWARD, DEPTH, VOCAB = 256, 4, 64, 64, 1024, 6, 320
#: What ``dropout="default"`` is, for everybody: the defaults of the configuration.
DROPOUTS = {
    name: getattr(ReformerConfig, name)
    for name in (
        "hidden_dropout_prob",
        "local_attention_probs_dropout_prob",
        "lsh_attention_probs_dropout_prob",
    )
}


@dataclass(frozen=True)
class Entry:
    """One contestant at one size.

    Attributes:
        who: a key of :data:`CONTESTANTS`.
        kind: ``"lsh"`` or ``"local"`` for one layer, ``"model"`` for the language model.
        rounds: hash rounds; 0 where nothing is hashed.
        passes: ``"forward"``, in evaluation mode and without gradients, or ``"training"``: forward and backward.
        dropout: ``"none"`` or ``"default"``.
    """

    who: str
    kind: str
    length: int
    rounds: int
    passes: str
    batch: int = 1
    dropout: str = "none"

    @property
    def training(self) -> bool:
        """Whether there is a backward."""
        return self.passes == "training"

    @property
    def factors(self) -> tuple[int, ...]:
        """The bucket factors at this length."""
        return tuple(automatic_num_buckets(self.length, CHUNK, self.length))


@dataclass(frozen=True)
class Runner:
    """A contestant, built: ``run`` is timed, ``tidy`` follows it and is not."""

    module: nn.Module
    run: Callable[[], object]
    tidy: Callable[[], object]


def fields(entry: Entry, **changes: Any) -> dict[str, Any]:
    """Return the configuration of an entry; ours and that of transformers take the same."""
    power = entry.length.bit_length() - 1
    assert entry.length == 2**power, "axial positions are laid out for powers of two"
    made = {
        "attn_layers": ["local", "lsh"] * (DEPTH // 2),
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "attention_head_size": HEAD_SIZE,
        "feed_forward_size": FEED_FORWARD,
        "local_attn_chunk_length": CHUNK,
        "lsh_attn_chunk_length": CHUNK,
        "num_buckets": None,
        "num_hashes": max(entry.rounds, 1),
        "axial_pos_shape": (2 ** (power // 2), 2 ** (power - power // 2)),
        "axial_pos_embds_dim": (64, 192),
        "max_position_embeddings": entry.length,
        "vocab_size": VOCAB,
        "is_decoder": True,
        "use_cache": False,
    }
    dropouts = DROPOUTS if entry.dropout == "default" else dict.fromkeys(DROPOUTS, 0.0)
    return {**made, **dropouts, **changes}


def make_call(entry: Entry, *, backend: str = "auto", exact: bool = False, seed: int | None = None) -> Call:
    """Return what our layers are told in one forward; a fixed ``seed`` is that of rotations and dropouts."""
    fixed = None if seed is None else torch.tensor(seed)
    return Call(
        mask_BT=None,
        num_hashes=max(entry.rounds, 1),
        bucket_factors=entry.factors,
        rotation_seed=fixed,
        seeds_LX=functional.derive_seeds(torch.randint(2**63 - 1, ()) if fixed is None else fixed, 1, 2),
        exact=exact,
        backend=backend,
    )


class ExactLayer(nn.Module):
    """Exact causal attention with the projections of the LSH layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key = nn.Linear(HIDDEN, HEADS * HEAD_SIZE, bias=False)
        self.value = nn.Linear(HIDDEN, HEADS * HEAD_SIZE, bias=False)

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        """Return ``[B, T, H*D]``."""
        qk, v = (p(hidden_BTE).unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2) for p in (self.query_key, self.value))
        return F.scaled_dot_product_attention(qk, qk, v, is_causal=True).transpose(1, 2).flatten(2)


def our_layer(entry: Entry) -> nn.Module:
    """Return our layer of an entry's kind."""
    kind = LSHSelfAttention if entry.kind == "lsh" else LocalSelfAttention
    return kind(ReformerConfig(**fields(entry)), 0)


def their_layer(entry: Entry, **changes: Any) -> nn.Module:
    """Return that of transformers; ``changes`` are fields of its configuration."""
    kind = theirs.LSHSelfAttention if entry.kind == "lsh" else theirs.LocalSelfAttention
    return kind(TheirConfig(**fields(entry, **changes)), 0)


def inputs_of(entry: Entry, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return what a layer reads and the gradient that its output gets, both ``[B, T, E]``."""
    generator = torch.Generator().manual_seed(seed)
    hidden, grad = (torch.randn(entry.batch, entry.length, HIDDEN, generator=generator) for _ in range(2))
    return hidden, grad


def tokens_of(entry: Entry) -> Tensor:
    """Return the ids ``[B, T]`` that a model reads."""
    return torch.randint(VOCAB, (entry.batch, entry.length), generator=torch.Generator().manual_seed(entry.length))


def _layer_runner(entry: Entry, layer: nn.Module, attend: Callable[[Tensor], Tensor]) -> Runner:
    hidden, grad = inputs_of(entry)
    layer.train(entry.training)
    hidden.requires_grad_(entry.training)

    def forward() -> None:
        with torch.no_grad():
            attend(hidden)

    def tidy() -> None:
        hidden.grad = None
        layer.zero_grad(set_to_none=True)

    return Runner(layer, (lambda: attend(hidden).backward(grad)) if entry.training else forward, tidy)


def _model_runner(model: nn.Module, loss: Callable[[], Tensor]) -> Runner:
    model.train()
    return Runner(model, lambda: loss().backward(), lambda: model.zero_grad(set_to_none=True))


def _ours(entry: Entry, *, exact: bool = False) -> Runner:
    if entry.kind != "model":
        layer = our_layer(entry)
        return _layer_runner(entry, layer, lambda hidden: layer(hidden, make_call(entry, exact=exact))[0])
    model, ids = ReformerModelWithLMHead(ReformerConfig(**fields(entry))), tokens_of(entry)
    return _model_runner(model, lambda: model(ids, labels=ids, return_logits=False).loss)


def _transformers(entry: Entry) -> Runner:
    if entry.kind != "model":
        layer = their_layer(entry)
        return _layer_runner(entry, layer, lambda hidden: layer(hidden).hidden_states)
    model, ids = theirs.ReformerModelWithLMHead(TheirConfig(**fields(entry))), tokens_of(entry)
    return _model_runner(model, lambda: model(ids, labels=ids).loss)


def _sdpa(entry: Entry) -> Runner:
    layer = ExactLayer()
    return _layer_runner(entry, layer, layer)


def _reformer_pytorch(entry: Entry) -> Runner:
    import reformer_pytorch as other

    shared: dict[str, Any] = {"dim": HIDDEN, "heads": HEADS, "bucket_size": CHUNK, "n_hashes": entry.rounds}
    if entry.kind != "model":
        layer = other.LSHSelfAttention(**shared, causal=True)
        return _layer_runner(entry, layer, layer)
    config = fields(entry)
    model = other.ReformerLM(
        **shared,
        num_tokens=VOCAB,
        depth=DEPTH,
        max_seq_len=entry.length,
        dim_head=HEAD_SIZE,
        ff_mult=FEED_FORWARD // HIDDEN,
        ff_activation=nn.ReLU,
        ff_chunks=1,
        ff_dropout=config["hidden_dropout_prob"],
        lsh_dropout=config["lsh_attention_probs_dropout_prob"],
        n_local_attn_heads=HEADS // 2,
        axial_position_emb=True,
        axial_position_shape=config["axial_pos_shape"],
        causal=True,
    )
    ids = tokens_of(entry)
    return _model_runner(model, lambda: F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


CONTESTANTS: dict[str, Callable[[Entry], Runner]] = {
    "ours": _ours,
    "ours-exact": lambda entry: _ours(entry, exact=True),
    "transformers": _transformers,
    "sdpa": _sdpa,
    "reformer-pytorch": _reformer_pytorch,
}
#: Contestants that may be missing, and the module that tells.
OPTIONAL = {"reformer-pytorch": "reformer_pytorch"}


def build(entry: Entry) -> Runner:
    """Build a contestant from fixed seeds; ``ModuleNotFoundError`` where it is not installed."""
    module = OPTIONAL.get(entry.who)
    if module is not None and importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"{entry.who} is not installed")
    torch.manual_seed(0)
    return CONTESTANTS[entry.who](entry)
