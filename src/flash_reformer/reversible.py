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
* ``close_channel`` stores the last pair, as the concatenation that the model goes on with.

One autograd function per block, with the block's parameters as its inputs and ``torch.autograd.grad`` inside its
backward: parameters get gradients where autograd expects them, which DDP, FSDP2, tied blocks and
``torch.autograd.grad`` all rely on. This file knows nothing of attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import GradientEdge, get_gradient_edge

from flash_reformer.buffers import begin_walk, end_walk, lasting_like
from flash_reformer.residual import add, add_in_pieces
from flash_reformer.seeds import giving_seeds, is_capturing, keeping_seeds

#: What a branch decided in its forward and must not decide again in its recomputation (hash buckets, say).
Record = tuple[Tensor, ...]


class Streams(NamedTuple):
    """The two residual streams, their low parts and, inside a reversible chain, its channel.

    Without low parts (inference, where nothing is rebuilt) additions are plain.
    """

    x1: Tensor
    x2: Tensor
    low1: Tensor | None = None
    low2: Tensor | None = None
    channel: tuple[Tensor, ...] | None = None


def start(x: Tensor, *, exact: bool) -> Streams:
    """Return two streams that both start as ``x``; ``exact`` gives them low parts."""
    if not exact:
        return Streams(x, x)
    nothing = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    # Two views: each stream's gradient is summed by itself, in the order in which a reversible chain sums it.
    return Streams(x.view_as(x), x.view_as(x), nothing, nothing)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block.

    ``run(x, record, *sides)`` returns the branch's output and its record. The first call gets ``record=None``;
    a recomputation gets what the first one returned. ``sides`` are further tensors that may want gradients.
    A branch that acts on each position alone may set ``chunk_size``: it is then run on that many positions (dim 1)
    at a time, forward and backward, so that only one chunk's activations exist; it must return an empty record.
    ``addition`` may be a kernel that adds the output to a stream in one pass.
    """

    run: Callable[..., tuple[Tensor, Record]]
    sides: tuple[Tensor, ...] = ()
    chunk_size: int = 0
    addition: Callable[..., None] | None = None

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Return the views of ``x`` that one call of ``run`` each takes."""
        return x.split(self.chunk_size, dim=1) if self.chunk_size else (x,)

    def __call__(self, x: Tensor) -> tuple[Tensor, Record]:
        """Run the branch on all of ``x`` for the first time."""
        if not self.chunk_size:
            return self.run(x, None, *self.sides)
        return torch.cat([self.run(piece, None, *self.sides)[0] for piece in self.split(x)], dim=1), ()


class _Surroundings(NamedTuple):
    """What a branch reads besides its arguments: random states and autocast. Both are restored to replay it."""

    cpu_rng: Tensor
    device: torch.device
    device_rng: Tensor | None
    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def capture(device: torch.device) -> _Surroundings:
        cuda = device.type == "cuda"
        kinds = {"cpu", device.type}
        return _Surroundings(
            torch.get_rng_state(),
            device,
            torch.cuda.get_rng_state(device) if cuda and not is_capturing(device) else None,
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)),
        )

    @contextlib.contextmanager
    def restore(self) -> Iterator[None]:
        """Replay in these surroundings; the caller's random states come back untouched."""
        outer = _Surroundings.capture(self.device)
        self._set_rng()
        try:
            with self.autocasting():
                yield
        finally:
            outer._set_rng()

    @contextlib.contextmanager
    def autocasting(self) -> Iterator[None]:
        """Autocast as captured, without its cache of cast weights.

        That cache may hold copies made while gradients were off (the forward of an autograd function); a graph
        built on one of them would not lead to the weight.
        """
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    def _set_rng(self) -> None:
        torch.set_rng_state(self.cpu_rng)
        if self.device_rng is not None:
            torch.cuda.set_rng_state(self.device_rng, self.device)


class _Block(torch.autograd.Function):
    """Map ``(x1, x2, low1, low2, channel, sides, parameters)`` to y, low parts and channel; backward rebuilds x."""

    @staticmethod
    def forward(
        ctx: Any, f: Branch, g: Branch, parameters: Callable[[], list[Tensor]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        x1, x2, low1, low2, *channel = tensors[:8]
        ctx.f, ctx.g, ctx.parameters = f, g, parameters
        ctx.before_f = _Surroundings.capture(x1.device)
        with ctx.before_f.autocasting():
            with keeping_seeds(x1.device) as seeds_f:
                value, record = f(x2)
            y1, low_y1 = add_in_pieces(x1, low1, value, fused=f.addition)
            del value
            ctx.before_g = _Surroundings.capture(x1.device)
            with keeping_seeds(x1.device) as seeds_g:
                y2, low_y2 = add_in_pieces(x2, low2, g(y1)[0], fused=g.addition)
        # Copied now that the branches' temporaries are gone, for the reason that _LeafGradients gives.
        record = tuple(tensor.clone() for tensor in record)
        # The explicit inputs are saved only for autograd's check that nobody changes them before the recomputation.
        ctx.save_for_backward(*record, *tensors[8:])
        ctx.num_records = len(record)
        ctx.seeds_f, ctx.seeds_g = seeds_f, seeds_g
        ctx.leaves = tensors[8 + len(f.sides) + len(g.sides) :]
        ctx.mark_non_differentiable(low_y1, low_y2)
        ctx.set_materialize_grads(False)
        return y1, y2, low_y1, low_y2, *(c.view_as(c) for c in channel)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d1: Tensor | None, d2: Tensor | None, _1: None, _2: None, *pair: Tensor
    ) -> tuple[Tensor | None, ...]:
        assert all(tensor is not None for tensor in pair), "a reversible chain must end in keep() or close_channel()"
        y1, y2, low1, low2 = pair
        record = ctx.saved_tensors[: ctx.num_records]
        d1 = torch.zeros_like(y1) if d1 is None else d1
        d2 = torch.zeros_like(y2) if d2 is None else d2
        # Detached copies, so that the graph of the recomputation ends here and not in the graph that made the sides.
        f, g = (
            replace(branch, sides=tuple(side.detach().requires_grad_(side.requires_grad) for side in branch.sides))
            for branch in (ctx.f, ctx.g)
        )
        parameters = ctx.parameters()
        if len(parameters) != len(ctx.leaves) or any(p is not q for p, q in zip(parameters, ctx.leaves, strict=True)):
            raise RuntimeError(
                "a parameter of a reversible layer was replaced between forward and backward, so the layer cannot be "
                "run again as it was (torch.func.functional_call does that, too); use reversible=False"
            )
        grads = _LeafGradients([*f.sides, *g.sides, *parameters])
        with ctx.before_g.restore(), giving_seeds(ctx.seeds_g):
            x2, low2, d1 = _undo(g, None, at=y1, out=y2, low=low2, d_at=d1, d_out=d2, grads=grads)
        with ctx.before_f.restore(), giving_seeds(ctx.seeds_f):
            x1, low1, d2 = _undo(f, record, at=x2, out=y1, low=low1, d_at=d2, d_out=d1, grads=grads)
        return None, None, None, d1, d2, None, None, *_as_ours(x1, x2, low1, low2), *grads.sums


@contextlib.contextmanager
def _without_hooks(leaves: list[Tensor]) -> Iterator[None]:
    """Silence the tensors' own hooks: they are for the whole gradient, which autograd shows them afterwards."""
    hooked = [(leaf._backward_hooks, dict(leaf._backward_hooks)) for leaf in leaves if leaf._backward_hooks]
    for hooks, _ in hooked:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in hooked:
            hooks.update(kept)


class _LeafGradients:
    """The sums of the gradients of a block's leaves over its branches and their pieces.

    Their memory is taken before the recomputation begins. A gradient outlives the block; one that was allocated among
    the recomputation's large temporaries would keep the hole that they leave from being used whole again, and the
    heap would grow by the temporaries' size in every layer.
    """

    def __init__(self, leaves: list[Tensor]) -> None:
        self._buffers = [torch.empty_like(leaf) if leaf.requires_grad else None for leaf in leaves]
        self._touched = [False] * len(leaves)
        self._wanted = [(index, leaf) for index, leaf in enumerate(leaves) if leaf.requires_grad]

    @property
    def sums(self) -> list[Tensor | None]:
        """One gradient per leaf, None where nothing led to it."""
        return [buffer if touched else None for buffer, touched in zip(self._buffers, self._touched, strict=True)]

    def through(self, out: GradientEdge, x: Tensor, d_out: Tensor) -> Tensor | None:
        """Add the gradients of the leaves under ``out`` and return the gradient of ``x``."""
        leaves = [leaf for _, leaf in self._wanted]
        with _without_hooks(leaves):
            d_x, *d_leaves = torch.autograd.grad([out], [x, *leaves], [d_out], allow_unused=True)
        for (index, _), d_leaf in zip(self._wanted, d_leaves, strict=True):
            buffer = self._buffers[index]
            if d_leaf is not None and buffer is not None:
                if self._touched[index]:
                    buffer.add_(d_leaf)
                else:
                    buffer.copy_(d_leaf)
                self._touched[index] = True
        return d_x


def _as_ours(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Mark tensors that only the block below will see, and may write over."""
    for tensor in tensors:
        tensor._ours = True  # type: ignore[attr-defined]
    return tensors


def _undo(
    branch: Branch,
    record: Record | None,
    *,
    at: Tensor,
    out: Tensor,
    low: Tensor,
    d_at: Tensor,
    d_out: Tensor,
    grads: _LeafGradients,
) -> tuple[Tensor, Tensor, Tensor]:
    """Undo ``out = in + branch(at)``: return ``in``, its low part and the gradient of ``at``, ``d_at`` included."""
    undone, undone_low = (t if getattr(t, "_ours", False) else lasting_like(t) for t in (out, low))
    d_undone = lasting_like(d_at)
    pieces = (branch.split(tensor) for tensor in (at, out, low, d_at, d_out, undone, undone_low, d_undone))
    for at_, out_, low_, d_at_, d_out_, undone_, undone_low_, d_undone_ in zip(*pieces, strict=True):
        with torch.enable_grad():
            leaf = at_.detach().requires_grad_()
            value, _ = branch.run(leaf, record, *branch.sides)
        room = (undone_, undone_low_)
        add_in_pieces(out_, low_, value.detach(), negated=True, out=room, fused=branch.addition)
        # The graph is entered by its last edge, so that the value itself, not needed again, is gone by then.
        edge, dtype = get_gradient_edge(value) if value.requires_grad else None, value.dtype
        del value
        d_leaf = None if edge is None else grads.through(edge, leaf, d_out_.to(dtype))
        if d_leaf is None:
            d_undone_.copy_(d_at_)
        else:
            torch.add(d_at_, d_leaf, out=d_undone_)
    return undone, undone_low, d_undone


def _channel_for(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return zeros with the tensors' shapes and dtypes that take one number of memory each."""
    return tuple(tensor.new_zeros(()).expand(tensor.shape) for tensor in tensors)


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
        return d1, d2, None, None, *ctx.saved_tensors


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
        begin_walk()
        both, low1, low2 = ctx.saved_tensors
        # Copies, so that what is stored is free while the chain is walked back.
        pair = [lasting_like(tensor).copy_(tensor) for tensor in (*both.chunk(2, dim=-1), low1, low2)]
        return *d_both.chunk(2, dim=-1), None, None, *_as_ours(*pair)


def open_channel(streams: Streams) -> Streams:
    """Start a reversible chain at ``streams``, which must have low parts."""
    assert streams.low1 is not None and streams.low2 is not None, "start(x, exact=True) comes first"
    begin_walk()
    token = torch.zeros((), device=streams.x1.device, requires_grad=True)
    x1, x2, *channel = _Open.apply(*streams[:4], token)
    return Streams(x1, x2, streams.low1, streams.low2, tuple(channel))


def reversible_block(f: Branch, g: Branch, streams: Streams, parameters: Callable[[], list[Tensor]]) -> Streams:
    """Return ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``, storing neither x nor anything inside f and g.

    ``parameters`` lists, at any time in the same order, the tensors inside f and g that may want gradients. The
    block keeps only f's record, the random states before f and g, and autocast's settings, and replays all of them.
    """
    assert streams.channel is not None, "open_channel() comes first"
    y1, y2, low1, low2, *channel = _Block.apply(
        f, g, parameters, *streams[:4], *streams.channel, *f.sides, *g.sides, *parameters()
    )
    return Streams(y1, y2, low1, low2, tuple(channel))


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
    return Streams(y1, y2, streams.low1, streams.low2, tuple(channel))


def close_channel(streams: Streams) -> Tensor:
    """End a chain: return ``[y1 ; y2]``, concatenated along the last dimension."""
    assert streams.channel is not None, "open_channel() comes first"
    both: Tensor = _Close.apply(*streams[:4], *streams.channel)
    end_walk()
    return both
