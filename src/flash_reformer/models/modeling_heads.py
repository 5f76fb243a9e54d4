"""Classification of whole sequences and extractive question answering.

Letters: B batch, T positions, E hidden size, L labels. Losses are means in nats over the labels that count (-100 does
not), or sums divided by ``num_items_in_batch`` where Trainer gives it for gradient accumulation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import QuestionAnsweringModelOutput, SequenceClassifierOutput

from flash_reformer.functional import IGNORE_INDEX, binary_cross_entropy_sum, cross_entropy_sum, squared_error_sum
from flash_reformer.layers.exchange import Exchange
from flash_reformer.layers.head import ReformerClassificationHead
from flash_reformer.layers.linear import Linear
from flash_reformer.models.configuration_reformer import ReformerConfig, check_consistency
from flash_reformer.models.head_tools import exchange_of, extras, finish, mean_loss, put_together
from flash_reformer.models.inputs import check_tensor, check_values
from flash_reformer.models.modeling_reformer import ReformerModel, ReformerPreTrainedModel


class ReformerForSequenceClassification(ReformerPreTrainedModel):
    """A class, several classes or numbers for a whole sequence.

    A bidirectional model pools position 0, a causal one the last unmasked token; ``config.classifier_pooling`` can
    choose otherwise. In a long sequence one position sees little of the rest through chunks and buckets, and training
    from scratch has hardly a gradient to begin with; ``"max"`` picks up what any position has found.
    """

    def __init__(self, config: ReformerConfig) -> None:
        check_consistency(config)
        super().__init__(config)
        self.num_labels: int = config.num_labels or 0
        self.reformer = ReformerModel(config)
        self.classifier = ReformerClassificationHead(config)
        self.post_init()

    def _pool(self, hidden_BTX: Tensor, attention_mask: Tensor | None) -> Tensor:
        pooling = self.config.classifier_pooling or ("last" if self.config.is_decoder else "first")
        if pooling == "first":
            return hidden_BTX[:, 0]
        if attention_mask is None:
            attention_mask = hidden_BTX.new_ones(hidden_BTX.shape[:2], dtype=torch.bool)
        real_BT1 = (attention_mask != 0).unsqueeze(-1)
        if pooling == "mean":
            total = torch.where(real_BT1, hidden_BTX, 0).sum(dim=1)
            return total / real_BT1.sum(dim=1).clamp(min=1)
        if pooling == "max":
            return torch.where(real_BT1, hidden_BTX, torch.finfo(hidden_BTX.dtype).min).amax(dim=1)
        places = torch.arange(hidden_BTX.shape[1], device=hidden_BTX.device)
        last_B = torch.where(real_BT1.squeeze(-1), places, 0).amax(dim=1)
        return hidden_BTX.gather(1, last_B.view(-1, 1, 1).expand(-1, 1, hidden_BTX.shape[-1])).squeeze(1)

    def _pool_shared(
        self, hidden_BLX: Tensor, attention_mask: Tensor | None, given: Tensor, exchange: Exchange
    ) -> Tensor:
        """Pool what ranks have of the positions; every rank gets the result."""
        pooling = self.config.classifier_pooling or ("last" if self.config.is_decoder else "first")
        real_BT = given.new_ones(given.shape[:2], dtype=torch.bool) if attention_mask is None else attention_mask != 0
        places_1T = torch.arange(given.shape[1], device=given.device).unsqueeze(0)
        if pooling == "max":
            mine_BL1 = exchange.my_positions(real_BT, False).unsqueeze(-1)
            lowest = torch.finfo(hidden_BLX.dtype).min
            return exchange.each(torch.where(mine_BL1, hidden_BLX, lowest).amax(dim=1)).amax(dim=0)
        if pooling == "mean":
            chosen_BT = real_BT
        elif pooling == "first":
            chosen_BT = places_1T.expand(real_BT.shape) == 0
        else:
            chosen_BT = places_1T == torch.where(real_BT, places_1T, 0).amax(dim=1, keepdim=True)
        mine_BL1 = exchange.my_positions(chosen_BT, False).unsqueeze(-1)
        total_BX = exchange.total(torch.where(mine_BL1, hidden_BLX, 0).sum(dim=1))
        return total_BX / chosen_BT.sum(dim=1, keepdim=True).clamp(min=1)

    def _problem_type(self, labels: Tensor) -> str:
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"

    def _check_labels(self, labels: Tensor, batch_size: int) -> str:
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a torch.Tensor; got {type(labels).__name__}")
        problem_type = self._problem_type(labels)
        if problem_type == "single_label_classification":
            bare: list[tuple[int, ...]] = [()] if batch_size == 1 else []  # as public examples have it
            check_tensor("labels", labels, [(batch_size,), (batch_size, 1), *bare], (torch.int64, torch.int32))
            check_values("labels", labels, 0, self.num_labels, also=IGNORE_INDEX)
            return problem_type
        shapes: list[tuple[int, ...]] = [(batch_size, self.num_labels)]
        numbers: tuple[torch.dtype, ...] = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        if problem_type == "regression":
            shapes += [(batch_size,)] if self.num_labels == 1 else []
            numbers += (torch.int64, torch.int32)
        check_tensor("labels", labels, shapes, numbers)
        return problem_type

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
    ) -> tuple[Any, ...] | SequenceClassifierOutput:
        """Return logits ``[B, num_labels]`` and, with ``labels``, a loss.

        ``config.problem_type`` decides which: squared error for ``"regression"`` (labels ``[B]`` or ``[B, L]``),
        cross-entropy for ``"single_label_classification"`` (``[B]`` integers), binary cross-entropy for
        ``"multi_label_classification"`` (``[B, L]`` floats). Unset, it is regression for one label, else told by
        the labels' dtype, and a training forward records it in the config.

        The other arguments are those of :class:`ReformerModel` and :class:`ReformerModelWithLMHead`.
        """
        problem_type = None
        given = input_ids if input_ids is not None else inputs_embeds
        if labels is not None and isinstance(given, Tensor) and given.dim() >= 2:
            problem_type = self._check_labels(labels, given.shape[0])
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
        hidden = outputs.last_hidden_state
        exchange = exchange_of(self.reformer, outputs, given, num_hashes)
        if exchange.shares and given is not None:
            pooled_BX = self._pool_shared(hidden, attention_mask, given, exchange)
        else:
            pooled_BX = self._pool(hidden, attention_mask)
        logits = self.classifier(pooled_BX)
        loss = None
        if labels is not None:
            if self.training:
                self.config.problem_type = problem_type  # type: ignore[assignment]
            if problem_type == "single_label_classification":
                total = cross_entropy_sum(logits, labels.long(), backend=self.backend)
                count: Tensor | int = (labels != IGNORE_INDEX).sum()
            else:
                error = squared_error_sum if problem_type == "regression" else binary_cross_entropy_sum
                total, count = error(logits, labels.view(logits.shape)), labels.numel()
            # The mean over ranks: each may have dropped out other parts of what was pooled.
            loss = exchange.each(mean_loss(total, count, num_items_in_batch)).mean(dim=0)
        output = SequenceClassifierOutput(loss=loss, logits=logits, **extras(outputs))
        return finish(output, return_dict, self.config)


class ReformerForQuestionAnswering(ReformerPreTrainedModel):
    """Where in the sequence an answer starts and ends. Two outputs per position, whatever ``num_labels`` says."""

    def __init__(self, config: ReformerConfig) -> None:
        check_consistency(config)
        super().__init__(config)
        self.reformer = ReformerModel(config)
        self.qa_outputs = Linear(2 * config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        num_hashes: int | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Any, ...] | QuestionAnsweringModelOutput:
        """Return start and end logits ``[B, T]`` and, with ``start_positions`` and ``end_positions`` ``[B]``, a loss.

        The loss is the mean of the two cross-entropies; positions outside the sequence take no part in it.

        The other arguments are those of :class:`ReformerModel` and :class:`ReformerModelWithLMHead`.
        """
        if (start_positions is None) != (end_positions is None):
            missing = "start_positions" if start_positions is None else "end_positions"
            raise ValueError(f"give start_positions and end_positions together; {missing} is missing")
        given = input_ids if input_ids is not None else inputs_embeds
        spans = {"start_positions": start_positions, "end_positions": end_positions}
        for name, places in spans.items():
            if places is not None and isinstance(given, Tensor) and given.dim() >= 2:
                check_tensor(name, places, [(given.shape[0],), (given.shape[0], 1)], (torch.int64, torch.int32))
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
        exchange = exchange_of(self.reformer, outputs, given, num_hashes)
        logits_BT2 = self.qa_outputs(outputs.last_hidden_state)
        start_logits, end_logits = put_together(logits_BT2, exchange, given).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            halves = []
            for logits, places in ((start_logits, start_positions), (end_logits, end_positions)):
                places = places.flatten().long()
                inside = (places >= 0) & (places < logits.shape[1])
                total = cross_entropy_sum(logits, torch.where(inside, places, IGNORE_INDEX), backend=self.backend)
                halves.append(mean_loss(total, inside.sum(), num_items_in_batch))
            loss = (halves[0] + halves[1]) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **extras(outputs)
        )
        return finish(output, return_dict, self.config)
