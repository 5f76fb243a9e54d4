"""Reversible residual blocks (Gomez et al., 2017; Reformer, section 3): activations are rebuilt, not stored.

A block maps a pair of streams by ``y1 = x1 + F(x2)``, ``y2 = x2 + G(y1)``. Knowing y, one can go back:
``x2 = y2 - G(y1)``, ``x1 = y1 - F(x2)``. So only the last pair is kept, and a backward pass carries the pair down
the blocks while it carries gradients.

In floating point that inverse is off by a rounding error per addition, and gradients taken at a point that is off are
off by a hundred times as much. So each stream keeps a second number per element, its *low* part: what rounding has
lost so far (Knuth's two-sum). Streams then have twice the mantissa, what comes back is the very number that went in
(but for one in tens of millions, off by one unit in the last place), and so gradients are those of plain autograd.

How the pair travels: every block takes and returns two *channel* tensors beside its streams. Going forward they are
zeros of stride 0 (one number of memory); going backward their **gradient** is the reconstructed pair. The functions:

* ``open_channel`` starts a chain, whether or not its inputs need gradients (frozen embeddings train the rest);
* ``reversible_block`` runs one block;
* ``keep`` stores the pair in the middle of a chain, so that a loss may enter there;
* ``close_channel`` stores the last pair, as the concatenation that the model goes on with, and ``close_with_sum`` where
  it goes on with no more than a sum over positions, such as a loss.

One autograd function per block, with the block's parameters as its inputs and ``torch.autograd.grad`` inside its
backward: parameters get gradients where autograd expects them, which DDP, FSDP2, tied blocks and
``torch.autograd.grad`` all rely on. This file knows nothing of attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from flash_reformer.branches import (
    Branch,
    LeafGradients,
    Record,
    Surroundings,
    Undoing,
    advance,
    as_ours,
    is_ours,
    same_memory,
    undo,
)
from flash_reformer.buffers import begin_walk, end_walk, lasting_like
from flash_reformer.residual import add


class Streams(NamedTuple):
    """The two residual streams, their low parts and, inside a reversible chain, its channel.

    Without low parts (inference, where nothing is rebuilt) additions are plain. In a ``private`` chain nobody but its
    blocks ever sees what passes between two of them, so each writes over what it got.
    """

    x1: Tensor
    x2: Tensor
    low1: Tensor | None = None
    low2: Tensor | None = None
    channel: tuple[Tensor, ...] | None = None
    private: bool = False


def start(x: Tensor, *, exact: bool) -> Streams:
    """Return two streams that both start as ``x``; ``exact`` gives them low parts."""
    if not exact:
        return Streams(x, x)
    nothing = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    # Two views: each stream's gradient is summed by itself, in the order in which a reversible chain sums it.
    return Streams(x.view_as(x), x.view_as(x), nothing, nothing)


class _Block(torch.autograd.Function):
    """Map ``(x1, x2, low1, low2, channel, sides, parameters)`` to y, low parts and channel; backward rebuilds x."""

    @staticmethod
    def forward(
        ctx: Any, f: Branch, g: Branch, parameters: Callable[[], list[Tensor]], private: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x1, x2, low1, low2, *channel = tensors[:8]
        ctx.f, ctx.g, ctx.parameters, ctx.private = f, g, parameters, private
        reuse = all(map(is_ours, tensors[:4]))
        ctx.before_f = Surroundings.capture(x1.device)
        with ctx.before_f.first():
            y1, low_y1, record = advance(f, at=x2, x=x1, low=low1, reuse=reuse)
        ctx.before_g = Surroundings.capture(x1.device)
        with ctx.before_g.first():
            y2, low_y2, _ = advance(g, at=y1, x=x2, low=low2, reuse=reuse)
        # Copied now that the branches' temporaries are gone, for the reason that LeafGradients gives.
        record = tuple(tensor.clone() for tensor in record)
        # The explicit inputs are saved only for autograd's check that nobody changes them before the recomputation.
        ctx.save_for_backward(*record, *tensors[8:])
        ctx.num_records = len(record)
        ctx.leaves = tensors[8 + len(f.sides) + len(g.sides) :]
        ctx.mark_non_differentiable(low_y1, low_y2)
        ctx.set_materialize_grads(False)
        return y1, y2, low_y1, low_y2, *(c.view_as(c) for c in channel)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d1: Tensor | None, d2: Tensor | None, _1: None, _2: None, *pair: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert all(tensor is not None for tensor in pair), "a reversible chain must end in one of the closing functions"
        y1, y2, low1, low2 = pair
        record = ctx.saved_tensors[: ctx.num_records]
        d1 = torch.zeros_like(y1) if d1 is None else d1
        d2 = torch.zeros_like(y2) if d2 is None else d2
        # Detached copies, so that the graph of the recomputation ends here and not in the graph that made the sides.
        f, g = (
            replace(branch, sides=tuple(side.detach().requires_grad_(side.requires_grad) for side in branch.sides))
            for branch in (ctx.f, ctx.g)
        )
        leaves = [*f.sides, *g.sides, *_unchanged(ctx.parameters(), ctx.leaves)]
        grads = LeafGradients(leaves, in_pieces=bool(f.chunk_size or g.chunk_size))
        x2, low2, d1 = undo(g, None, ctx.before_g, Undoing(y1, y2, low2, d1, d2, ctx.private), grads)
        x1, low1, d2 = undo(f, record, ctx.before_f, Undoing(x2, y1, low1, d2, d1, ctx.private), grads)
        if ctx.private:
            as_ours(d1, d2)
        return None, None, None, None, d1, d2, None, None, *as_ours(x1, x2, low1, low2), *grads.sums


def _unchanged(parameters: list[Tensor], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the parameters; raise unless they are those that the forward had."""
    if len(parameters) != len(leaves) or any(p is not q for p, q in zip(parameters, leaves, strict=True)):
        raise RuntimeError(
            "a parameter of a reversible layer was replaced between forward and backward, so the layer cannot be "
            "run again as it was (torch.func.functional_call does that, too); use reversible=False"
        )
    return parameters


def _channel_for(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return zeros with the tensors' shapes and dtypes that take one number of memory each."""
    return tuple(tensor.new_zeros(()).expand(tensor.shape) for tensor in tensors)


def _begin_walk_back() -> None:
    begin_walk()
    # Where gradients are asked for that lie above, the walk does not come to the chain's beginning.
    torch.autograd.Variable._execution_engine.queue_callback(end_walk)


class _Open(torch.autograd.Function):
    """Give the streams a channel. ``token`` requires gradients, so the chain exists whatever the streams do."""

    @staticmethod
    def forward(ctx: Any, x1: Tensor, x2: Tensor, low1: Tensor, low2: Tensor, token: Tensor) -> tuple[Tensor, ...]:
        return x1.view_as(x1), x2.view_as(x2), *_channel_for(x1, x2, low1, low2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor, d2: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        end_walk()
        return d1, d2, None, None, None


class _Keep(torch.autograd.Function):
    """Store the pair; going backward, feed the channel from the store, whatever came down it."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        y1, y2, _, _, *channel = tensors
        ctx.save_for_backward(*tensors[:4])
        ctx.set_materialize_grads(False)
        return y1.view_as(y1), y2.view_as(y2), *(c.view_as(c) for c in channel)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d1: Tensor | None, d2: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        # Views, which no block takes for its own: others have the states that were kept, or asked for their gradients.
        d1, d2 = (None if d is None else d.view_as(d) for d in (d1, d2))
        return d1, d2, None, None, *(tensor.view_as(tensor) for tensor in ctx.saved_tensors)


class _Close(torch.autograd.Function):
    """Concatenate the last pair, the only activations that a chain stores; going backward, feed the channel."""

    @staticmethod
    def forward(ctx: Any, y1: Tensor, y2: Tensor, low1: Tensor, low2: Tensor, *channel: Tensor) -> Tensor:
        both = torch.cat([y1, y2], dim=-1)
        ctx.save_for_backward(both, low1, low2)
        return both

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_both: Tensor) -> tuple[Tensor | None, ...]:
        _begin_walk_back()
        both, low1, low2 = ctx.saved_tensors
        # Copies, so that what is stored is free while the chain is walked back.
        pair = [lasting_like(tensor).copy_(tensor) for tensor in (*both.chunk(2, dim=-1), low1, low2)]
        return *d_both.chunk(2, dim=-1), None, None, *as_ours(*pair)


@dataclass(frozen=True)
class Summing:
    """What is summed over positions at the end of a chain, some of them at a time.

    Attributes:
        run: ``run(both, start)`` returns the sum for the positions of ``both`` ``[B, t, 2E]``, the first of which is
            number ``start``.
        parameters: lists, at any time in the same order, the tensors inside ``run`` that may want gradients.
        piece: positions at a time.
        length: how many positions count; those beyond are left out.
    """

    run: Callable[[Tensor, int], Tensor]
    parameters: Callable[[], list[Tensor]]
    piece: int
    length: int

    def pieces(self, *tensors: Tensor) -> list[tuple[int, tuple[Tensor, ...]]]:
        """Return views of the tensors' positions that go one at a time, and where they start."""
        starts = range(0, self.length, self.piece)
        return [(at, tuple(x[:, at : min(at + self.piece, self.length)] for x in tensors)) for at in starts]

    def total(self, x1: Tensor, x2: Tensor) -> Tensor:
        """Return the sum."""
        return torch.stack([self.run(torch.cat(pair, dim=-1), at) for at, pair in self.pieces(x1, x2)]).sum()


class _Sum(torch.autograd.Function):
    """Sum something over positions; the pair is stored, and nothing of the sum: each piece is run again."""

    @staticmethod
    def forward(ctx: Any, summing: Summing, private: bool, *tensors: Tensor) -> Tensor:
        y1, y2 = tensors[:2]
        ctx.summing, ctx.private, ctx.leaves = summing, private, tensors[8:]
        ctx.owned = all(map(is_ours, tensors[:4]))
        ctx.before = Surroundings.capture(y1.device)
        with ctx.before.first():
            total = summing.total(y1, y2)
        ctx.save_for_backward(*tensors[:4], *tensors[8:])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        _begin_walk_back()
        pair = ctx.saved_tensors[:4]
        y1, y2 = pair[:2]
        d1, d2 = (lasting_like(y) for y in (y1, y2))
        for d in (d1, d2):
            d[:, ctx.summing.length :] = 0
        in_pieces = ctx.summing.piece < ctx.summing.length
        grads = LeafGradients(_unchanged(ctx.summing.parameters(), ctx.leaves), in_pieces=in_pieces)
        with ctx.before.restore():
            for at, (y1_, y2_, d1_, d2_) in ctx.summing.pieces(y1, y2, d1, d2):
                with torch.enable_grad():
                    leaf = torch.cat([y1_, y2_], dim=-1).detach().requires_grad_()
                    part = ctx.summing.run(leaf, at)
                (d_leaf,) = grads.through([get_gradient_edge(part)], [leaf], [d_total.to(part.dtype)])
                assert d_leaf is not None, "what is summed depends on the streams"
                for d_, half in zip((d1_, d2_), d_leaf.chunk(2, dim=-1), strict=True):
                    d_.copy_(half)
        if ctx.owned and _is_last_use(ctx):
            handed = tuple(map(same_memory, pair))
        else:
            # Copies, so that what is stored outlives the walk, for another one or for whoever else has it.
            handed = tuple(lasting_like(tensor).copy_(tensor) for tensor in pair)
        if ctx.private:
            as_ours(d1, d2)
        return None, None, d1, d2, None, None, *as_ours(*handed), *grads.sums


def _is_last_use(ctx: Any) -> bool:
    """Whether autograd gives up what was saved after this backward (``retain_graph=False``)."""
    clear = getattr(ctx, "maybe_clear_saved_tensors", None)
    if clear is None:
        return False
    clear()
    try:
        return ctx.saved_tensors is None
    except RuntimeError:
        return True


def open_channel(streams: Streams, *, private: bool = False) -> Streams:
    """Start a reversible chain at ``streams``, which must have low parts.

    ``private`` promises that nobody but the chain's blocks (and :func:`keep`) reads or keeps a stream inside it, or a
    stream's gradient: no hook, no caller. Then a chain needs the memory of half as many streams.
    """
    assert streams.low1 is not None and streams.low2 is not None, "start(x, exact=True) comes first"
    begin_walk()
    token = torch.zeros((), device=streams.x1.device, requires_grad=True)
    x1, x2, *channel = _Open.apply(*streams[:4], token)
    return Streams(x1, x2, streams.low1, streams.low2, tuple(channel), private)


def reversible_block(f: Branch, g: Branch, streams: Streams, parameters: Callable[[], list[Tensor]]) -> Streams:
    """Return ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``, storing neither x nor anything inside f and g.

    ``parameters`` lists, at any time in the same order, the tensors inside f and g that may want gradients. The
    block keeps only f's record, the random states before f and g, and autocast's settings, and replays all of them.
    """
    assert streams.channel is not None, "open_channel() comes first"
    y1, y2, low1, low2, *channel = _Block.apply(
        f, g, parameters, streams.private, *streams[:4], *streams.channel, *f.sides, *g.sides, *parameters()
    )
    if streams.private:
        as_ours(y1, y2, low1, low2)
    return Streams(y1, y2, low1, low2, tuple(channel), streams.private)


def plain_block(f: Branch, g: Branch, streams: Streams) -> tuple[Streams, Record]:
    """Return what :func:`reversible_block` returns, to the bit, by plain autograd, and f's record."""
    value, record = f(streams.x2)
    y1, low1 = add(streams.x1, streams.low1, value)
    y2, low2 = add(streams.x2, streams.low2, g(y1)[0])
    return Streams(y1, y2, low1, low2), record


def keep(streams: Streams) -> Streams:
    """Store the pair at this point of a chain. A loss may then use ``x1`` and ``x2`` of the result."""
    assert streams.channel is not None, "open_channel() comes first"
    y1, y2, *channel = _Keep.apply(*streams[:4], *streams.channel)
    low1, low2 = (None if low is None else low.view_as(low) for low in (streams.low1, streams.low2))
    return Streams(y1, y2, low1, low2, tuple(channel), streams.private)


def close_channel(streams: Streams) -> Tensor:
    """End a chain: return ``[y1 ; y2]``, concatenated along the last dimension."""
    assert streams.channel is not None, "open_channel() comes first"
    both: Tensor = _Close.apply(*streams[:4], *streams.channel)
    end_walk()
    return both


def close_with_sum(streams: Streams, summing: Summing) -> Tensor:
    """End a chain: return a sum over the positions of ``[y1 ; y2]``, which never exists as a whole."""
    assert streams.channel is not None, "open_channel() comes first"
    total: Tensor = _Sum.apply(summing, streams.private, *streams[:4], *streams.channel, *summing.parameters())
    end_walk()
    return total
