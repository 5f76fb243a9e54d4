"""The configuration: every field of ``transformers``' ReformerConfig, with its default, plus our own."""

from __future__ import annotations

import copy
import difflib
import math
import os
import warnings
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

_KINDS = ("lsh", "local")
POOLINGS = ("first", "last", "mean", "max")
#: Fields of configurations written long ago. They are read without complaint and mean nothing.
_RETIRED = {
    "attention_probs_dropout_prob",
    "intermediate_size",
    "num_attention_chunks",
    "num_chunks_after",
    "num_chunks_before",
    "output_past",
    "sinusoidal_pos_embds",
}

#: What a checkpoint says about its position tables.
POSITION_FIELDS = ("axial_pos_embds", "axial_pos_embds_dim", "axial_pos_shape", "max_position_embeddings")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _int_from(low: int) -> tuple[str, Callable[[Any], bool]]:
    return f"an integer >= {low}", lambda value: _is_int(value) and value >= low


def _optional(rule: tuple[str, Callable[[Any], bool]]) -> tuple[str, Callable[[Any], bool]]:
    text, holds = rule
    return f"{text}, or None", lambda value: value is None or holds(value)


def _number_in(low: float, high: float) -> tuple[str, Callable[[Any], bool]]:
    text = f"a number in [{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number >= {low:g}"
    return (
        text,
        lambda value: (_is_int(value) or isinstance(value, float)) and low <= value <= high and math.isfinite(value),
    )


def _is_bucket_count(value: Any) -> bool:
    if _is_int(value):
        return value >= 2 and value % 2 == 0
    return (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_int(v) and _is_bucket_count(v) for v in value)
    )


def _sizes(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_int(v) and v >= 1 for v in value)


def _is_answer_lengths(value: Any) -> bool:
    names = {"doc_stride", "max_answer_len", "max_question_len"}
    return isinstance(value, dict) and set(value) <= names and all(_is_int(v) and v >= 0 for v in value.values())


_BOOL = ("True or False", lambda value: isinstance(value, bool))
_PROBABILITY = _number_in(0.0, 1.0)
_COUNT = _int_from(1)
_MAYBE_NONE = _int_from(0)
#: What each field may hold, by itself: a description and a test.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "answer_lengths": (
        "None, or a dict with doc_stride, max_answer_len and max_question_len as integers >= 0",
        lambda value: value is None or _is_answer_lengths(value),
    ),
    "attention_head_size": _COUNT,
    "attn_layers": (
        f"a non-empty list of {' and '.join(map(repr, _KINDS))}",
        lambda value: isinstance(value, (list, tuple)) and len(value) > 0 and all(kind in _KINDS for kind in value),
    ),
    "axial_norm_std": _number_in(0.0, math.inf),
    "axial_pos_embds": _BOOL,
    "axial_pos_shape": ("a non-empty list of integers >= 1", _sizes),
    "axial_pos_embds_dim": ("a non-empty list of integers >= 1", _sizes),
    "bos_token_id": ("an integer, or None", lambda value: value is None or _is_int(value)),
    "chunk_size_feed_forward": _int_from(0),
    "chunk_size_lm_head": _int_from(0),
    "classifier_dropout": _optional(_PROBABILITY),
    "classifier_pooling": (
        f"None or one of {', '.join(map(repr, POOLINGS))}",
        lambda value: value is None or value in POOLINGS,
    ),
    "eos_token_id": (
        "an integer, a non-empty list of them, or None",
        lambda v: v is None or _is_int(v) or (isinstance(v, list) and len(v) > 0 and all(map(_is_int, v))),
    ),
    "feed_forward_size": _COUNT,
    "full_attention_below": (
        "an integer >= 0, or 'auto'",
        lambda value: (_is_int(value) and value >= 0) or (isinstance(value, str) and value == "auto"),
    ),
    "hash_seed": (
        "an integer in [-2**63, 2**63), or None",
        lambda v: v is None or (_is_int(v) and -(2**63) <= v < 2**63),
    ),
    "hidden_act": (
        "the name of an activation in transformers.activations.ACT2FN",
        lambda value: isinstance(value, str) and value in ACT2FN,
    ),
    "hidden_dropout_prob": _PROBABILITY,
    "hidden_size": _COUNT,
    "initializer_range": _number_in(0.0, math.inf),
    "is_decoder": _BOOL,
    "layer_norm_eps": _number_in(0.0, math.inf),
    "local_num_chunks_before": _optional(_MAYBE_NONE),
    "local_num_chunks_after": _optional(_MAYBE_NONE),
    "local_attention_probs_dropout_prob": _optional(_PROBABILITY),
    "local_attn_chunk_length": _optional(_COUNT),
    "lsh_num_chunks_before": _optional(_MAYBE_NONE),
    "lsh_num_chunks_after": _optional(_MAYBE_NONE),
    "lsh_attention_probs_dropout_prob": _optional(_PROBABILITY),
    "lsh_attn_chunk_length": _optional(_COUNT),
    "lsh_allow_duplicate_attention": _BOOL,
    "lsh_attend_across_buckets": _BOOL,
    "max_position_embeddings": _COUNT,
    "num_attention_heads": _COUNT,
    "num_buckets": (
        "None, an even integer >= 2, or a list of even integers >= 2",
        lambda v: v is None or _is_bucket_count(v),
    ),
    "num_buckets_automatic": _BOOL,
    "num_hashes": _COUNT,
    "pad_token_id": _optional(_int_from(0)),
    "residual_in_fp32": _BOOL,
    "reversible": _BOOL,
    "tie_word_embeddings": (
        "False: word embeddings have hidden_size columns, the output layer 2 * hidden_size",
        lambda value: value is False,
    ),
    "trained_num_buckets": (
        "None, or a list of even integers >= 2",
        lambda v: v is None or (isinstance(v, (list, tuple)) and _is_bucket_count(v)),
    ),
    "use_cache": _BOOL,
    "vocab_size": _COUNT,
    "wrap_around": _BOOL,
}


class ReformerConfig(PreTrainedConfig):
    """Everything that shapes a Reformer. Configurations of ``transformers``' Reformer load, and the reverse.

    Args:
        attention_head_size: size D of each head; heads * D need not be ``hidden_size``.
        attn_layers: ``"lsh"`` or ``"local"`` per layer, in order; their number is the depth.
        axial_norm_std: standard deviation at which axial position tables start.
        axial_pos_embds: factorised position embeddings; otherwise one vector for each of ``max_position_embeddings``.
        axial_pos_shape: the grid of positions. Any length up to its product trains and evaluates.
        axial_pos_embds_dim: features that each axis contributes; they sum to ``hidden_size``.
        chunk_size_feed_forward: positions at a time through the feed-forward layers; 0 for all.
        chunk_size_lm_head: positions at a time through the output layer; 0 for all.
        classifier_dropout: dropout of the classification head; None takes ``hidden_dropout_prob``.
        classifier_pooling: what the classification head reads: the ``"first"`` token, the ``"last"`` unmasked one, or
            the ``"mean"`` or ``"max"`` over all unmasked ones. None is ``"first"``, or ``"last"`` in a causal model,
            as in published checkpoints; transformers' Reformer knows nothing else.
        feed_forward_size: inner width of the feed-forward layers.
        hash_seed: seed of the hash rotations. None (recommended) draws fresh ones in every forward.
        hidden_act: name of the feed-forward activation.
        hidden_dropout_prob: dropout of embeddings, branches and the final hidden state.
        hidden_size: width E of each of the two residual streams. The model's output is ``2 * hidden_size`` wide.
        initializer_range: standard deviation at which linear and embedding weights start.
        is_decoder: causal attention.
        layer_norm_eps: epsilon of the layer norms.
        local_attn_chunk_length, lsh_attn_chunk_length: chunk lengths; None attends exactly, without chunks.
        local_num_chunks_before, local_num_chunks_after, lsh_num_chunks_before, lsh_num_chunks_after: neighbour
            chunks that a chunk sees.
        local_attention_probs_dropout_prob, lsh_attention_probs_dropout_prob: dropout of attention probabilities.
        max_position_embeddings: positions of a learned table; with axial tables it only enters the automatic
            bucket count.
        num_attention_heads: number H of heads.
        num_buckets: buckets per hash round: an even number, a list of even factors, or None to derive it from
            each input's length.
        num_hashes: hash rounds R. More rounds find more of what exact attention would, at proportional cost; a
            trained model may be evaluated with more.
        vocab_size: number of token ids.
        tie_word_embeddings: must be False; the two matrices differ in shape.
        use_cache: return a decoding cache from evaluation forwards of causal models.
        bos_token_id, eos_token_id, pad_token_id: special ids.
        reversible: rebuild activations in the backward instead of storing them.
        residual_in_fp32: keep the residual streams in fp32 in half-precision models.
        wrap_around: let windows wrap around the ring of chunks, as the published models do.
        lsh_attend_across_buckets: let a query see everything in its window, not its own bucket only.
        lsh_allow_duplicate_attention: count a key once per appearance over the rounds, not once.
        full_attention_below: attend exactly in every layer up to this many tokens; ``"auto"`` up to where exact
            attention is faster, by a fixed table per backend and rounds (``functional.FULL_ATTENTION_BELOW``).
        answer_lengths: what the question answering pipeline takes for ``doc_stride``, ``max_answer_len`` and
            ``max_question_len`` where it is not told otherwise; training writes down its own.
        num_buckets_automatic: set on save: ``num_buckets`` was derived, so training goes on deriving it.
        trained_num_buckets: the bucket factors of the longest sequence trained on, while ``num_buckets`` is
            automatic; saving writes them as ``num_buckets``.

    Raises:
        ValueError, TypeError: a field holds what it may not, by itself. Contradictions between fields are found
            when a model is built.
    """

    model_type = "reformer"
    keys_to_ignore_at_inference = ["past_buckets_states"]
    attribute_map = {}
    #: The checkpoint's ``POSITION_FIELDS`` where ``from_pretrained`` was given other sizes. Never saved.
    checkpoint_positions = None  # type: dict[str, Any] | None

    attention_head_size: int = 64
    attn_layers: list[str] | tuple[str, ...] = ("local", "lsh", "local", "lsh", "local", "lsh")
    axial_norm_std: float = 1.0
    axial_pos_embds: bool = True
    axial_pos_shape: list[int] | tuple[int, ...] = (64, 64)
    axial_pos_embds_dim: list[int] | tuple[int, ...] = (64, 192)
    chunk_size_lm_head: int = 0
    eos_token_id: int | list[int] | None = 2
    feed_forward_size: int = 512
    hash_seed: int | None = None
    hidden_act: str = "relu"
    hidden_dropout_prob: float | int = 0.05
    hidden_size: int = 256
    initializer_range: float = 0.02
    is_decoder: bool = False
    layer_norm_eps: float = 1e-12
    local_num_chunks_before: int | None = 1
    local_num_chunks_after: int | None = 0
    local_attention_probs_dropout_prob: float | None = 0.05
    local_attn_chunk_length: int | None = 64
    lsh_attn_chunk_length: int | None = 64
    lsh_attention_probs_dropout_prob: float | None = 0.0
    lsh_num_chunks_before: int | None = 1
    lsh_num_chunks_after: int | None = 0
    max_position_embeddings: int = 4096
    num_attention_heads: int = 12
    num_buckets: int | list[int] | tuple[int, ...] | None = None
    num_hashes: int = 1
    vocab_size: int = 320
    tie_word_embeddings: bool = False
    use_cache: bool = True
    classifier_dropout: float | int | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = 0
    # Ours. Defaults leave every value as above.
    reversible: bool = True
    residual_in_fp32: bool = True
    wrap_around: bool = True
    lsh_attend_across_buckets: bool = True
    lsh_allow_duplicate_attention: bool = True
    full_attention_below: int | str = 0
    classifier_pooling: str | None = None
    answer_lengths: dict[str, int] | None = None
    num_buckets_automatic: bool = False
    trained_num_buckets: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.check_fields()
        self.axial_pos_shape = tuple(self.axial_pos_shape)
        self.axial_pos_embds_dim = tuple(self.axial_pos_embds_dim)
        for name in kwargs.keys() - _RETIRED:
            close = difflib.get_close_matches(name, _RULES, n=1, cutoff=0.85)
            if close:
                hint = f"ReformerConfig has no field {name!r}, so it has no effect. Did you mean {close[0]!r}?"
                warnings.warn(hint, stacklevel=4)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "num_hidden_layers" and value != len(self.attn_layers):
            raise ValueError(
                f"num_hidden_layers must be the length of attn_layers, {len(self.attn_layers)}; got {value!r}. "
                "Set attn_layers to change the depth"
            )
        try:
            super().__setattr__(name, value)
        except Exception as error:
            # The base class checks its own fields as they are set; its exception wraps the one that users expect.
            if isinstance(error.__cause__, (TypeError, ValueError)):
                raise error.__cause__ from None
            raise
        if name == "attn_layers" and isinstance(value, (list, tuple)):
            super().__setattr__("num_hidden_layers", len(value))
        elif name == "num_buckets" and "trained_num_buckets" in self.__dict__:
            # Set by somebody, not by the constructor: whatever was automatic before is so no longer.
            super().__setattr__("num_buckets_automatic", False)
            super().__setattr__("trained_num_buckets", None)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a checkpoint's, with ``kwargs`` on top.

        Sizes of position tables among them are a wish to resize: the checkpoint's own are remembered, for whichever
        model is loaded with this configuration.
        """
        resizes = any(kwargs.get(name) is not None for name in ("axial_pos_shape", "max_position_embeddings"))
        stored = {name: config_dict.get(name, getattr(cls, name)) for name in POSITION_FIELDS}
        made = super().from_dict(config_dict, **kwargs)
        config: Any = made[0] if isinstance(made, tuple) else made
        if resizes:
            config.checkpoint_positions = stored
        return made

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        d.pop("checkpoint_positions", None)
        super()._remove_keys_not_serialized(d)

    def check_fields(self) -> None:
        """Raise ``ValueError`` for the first field that holds what it may not."""
        for name, (allowed, holds) in _RULES.items():
            value = getattr(self, name)
            if not holds(value):
                raise ValueError(f"{name} must be {allowed}; got {value!r}")

    def record_trained_buckets(self, factors: tuple[int, ...]) -> None:
        """Note the automatic bucket count of a training forward; the largest, that is the longest input's, stays."""
        recorded = self.trained_num_buckets
        if recorded is None and self.num_buckets_automatic and self.num_buckets is not None:
            # A resumed training: the checkpoint holds the count of the longest input so far.
            recorded = [self.num_buckets] if isinstance(self.num_buckets, int) else list(self.num_buckets)
        if recorded is None or math.prod(factors) > math.prod(recorded):
            recorded = list(factors)
        self.trained_num_buckets = recorded

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write ``config.json``. An automatic bucket count is written as the one that training used, and marked."""
        saved = self
        if self.trained_num_buckets is not None:
            saved = copy.deepcopy(self)
            factors = self.trained_num_buckets
            saved.num_buckets = factors[0] if len(factors) == 1 else list(factors)
            saved.num_buckets_automatic = True
            saved.trained_num_buckets = None
        super(ReformerConfig, saved).save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @property
    def max_length_of_positions(self) -> int:
        """The longest input that the position tables hold."""
        return math.prod(self.axial_pos_shape) if self.axial_pos_embds else self.max_position_embeddings


_PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")


def check_consistency(config: ReformerConfig, *, decoder: bool | None = None) -> None:
    """Raise ``ValueError`` for fields that contradict each other, naming them.

    Args:
        config: what a model is about to be built from.
        decoder: whether this kind of model must be causal; None where both kinds work.
    """
    config.check_fields()
    if config.problem_type not in _PROBLEM_TYPES:
        allowed = ", ".join(map(repr, _PROBLEM_TYPES))
        raise ValueError(f"problem_type must be one of {allowed}; got {config.problem_type!r}")
    if not config.num_labels:
        raise ValueError(f"num_labels must be an integer >= 1; got {config.num_labels}")
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name) not in (None, False, True):
            raise ValueError(f"{name} must be True or False; got {getattr(config, name)!r}")
    for kind in _KINDS:
        if kind not in config.attn_layers:
            continue
        probs = f"{kind}_attention_probs_dropout_prob"
        for name in (f"{kind}_num_chunks_before", f"{kind}_num_chunks_after", probs):
            if getattr(config, name) is None:
                raise ValueError(f"{name} is None, but attn_layers has {kind!r} layers that need it")
        after = getattr(config, f"{kind}_num_chunks_after")
        if decoder and after:
            raise ValueError(f"{kind}_num_chunks_after must be 0 in a causal language model; got {after}")
    if config.axial_pos_embds:
        if len(config.axial_pos_shape) != len(config.axial_pos_embds_dim):
            raise ValueError(
                f"axial_pos_shape and axial_pos_embds_dim must have one entry per axis each; got "
                f"{config.axial_pos_shape} and {config.axial_pos_embds_dim}"
            )
        if sum(config.axial_pos_embds_dim) != config.hidden_size:
            raise ValueError(
                f"axial_pos_embds_dim must sum to hidden_size, {config.hidden_size}; got {config.axial_pos_embds_dim}"
            )
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        raise ValueError(f"pad_token_id must be below vocab_size, {config.vocab_size}; got {config.pad_token_id}")
    if decoder is not None and config.is_decoder is not decoder:
        kind = "causal language model" if decoder else "masked language model"
        raise ValueError(f"is_decoder must be {decoder} for a {kind}; got {config.is_decoder}")
