"""The stack of layers: the one place that decides where a reversible chain opens, keeps and closes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash_reformer.layers.block import ReformerLayer
from flash_reformer.layers.call import Call
from flash_reformer.layers.decode_step import Step
from flash_reformer.layers.exchange import Exchange
from flash_reformer.layers.linear import Dropout
from flash_reformer.layers.modes import in_modes, modes_of
from flash_reformer.layers.norm import LayerNorm
from flash_reformer.layers.watched import is_watched, keeps_to_itself
from flash_reformer.reversible import Streams, Summing, close_channel, close_with_sum, keep, open_channel, start
from flash_reformer.seeds import is_capturing


@dataclass(frozen=True)
class Judge:
    """What a head makes of the last hidden state: a sum over positions, taken over some of them at a time.

    Attributes:
        loss: ``loss(hidden, targets)`` returns the sum for some positions ``[B, t, 2E]``.
        targets_BT: what each position is judged by; pads, which come after them, are not judged.
        nothing: the target that adds nothing.
        head: the module that does it.
        piece: positions at a time.
    """

    loss: Callable[[Tensor, Tensor], Tensor]
    targets_BT: Tensor
    nothing: int
    head: nn.Module
    piece: int

    @property
    def length(self) -> int:
        """How many positions are judged."""
        return self.targets_BT.shape[1]

    def shared(self, exchange: Exchange) -> Judge:
        """Return the judge of this rank's positions."""
        return replace(self, targets_BT=exchange.my_positions(self.targets_BT, self.nothing))

    def run(self, hidden_BTX: Tensor, start: int) -> Tensor:
        """Return the sum for positions the first of which is number ``start``."""
        return self.loss(hidden_BTX, self.targets_BT[:, start : start + hidden_BTX.shape[1]])

    def run_again(self, hidden_BTX: Tensor, start: int) -> Tensor:
        """Do what :meth:`run` does, and again for the gradient, so that nothing inside of it is stored."""
        if not torch.is_grad_enabled():
            return self.run(hidden_BTX, start)
        # What adapters drop out is dropped again; a graph's generators cannot be read while it is captured.
        replay = torch.compiler.is_compiling() or not is_capturing(hidden_BTX.device)
        result: Tensor = checkpoint(self.run, hidden_BTX, start, use_reentrant=False, preserve_rng_state=replay)
        return result

    def total(self, hidden_BTX: Tensor) -> Tensor:
        """Return the sum for hidden states ``[B, T, 2E]``."""
        pieces = hidden_BTX[:, : self.length].split(self.piece, dim=1)
        return torch.stack([self.run_again(piece, at * self.piece) for at, piece in enumerate(pieces)]).sum()


class ReformerEncoder(nn.Module):
    """The stack of layers and the norm over both streams."""

    #: Set by transformers, with ``gradient_checkpointing``, when checkpointing is enabled.
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: Any, layers: Sequence[ReformerLayer]) -> None:
        super().__init__()
        self.reversible: bool = config.reversible
        self.layers = nn.ModuleList(layers)
        self.layer_norm = LayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.gradient_checkpointing = False

    def _run_layer(
        self, layer: nn.Module, streams: Streams, call: Call, head_mask_H: Tensor | None, with_probs: bool
    ) -> tuple[Streams, Tensor | None]:
        if not (self.gradient_checkpointing and self.training and torch.is_grad_enabled()) or with_probs:
            return layer(streams, call, head_mask_H, with_probs)
        if self.reversible:
            warnings.warn(
                "gradient checkpointing has no effect on reversible layers, which store no activations; "
                "build the model with reversible=False to use it",
                stacklevel=2,
            )
            return layer(streams, call, head_mask_H)

        def run(*pair: Tensor) -> tuple[Tensor, ...]:
            x1, x2, low1, low2 = pair
            return layer(Streams(x1, x2, low1, low2), call, head_mask_H)[0][:4]

        y1, y2, low1, low2 = self._gradient_checkpointing_func(run, *streams[:4])
        return Streams(y1, y2, low1, low2), None

    def forward(
        self,
        embeds_BTE: Tensor,
        call: Call,
        head_masks: list[Tensor | None],
        output_hidden_states: bool,
        output_attentions: bool,
        judge: Judge | None = None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return the normalised concatenation ``[B, T, 2E]`` and, if asked for, states and attention probabilities.

        With a ``judge`` its sum comes in place of the former, which never exists as a whole then.

        Compilers take the stack whole in evaluation, where it runs by plain autograd. In training they leave it as it
        is: reversible blocks are autograd functions that run layers again.
        """
        if torch.compiler.is_compiling() and self.training and self.reversible and not output_attentions:
            return self._forward_as_it_is(embeds_BTE, call, head_masks, output_hidden_states, output_attentions, judge)
        return self._forward(embeds_BTE, call, head_masks, output_hidden_states, output_attentions, judge)

    @torch.compiler.disable
    def _forward_as_it_is(self, *arguments: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        return self._forward(*arguments)

    def _forward(
        self,
        embeds_BTE: Tensor,
        call: Call,
        head_masks: list[Tensor | None],
        output_hidden_states: bool,
        output_attentions: bool,
        judge: Judge | None,
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        # Low parts serve whoever rebuilds a stream; plain autograd gets them too, to have the same values.
        # An exported program rebuilds nothing, and would carry switches of autograd that torch cannot load.
        streams = start(embeds_BTE, exact=torch.is_grad_enabled() and not torch.compiler.is_exporting())
        states: list[Tensor] = []
        probs: list[Tensor] = []
        # Returned probabilities carry gradients, so every layer's activations are stored anyway.
        reversible = self.reversible and not output_attentions and not torch.compiler.is_compiling()
        layers = cast("Sequence[ReformerLayer]", self.layers)
        for layer, head_mask_H in zip(layers, head_masks, strict=True):
            if output_hidden_states:
                streams = keep(streams) if streams.channel is not None else streams
                states.append(streams.x2)
            if reversible and streams.channel is None and layer.wants_gradients(streams, head_mask_H):
                private = all(keeps_to_itself(each) and not is_watched(each, ReformerLayer) for each in layers)
                streams = open_channel(streams, private=private)
            streams, layer_probs = self._run_layer(layer, streams, call, head_mask_H, output_attentions)
            if layer_probs is not None:
                probs.append(layer_probs)
        if output_hidden_states:
            streams = keep(streams) if streams.channel is not None else streams
            states.append(streams.x2)
        if judge is not None and self._may_go_in_pieces(judge):
            return self._sum(streams, judge), states, probs
        if streams.channel is not None:
            both_BTX = close_channel(streams)
        else:
            both_BTX = torch.cat([streams.x1, streams.x2], dim=-1)
        hidden_BTX = self.dropout(self.layer_norm(both_BTX))
        return hidden_BTX if judge is None else judge.total(hidden_BTX), states, probs

    def _may_go_in_pieces(self, judge: Judge) -> bool:
        """Whether nobody looks at the last hidden state, or brings weights to the modules that make something of it."""
        return all(keeps_to_itself(module) for module in (self.layer_norm, self.dropout, judge.head))

    def _sum(self, streams: Streams, judge: Judge) -> Tensor:
        judged = judge.run_again if streams.channel is None else judge.run
        modes = modes_of(self.layer_norm, self.dropout)

        def run(both_BTX: Tensor, start: int) -> Tensor:
            with in_modes(modes):
                return judged(self.dropout(self.layer_norm(both_BTX)), start)

        def parameters() -> list[Tensor]:
            return [*self.layer_norm.parameters(), *judge.head.parameters()]

        summing = Summing(run, parameters, judge.piece, judge.length)
        if streams.channel is None:
            return summing.total(streams.x1, streams.x2)
        return close_with_sum(streams, summing)

    def decode(
        self,
        embeds_BTE: Tensor,
        step: Step,
        states: Sequence[Any],
        head_masks: list[Tensor | None],
        output_hidden_states: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return ``[B, T, 2E]`` for new tokens, and the streams between layers if asked for."""
        x1 = x2 = embeds_BTE
        kept: list[Tensor] = []
        layers = cast("Sequence[ReformerLayer]", self.layers)
        for layer, state, head_mask_H in zip(layers, states, head_masks, strict=True):
            kept += [x2] if output_hidden_states else []
            x1, x2 = layer.decode(x1, x2, step, state, head_mask_H)
        kept += [x2] if output_hidden_states else []
        return self.dropout(self.layer_norm(torch.cat([x1, x2], dim=-1))), kept
