"""The two language models: causal, which generates, and masked.

Letters: B batch, T positions, E hidden size, V vocabulary. Losses are means in nats over the labels that count (-100
does not), or sums divided by ``num_items_in_batch`` where Trainer gives it for gradient accumulation.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import MaskedLMOutput

from flash_reformer.functional import IGNORE_INDEX, cross_entropy_sum
from flash_reformer.layers.encoder import Judge
from flash_reformer.layers.exchange import Exchange
from flash_reformer.layers.head import ReformerOnlyLMHead
from flash_reformer.layers.linear import set_backend
from flash_reformer.layers.watched import is_hooked
from flash_reformer.models.configuration_reformer import ReformerConfig, check_consistency
from flash_reformer.models.generation import CachedGeneration
from flash_reformer.models.head_tools import exchange_of, extras, finish, mean_loss, put_together
from flash_reformer.models.inputs import check_tensor, check_values
from flash_reformer.models.modeling_reformer import ReformerModel, ReformerPreTrainedModel
from flash_reformer.models.outputs import ReformerModelWithLMHeadOutput

#: Positions whose logits exist at once when ``return_logits=False`` and ``chunk_size_lm_head`` is 0. A GPU is kept busy
#: by more: as many as make so many logits.
LOSS_CHUNK = 1024
_LOGITS_ON_GPU = 2**25


def _check_token_labels(labels: Tensor, given: Tensor, config: ReformerConfig) -> None:
    check_tensor("labels", labels, [tuple(given.shape[:2])], (torch.int64, torch.int32))
    check_values("labels", labels, 0, config.vocab_size, also=IGNORE_INDEX)


class _LanguageModel(ReformerPreTrainedModel):
    """What the two language models share: their head."""

    def __init__(self, config: ReformerConfig, *, decoder: bool) -> None:
        check_consistency(config, decoder=decoder)
        super().__init__(config)
        self.reformer = ReformerModel(config)
        self.lm_head = ReformerOnlyLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """Return the projection to the vocabulary."""
        return self.lm_head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the projection to the vocabulary, keeping as much of the bias as fits."""
        self.lm_head.decoder = new_embeddings
        set_backend(self.lm_head, self.backend)
        old, size = self.lm_head.bias, new_embeddings.weight.shape[0]
        if size != old.shape[0]:
            bias = torch.zeros(size, dtype=old.dtype, device=old.device)
            kept = min(size, old.shape[0])
            bias[:kept] = old.detach()[:kept]
            self.lm_head.bias = nn.Parameter(bias, requires_grad=old.requires_grad)


class ReformerModelWithLMHead(CachedGeneration, _LanguageModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model. ``config.is_decoder`` must be True."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config, decoder=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        past_buckets_states: Any | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_logits: bool = True,
        *,
        num_items_in_batch: Tensor | int | None = None,
        past_key_values: Any | None = None,
        rows_alone: bool = False,
    ) -> tuple[Any, ...] | ReformerModelWithLMHeadOutput:
        """Predict the next token at every position.

        Args:
            labels: ``[B, T]`` token ids or -100. They are shifted inside: position i is judged by ``labels[i+1]``.
            logits_to_keep: make logits of the last so many positions, or of the positions in this 1-d tensor; 0 for
                all. Not together with ``labels``.
            return_logits: False (with ``labels``) makes the loss and its gradient chunk by chunk: logits never
                exist whole.
            num_items_in_batch: divisor of the summed loss, in place of the number of labels that count.
            past_key_values: the same as ``past_buckets_states``.
            rows_alone: what ``generate`` asks for: compute each row on its unmasked tokens alone and return the
                logits ``[B, 1, V]`` of its last one. It goes with the inputs, ``num_hashes`` and ``past_key_values``.

        The other arguments are those of :class:`ReformerModel`.
        """
        words = input_ids if input_ids is not None else inputs_embeds
        _check_kept(logits_to_keep, words)
        if rows_alone:
            _check_alone(head_mask, past_buckets_states, output_hidden_states, output_attentions, labels)
            batch = (input_ids, position_ids, attention_mask, inputs_embeds, num_hashes)
            return finish(self._forward_rows_alone(past_key_values, *batch, logits_to_keep), return_dict, self.config)
        if labels is not None:
            if isinstance(words, Tensor) and words.dim() >= 2:
                _check_token_labels(labels, words, self.config)
            if isinstance(logits_to_keep, Tensor) or logits_to_keep != 0:
                raise ValueError("logits_to_keep must be 0 where labels are given: the loss needs every position")
        elif not return_logits:
            raise ValueError("return_logits=False needs labels: there would be nothing to return")
        judge = None if return_logits or labels is None else self._judge(words, labels)
        # Whoever looks at the encoder's last state is to find one.
        inside = judge is not None and not any(map(is_hooked, (self.reformer, self.reformer.encoder)))
        keep_shards = not isinstance(logits_to_keep, Tensor) and logits_to_keep == 0
        outputs = self.reformer(
            input_ids,
            attention_mask,
            position_ids,
            head_mask,
            inputs_embeds,
            num_hashes,
            past_buckets_states,
            # A loss is not the beginning of a text.
            False if use_cache is None and labels is not None else use_cache,
            output_hidden_states,
            output_attentions,
            return_dict=True,
            past_key_values=past_key_values,
            judge=judge if inside else None,
            keep_shards=keep_shards,
        )
        exchange = exchange_of(self.reformer, outputs, words, num_hashes)
        hidden_BTX, loss = outputs.last_hidden_state, None
        logits = self.lm_head(_keep_positions(hidden_BTX, logits_to_keep)) if judge is None else None
        if labels is not None:
            total = hidden_BTX if inside else self._loss_sum(hidden_BTX, logits, labels, judge, exchange)
            loss = mean_loss(total, (labels[:, 1:] != IGNORE_INDEX).sum(), num_items_in_batch)
        if logits is not None and keep_shards:
            logits = put_together(logits, exchange, words)
        output = ReformerModelWithLMHeadOutput(loss, logits, outputs.past_buckets_states, **extras(outputs))
        return finish(output, return_dict, self.config)

    def _judge(self, words: Any, labels: Tensor) -> Judge | None:
        """Return what makes the summed loss of the last hidden state; None for words that the model will refuse."""
        if not isinstance(words, Tensor) or words.dim() < 2:
            return None
        # The last position has nothing to predict. It goes along, so that what is dropped is dropped as with logits.
        targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        loss = functools.partial(cross_entropy_sum, backend=self.backend)
        chunk = self.config.chunk_size_lm_head or _loss_chunk(words, self.config.vocab_size)
        return self.lm_head.judge(targets, IGNORE_INDEX, loss, chunk)

    def _loss_sum(
        self, hidden_BTX: Tensor, logits: Tensor | None, labels: Tensor, judge: Judge | None, exchange: Exchange
    ) -> Tensor:
        """Return the summed loss from logits, or as a judge makes it; each position is judged by what comes next."""
        if logits is None:
            assert judge is not None, "without logits there is a judge"
            return exchange.total(judge.shared(exchange).total(hidden_BTX))
        # A rank's last position has a next one, on the next rank; the very last one's target is filled in.
        judged = logits if exchange.shares else logits[:, :-1]
        mine = exchange.my_positions(labels[:, 1:], IGNORE_INDEX)
        return exchange.total(cross_entropy_sum(judged, mine, backend=self.backend))


def _loss_chunk(words: Tensor, vocab_size: int) -> int:
    if words.device.type != "cuda":
        return LOSS_CHUNK
    return max(LOSS_CHUNK, _LOGITS_ON_GPU // (words.shape[0] * vocab_size))


def _check_alone(*others: Any) -> None:
    if any(value is not None for value in others):
        raise ValueError(
            "rows_alone is generate's own: it takes input_ids or inputs_embeds, position_ids, attention_mask, "
            "num_hashes, past_key_values and logits_to_keep, and nothing else"
        )


def _check_kept(logits_to_keep: Any, words: Any) -> None:
    """Raise for what ``logits_to_keep`` cannot be for this input, before anything runs."""
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dim() != 1 or logits_to_keep.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"logits_to_keep must be a 1-d integer tensor or an integer; got {logits_to_keep!r}")
        if isinstance(words, Tensor) and words.dim() >= 2:
            check_values("logits_to_keep", logits_to_keep, -words.shape[1], words.shape[1])
    elif not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool):
        raise TypeError(f"logits_to_keep must be an integer or a tensor; got {type(logits_to_keep).__name__}")
    elif logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must be >= 0; got {logits_to_keep}")


def _keep_positions(hidden_BTX: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    if isinstance(logits_to_keep, Tensor):
        return hidden_BTX[:, logits_to_keep]
    return hidden_BTX[:, -logits_to_keep:] if logits_to_keep else hidden_BTX


class ReformerForMaskedLM(_LanguageModel):
    """A bidirectional language model for masked tokens. ``config.is_decoder`` must be False."""

    def __init__(self, config: ReformerConfig) -> None:
        super().__init__(config, decoder=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Any, ...] | MaskedLMOutput:
        """Predict the token at every position; ``labels`` ``[B, T]`` are token ids, or -100 where not judged.

        The other arguments are those of :class:`ReformerModel` and :class:`ReformerModelWithLMHead`.
        """
        if labels is not None:
            given = input_ids if input_ids is not None else inputs_embeds
            if isinstance(given, Tensor) and given.dim() >= 2:
                _check_token_labels(labels, given, self.config)
        outputs = self.reformer(
            input_ids,
            attention_mask,
            position_ids,
            head_mask,
            inputs_embeds,
            num_hashes,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
            keep_shards=True,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        given = input_ids if input_ids is not None else inputs_embeds
        exchange = exchange_of(self.reformer, outputs, given, num_hashes)
        loss = None
        if labels is not None:
            total = cross_entropy_sum(logits, exchange.my_positions(labels, IGNORE_INDEX), backend=self.backend)
            loss = mean_loss(exchange.total(total), (labels != IGNORE_INDEX).sum(), num_items_in_batch)
        logits = put_together(logits, exchange, given)
        return finish(MaskedLMOutput(loss=loss, logits=logits, **extras(outputs)), return_dict, self.config)
