"""Word and position embeddings. Letters: B batch, T positions, E hidden size."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_reformer.layers.linear import Dropout


class AxialTables(nn.ParameterList):
    """One table per axis. A module that is called, so that hooks which bring offloaded weights find it."""

    # torch's list forbids to be called.
    __call__ = nn.Module.__call__

    def forward(self, indices: list[Tensor]) -> Tensor:
        """Return the concatenated rows ``[..., E]`` at one index ``[...]`` per axis."""
        # F.embedding, not ``weight[index]``: its backward is a sum over rows, deterministic on every device.
        rows = [F.embedding(i, weight.flatten(0, -2)) for i, weight in zip(indices, self, strict=True)]
        return torch.cat(rows, dim=-1)


class AxialPositionEmbeddings(nn.Module):
    """Position embeddings factorised over the axes of a grid (Reformer, appendix).

    Position j is a point of the grid ``axial_pos_shape``, counted in row-major order: for two axes it takes
    ``weights[0]`` at ``j // n_2`` and ``weights[1]`` at ``j % n_2``. Its embedding is the concatenation of one
    vector per axis. ``weights[i]`` has shape ``(1, .., n_i, .., 1, d_i)``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.axial_pos_shape: tuple[int, ...] = tuple(config.axial_pos_shape)
        self.dropout: float = config.hidden_dropout_prob
        self.weights = AxialTables()
        for axis, width in enumerate(config.axial_pos_embds_dim):
            shape = [1] * len(self.axial_pos_shape)
            shape[axis] = self.axial_pos_shape[axis]
            self.weights.append(nn.Parameter(torch.ones(*shape, width)))

    def _indices(self, positions_XT: Tensor) -> list[Tensor]:
        """Return the index along every axis."""
        indices, inner = [], math.prod(self.axial_pos_shape)
        for size in self.axial_pos_shape:
            inner //= size
            indices.append(positions_XT.div(inner, rounding_mode="floor") % size)
        return indices

    def forward(self, positions_XT: Tensor, batch_size: int) -> Tensor:
        """Return ``[B or 1, T, E]`` for positions ``[B or 1, T]``.

        Dropout draws one number per example and index along the second axis (the first where there is only one) and
        drops all features of those positions.
        """
        indices = self._indices(positions_XT)
        embedded_XTE = self.weights(indices)
        if not self.training or self.dropout == 0.0:
            return embedded_XTE
        axis = min(1, len(indices) - 1)
        ones = embedded_XTE.new_ones(batch_size, self.axial_pos_shape[axis])
        keep = F.dropout(ones, self.dropout)
        return embedded_XTE * keep.gather(1, indices[axis].expand(batch_size, -1)).unsqueeze(-1)


class PositionEmbeddings(nn.Module):
    """One learned vector per position."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, positions_XT: Tensor, batch_size: int) -> Tensor:
        """Return ``[B, T, E]`` for positions ``[B or 1, T]``."""
        return self.dropout(self.embedding(positions_XT.expand(batch_size, -1)))


class ReformerEmbeddings(nn.Module):
    """Word embeddings, dropped out, plus position embeddings with a dropout of their own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = (
            AxialPositionEmbeddings(config) if config.axial_pos_embds else PositionEmbeddings(config)
        )
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        inputs_embeds_BTE: Tensor,
        positions_XT: Tensor,
        alike: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> Tensor:
        """Return ``[B, T, E]`` for word embeddings ``[B, T, E]`` and positions ``[B or 1, T]``.

        Axial dropout is one mask for positions far apart, which may be on several ranks; they draw it ``alike``.
        """
        axial = isinstance(self.position_embeddings, AxialPositionEmbeddings)
        with alike() if axial else contextlib.nullcontext():
            position_embeds = self.position_embeddings(positions_XT, inputs_embeds_BTE.shape[0])
        return self.dropout(inputs_embeds_BTE) + position_embeds
