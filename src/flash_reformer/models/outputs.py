"""What the models return. Shapes: B batch, T positions at the caller's length, E hidden size, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput


class _CarriesCache:
    """The cache goes by Reformer's own name; the name that every other model uses reads it."""

    past_buckets_states: Any

    @property
    def past_key_values(self) -> Any:
        """The same cache as ``past_buckets_states``."""
        return self.past_buckets_states


@dataclass
class ReformerModelOutput(_CarriesCache, ModelOutput):
    """Output of :class:`ReformerModel`.

    Attributes:
        last_hidden_state: ``[B, T, 2E]``, both streams, normalised.
        past_buckets_states: the :class:`ReformerCache`, where the call was to fill or extend one.
        hidden_states: the second stream before the first layer and after each, ``[B, T, E]``, in the dtype of the
            residual streams (fp32 for half-precision models unless ``residual_in_fp32`` is off).
        attentions: attention probabilities per layer. Where a layer attended by chunks, ``[B, H, N, C, W]`` in the
            layer's own order (sorted by bucket for LSH) over the padded length; ``[B, H, T, T]`` where exactly.
    """

    last_hidden_state: Tensor | None = None
    past_buckets_states: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class ReformerModelWithLMHeadOutput(_CarriesCache, ModelOutput):
    """Output of :class:`ReformerModelWithLMHead`.

    Attributes:
        loss: mean next-token cross-entropy in nats, where labels were given.
        logits: ``[B, T, V]``, or as many positions as ``logits_to_keep`` asks for; None with ``return_logits=False``.
        past_buckets_states, hidden_states, attentions: as in :class:`ReformerModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_buckets_states: Any | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
