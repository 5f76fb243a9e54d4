"""Heads on top of the last hidden state ``[B, T, 2E]``. Letters: B batch, T positions, E hidden size, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flash_reformer.layers.encoder import Judge
from flash_reformer.layers.linear import Dropout, Linear
from flash_reformer.layers.modes import in_modes, modes_of


class ReformerOnlyLMHead(nn.Module):
    """``decoder`` (no bias of its own) plus ``bias``; the bias lives here because checkpoints keep it here."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.chunk_size_lm_head: int = config.chunk_size_lm_head
        self.decoder = Linear(2 * config.hidden_size, config.vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def _project(self, hidden_BTX: Tensor) -> Tensor:
        logits = self.decoder(hidden_BTX)
        return logits + self.bias.to(logits.dtype)

    def forward(self, hidden_BTX: Tensor) -> Tensor:
        """Return logits ``[B, T, V]``, made ``chunk_size_lm_head`` positions at a time (0: all at once)."""
        if not 0 < self.chunk_size_lm_head < hidden_BTX.shape[1]:
            return self._project(hidden_BTX)
        return torch.cat([self._project(chunk) for chunk in hidden_BTX.split(self.chunk_size_lm_head, dim=1)], dim=1)

    def judge(
        self, targets_BT: Tensor, nothing: int, loss: Callable[[Tensor, Tensor], Tensor], chunk_size: int
    ) -> Judge:
        """Return what makes the sum of ``loss(logits, targets)`` without ever holding more than a chunk of logits."""

        modes = modes_of(self)

        def judged(hidden_BTX: Tensor, targets: Tensor) -> Tensor:
            with in_modes(modes):
                return loss(self._project(hidden_BTX), targets)

        return Judge(judged, targets_BT, nothing, self, chunk_size)


class ReformerClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection on one pooled position."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dropout = config.classifier_dropout if config.classifier_dropout is not None else config.hidden_dropout_prob
        self.dense = Linear(2 * config.hidden_size, config.hidden_size)
        self.dropout = Dropout(dropout)
        self.out_proj = Linear(config.hidden_size, config.num_labels)

    def forward(self, pooled_BX: Tensor) -> Tensor:
        """Map ``[B, 2E]`` to ``[B, num_labels]``."""
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(pooled_BX)))))
