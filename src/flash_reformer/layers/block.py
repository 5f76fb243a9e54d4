"""One layer of the stack: attention and feed-forward as the two branches of a reversible block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flash_reformer import functional
from flash_reformer.branches import Branch, Parts, Record
from flash_reformer.layers.attention import ReformerAttention
from flash_reformer.layers.call import Call
from flash_reformer.layers.decode_step import Step
from flash_reformer.layers.linear import Dropout, Linear, check_capture
from flash_reformer.layers.modes import in_modes, modes_of
from flash_reformer.layers.norm import LayerNorm
from flash_reformer.reversible import Streams, plain_block, reversible_block


class ReformerFeedForwardDense(nn.Module):
    """Widen, drop, activate."""

    def __init__(self, config: Any, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.feed_forward_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.act_fn = activation

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        """Map ``[B, T, E]`` to ``[B, T, feed_forward_size]``."""
        return self.act_fn(self.dropout(self.dense(hidden_BTE)))

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules inside, not this one.

        Checkpoints name it ``dense``, like the linear layer in it and those of the other projections. Whoever picks
        modules by that name, as LoRA does, means linear layers, and would stumble over a container.
        """
        return ((name, module) for name, module in super().named_modules(*args, **kwargs) if module is not self)

    def ds_external_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield nothing: no parameter of other modules is used here.

        DeepSpeed's ZeRO-3 asks that of every child, and gives the method to modules that ``named_modules`` yields.
        """
        return iter(())


class ReformerFeedForwardOutput(nn.Module):
    """Narrow, drop."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = Linear(config.feed_forward_size, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_BTX: Tensor) -> Tensor:
        """Map ``[B, T, feed_forward_size]`` to ``[B, T, E]``."""
        return self.dropout(self.dense(hidden_BTX))


class ReformerFeedForward(nn.Module):
    """The feed-forward branch of a block: norm, widen, activate, narrow. Positions do not meet in it."""

    def __init__(self, config: Any, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = ReformerFeedForwardDense(config, activation)
        self.output = ReformerFeedForwardOutput(config)

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        """Map ``[B, T, E]`` to ``[B, T, E]``."""
        return self.output(self.dense(self.layer_norm(hidden_BTE)))

    def decode(self, hidden_BTE: Tensor) -> Tensor:
        """Do the same in evaluation, where dropouts do nothing: in a step of decoding even that takes time."""
        widened = self.dense.act_fn(self.dense.dense(self.layer_norm(hidden_BTE)))
        return self.output.dense(widened)


#: Numbers of one piece's wide activations, on a CPU and elsewhere.
_WIDE_ENOUGH, _WIDE_ON_DEVICE = 2**21, 2**26


def _check_engine(layer: nn.Module) -> None:
    """Raise where the weights of a layer come and go while it runs, or are copies: it could not run again as it was.

    FSDP may shard whole layers, no parts of them. ZeRO-3 fetches weights for one module at a time. Copies made by
    ``nn.DataParallel`` run in threads of one process, which would set back each other's generators.
    """
    if getattr(layer, "_is_replica", False):
        raise RuntimeError(
            "nn.DataParallel runs copies of a model in threads that share their random states, which reversible "
            "layers set back; use DistributedDataParallel (torchrun starts it), or reversible=False"
        )
    # What DeepSpeed gives to the parameters that it shards.
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        raise RuntimeError(
            "DeepSpeed's ZeRO-3 fetches the weights of one module at a time, and a reversible layer needs all of its "
            "own when it runs again; use ZeRO-1 or 2, or fully_shard (FSDP2), or reversible=False"
        )
    for name, module in layer.named_modules():
        # What ``fully_shard`` gives to the modules that it is called on.
        if module is not layer and hasattr(module, "_get_fsdp_state"):
            raise RuntimeError(
                f"fully_shard was called on {name}, a part of a reversible layer; call it on the whole layer "
                "(model.reformer.encoder.layers[i]), or use reversible=False"
            )


def _piece(x_BTE: Tensor, width: int, wanted: int) -> int:
    """Return how many positions go at once through what makes ``width`` numbers of each; 0 for all of them.

    Where the configuration does not say (``wanted`` is 0), many positions go in pieces. On a CPU, fresh memory for
    wide activations costs more than the products that fill it; elsewhere they would take most of a step's memory.
    """
    if wanted or torch.compiler.is_compiling():
        return wanted
    B, T, _ = x_BTE.shape
    wide = _WIDE_ENOUGH if x_BTE.device.type == "cpu" else _WIDE_ON_DEVICE
    pieces = B * T * width // wide
    return -(-T // pieces) if pieces > 1 else 0


class ReformerLayer(nn.Module):
    """``y1 = x1 + Attention(x2)``, ``y2 = x2 + FeedForward(y1)`` (Reformer, section 3)."""

    def __init__(self, config: Any, layer_id: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.chunk_size_feed_forward: int = config.chunk_size_feed_forward
        self.feed_forward_size: int = config.feed_forward_size
        self.attention = ReformerAttention(config, layer_id)
        self.feed_forward = ReformerFeedForward(config, activation)

    def branches(self, x1: Tensor, call: Call, head_mask_H: Tensor | None) -> tuple[Branch, Branch]:
        """Return the two residual branches as this call sees them, its modules' modes (train or eval) included."""
        modes = modes_of(self)

        def run_attention(x: Tensor, record: Record | None, head_mask_H: Tensor | None = None) -> tuple[Tensor, Record]:
            with in_modes(modes):
                return self.attention(x, call, head_mask_H, record)

        def run_feed_forward(x: Tensor, record: Record | None) -> tuple[Tensor, Record]:
            with in_modes(modes):
                return self.feed_forward(x), ()

        def mix(entered: list[Tensor], record: Record | None, head_mask_H: Tensor | None = None) -> Any:
            with in_modes(modes):
                return self.attention.mix(entered, call, head_mask_H, record)

        def enter(x: Tensor) -> tuple[Tensor, ...]:
            with in_modes(modes):
                return self.attention.enter(x)

        def leave(mixed: Tensor) -> Tensor:
            with in_modes(modes):
                return self.attention.leave(mixed)

        sides = () if head_mask_H is None else (head_mask_H,)
        addition = functional.stream_addition(x1, call.backend)
        whole = self.attention.is_watched()
        size = 0 if whole else _piece(x1, self.attention.widest, 0)
        attention = Branch(run_attention, sides, size, addition, None if whole else Parts(enter, mix, leave))
        size = _piece(x1, self.feed_forward_size, self.chunk_size_feed_forward)
        return attention, Branch(run_feed_forward, (), size, addition)

    def forward(
        self, streams: Streams, call: Call, head_mask_H: Tensor | None = None, with_probs: bool = False
    ) -> tuple[Streams, Tensor | None]:
        """Map the pair of streams ``[B, T, E]``; reversibly where they come with a channel, else by plain autograd.

        ``with_probs`` also returns the attention probabilities; it needs streams without a channel.
        """
        attention, feed_forward = self.branches(streams.x1, call, head_mask_H)
        if streams.channel is not None:
            assert not with_probs, "probabilities would have to be stored"
            check_capture(self, streams.x1.device)
            _check_engine(self)
            return reversible_block(attention, feed_forward, streams, lambda: list(self.parameters())), None
        after, record = plain_block(attention, feed_forward, streams)
        probs = self.attention.probs(streams.x2, call, head_mask_H, record) if with_probs else None
        return after, probs

    def decode(
        self, x1: Tensor, x2: Tensor, step: Step, state: Any, head_mask_H: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Map the streams ``[B, T, E]`` of new tokens, given what the layer keeps of those before."""
        y1 = x1 + self.attention.decode(x2, step, state, head_mask_H)
        size = self.chunk_size_feed_forward
        chunks = y1.split(size, dim=1) if 0 < size < y1.shape[1] else (y1,)
        outs = [self.feed_forward.decode(chunk) for chunk in chunks]
        return y1, x2 + (outs[0] if len(outs) == 1 else torch.cat(outs, dim=1))

    def wants_gradients(self, streams: Streams, head_mask_H: Tensor | None) -> bool:
        """Whether anything that enters this layer requires a gradient."""
        tensors = [streams.x1, streams.x2, *([] if head_mask_H is None else [head_mask_H])]
        return torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *self.parameters()))
