"""The branches of reversible blocks: run once, run again, and taken back out of a stream.

A branch is a function whose output a block adds to a stream. Going back, the function is run again at the same point in
the same surroundings, its output is taken out of the stream, and the gradient goes through that second run. Long inputs
go through a branch in pieces, so that its temporaries exist for one piece at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from flash_reformer.buffers import lasting, lasting_like
from flash_reformer.residual import add_in_pieces
from flash_reformer.seeds import giving_seeds, is_capturing, keeping_seeds

#: What a branch decided in its forward and must not decide again in its recomputation (hash buckets, say).
Record = tuple[Tensor, ...]


@dataclass(frozen=True)
class Parts:
    """A branch taken apart where positions meet: only ``mix`` needs all of them at once.

    ``enter(x)`` returns tensors ``[B, t, ...]``, ``mix(entered, record, *sides)`` one of them and the record, and
    ``leave(mixed)`` the branch's output. Entering and leaving act on each position alone.
    """

    enter: Callable[[Tensor], tuple[Tensor, ...]]
    mix: Callable[..., tuple[Tensor, Record]]
    leave: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block.

    ``run(x, record, *sides)`` returns the branch's output and its record. The first call gets ``record=None``;
    a recomputation gets what the first one returned. ``sides`` are further tensors that may want gradients.

    With ``chunk_size`` that many positions (dim 1) go at a time, forward and backward, so that only one chunk's
    activations exist: through all of ``run`` where it acts on each position alone (it must return an empty record
    then), or else through what its ``parts`` say does.
    ``addition`` may be a kernel that adds the output to a stream in one pass.
    """

    run: Callable[..., tuple[Tensor, Record]]
    sides: tuple[Tensor, ...] = ()
    chunk_size: int = 0
    addition: Callable[..., None] | None = None
    parts: Parts | None = None

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """Return the views of ``x`` that go one at a time."""
        return x.split(self.chunk_size, dim=1) if self.chunk_size else (x,)

    def enter(self, parts: Parts, x: Tensor, *, private: bool = True) -> list[Tensor]:
        """Return what :attr:`parts` make of all of ``x`` before positions meet; of copies, unless ``private``."""
        return _joined((parts.enter(piece if private else piece.clone()) for piece in self.split(x)), x.shape[1])

    def values(self, x: Tensor) -> tuple[Iterator[Tensor], Record]:
        """Run the branch on ``x`` for the first time: return its output piece by piece, and its record."""
        if self.chunk_size and self.parts is not None:
            mixed, record = self.parts.mix(self.enter(self.parts, x), None, *self.sides)
            return map(self.parts.leave, self.split(mixed)), record
        if self.chunk_size:
            return (self.run(piece, None, *self.sides)[0] for piece in self.split(x)), ()
        value, record = self.run(x, None, *self.sides)
        return iter((value,)), record

    def __call__(self, x: Tensor) -> tuple[Tensor, Record]:
        """Run the branch on all of ``x`` for the first time."""
        values, record = self.values(x)
        pieces = list(values)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1), record


def _joined(pieces: Iterable[tuple[Tensor, ...]], length: int) -> list[Tensor]:
    """Lay pieces end to end; without gradients each is gone before the next one comes."""
    if torch.is_grad_enabled():
        return [torch.cat(each, dim=1) for each in zip(*pieces, strict=True)]
    joined: list[Tensor] = []
    start = 0
    for piece in pieces:
        if not joined:
            joined = [lasting((part.shape[0], length, *part.shape[2:]), part) for part in piece]
        stop = start + piece[0].shape[1]
        for whole, part in zip(joined, piece, strict=True):
            whole[:, start:stop] = part
        start = stop
    return joined


class Surroundings(NamedTuple):
    """What a branch reads besides its arguments: random states, seeds and autocast. All are restored to replay it."""

    cpu_rng: Tensor
    device: torch.device
    device_rng: Tensor | None
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    seeds: list[Tensor]

    @staticmethod
    def capture(device: torch.device) -> Surroundings:
        """Take down how things stand."""
        cuda = device.type == "cuda"
        kinds = {"cpu", device.type}
        return Surroundings(
            torch.get_rng_state(),
            device,
            torch.cuda.get_rng_state(device) if cuda and not is_capturing(device) else None,
            tuple((kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in sorted(kinds)),
            [],
        )

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Run in these surroundings for the first time."""
        with self.autocasting(), keeping_seeds(self.device) as seeds:
            yield
        self.seeds.extend(seeds)

    @contextlib.contextmanager
    def restore(self) -> Iterator[None]:
        """Replay in these surroundings; the caller's random states come back untouched."""
        outer = Surroundings.capture(self.device)
        self._set_rng()
        try:
            with self.autocasting(), giving_seeds(self.seeds):
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


def _room_for_sum(leaf: Tensor, *, wide: bool) -> Tensor:
    return torch.empty_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32) if wide else leaf.dtype)


class LeafGradients:
    """The sums of the gradients of a block's leaves over its branches and their pieces.

    Their memory is taken before the recomputation begins. A gradient outlives the block; one that was allocated among
    the recomputation's large temporaries would keep the hole that they leave from being used whole again, and the
    heap would grow by the temporaries' size in every layer.

    ``in_pieces`` tells that a leaf gets many gradients. In half precision the later ones would be lost to rounding, so
    they are added up in fp32.
    """

    def __init__(self, leaves: list[Tensor], *, in_pieces: bool) -> None:
        self._dtypes = [leaf.dtype for leaf in leaves]
        self._buffers = [_room_for_sum(leaf, wide=in_pieces) if leaf.requires_grad else None for leaf in leaves]
        self._touched = [False] * len(leaves)
        self._wanted = [(index, leaf) for index, leaf in enumerate(leaves) if leaf.requires_grad]

    @property
    def sums(self) -> list[Tensor | None]:
        """One gradient per leaf, None where nothing led to it."""
        sums: list[Tensor | None] = []
        for buffer, touched, dtype in zip(self._buffers, self._touched, self._dtypes, strict=True):
            sums.append(buffer.to(dtype) if touched and buffer is not None else None)
        return sums

    def through(
        self, outs: Sequence[GradientEdge], inputs: Sequence[Tensor], d_outs: Sequence[Tensor]
    ) -> Sequence[Tensor | None]:
        """Add the gradients of the leaves under ``outs`` and return those of the inputs."""
        if not outs:
            return [None] * len(inputs)
        leaves = [leaf for _, leaf in self._wanted]
        with _without_hooks(leaves):
            found = torch.autograd.grad(list(outs), [*inputs, *leaves], list(d_outs), allow_unused=True)
        for (index, _), d_leaf in zip(self._wanted, found[len(inputs) :], strict=True):
            buffer = self._buffers[index]
            if d_leaf is not None and buffer is not None:
                if self._touched[index]:
                    buffer.add_(d_leaf)
                else:
                    buffer.copy_(d_leaf)
                self._touched[index] = True
        return found[: len(inputs)]


def as_ours(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Mark tensors that only the block that gets them next will see, and may write over."""
    for tensor in tensors:
        tensor._ours = True  # type: ignore[attr-defined]
    return tensors


def is_ours(tensor: Tensor) -> bool:
    """Whether a tensor may be written over."""
    return getattr(tensor, "_ours", False)


def same_memory(tensor: Tensor) -> Tensor:
    """Return a new tensor in the memory of one that nobody will read again: autograd sees no connection."""
    return tensor.new_empty(0).set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def advance(branch: Branch, *, at: Tensor, x: Tensor, low: Tensor, reuse: bool) -> tuple[Tensor, Tensor, Record]:
    """Return ``x + branch(at)``, its low part and the branch's record; ``reuse`` writes them where x and low were."""
    result, lost = (same_memory(t) if reuse else lasting_like(t) for t in (x, low))
    values, record = branch.values(at)
    start = 0
    for value in values:
        stop = start + value.shape[1]
        x_, low_, result_, lost_ = (tensor[:, start:stop] for tensor in (x, low, result, lost))
        add_in_pieces(x_, low_, value, out=(result_, lost_), fused=branch.addition)
        start = stop
        del value
    return result, lost, record


@dataclass(frozen=True)
class Undoing:
    """What is known when ``out = in + branch(at)`` is to be undone; ``d_`` are gradients.

    Unless this is ``private``, somebody may keep what the branch is shown, which must not be written over then.
    """

    at: Tensor
    out: Tensor
    low: Tensor
    d_at: Tensor
    d_out: Tensor
    private: bool

    def leaf(self, x: Tensor) -> Tensor:
        """Return the leaf of the graph of a part of ``at``."""
        return (x.detach() if self.private else x.clone()).requires_grad_()


def undo(
    branch: Branch, record: Record | None, before: Surroundings, known: Undoing, grads: LeafGradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Undo ``out = in + branch(at)``: return ``in``, its low part and the gradient of ``at``, ``d_at`` included.

    They lie where ``out``, ``low`` and ``d_at`` did, if those are :func:`is_ours`.
    """
    room = [tensor if is_ours(tensor) else lasting_like(tensor) for tensor in (known.out, known.low, known.d_at)]
    if branch.chunk_size and branch.parts is not None:
        _undo_parts(branch, branch.parts, record, before, known, room, grads)
        return room[0], room[1], room[2]
    with before.restore():
        tensors = (known.at, known.out, known.low, known.d_at, known.d_out, *room)
        for at, out, low, d_at, d_out, undone, undone_low, d_undone in zip(*map(branch.split, tensors), strict=True):
            with torch.enable_grad():
                leaf = known.leaf(at)
                value, _ = branch.run(leaf, record, *branch.sides)
            edge = _take_out(branch, value, out, low, undone, undone_low)
            dtype = value.dtype
            del value
            (d_leaf,) = grads.through(edge, [leaf], [d_out.to(dtype)])
            _add_up(d_at, d_leaf, d_undone)
    return room[0], room[1], room[2]


def _take_out(
    branch: Branch, value: Tensor, out: Tensor, low: Tensor, undone: Tensor, undone_low: Tensor
) -> list[GradientEdge]:
    """Take a value out of a stream. Return the last edge of its graph, by which the gradient enters it.

    So the value itself, not needed again, can be gone by then. No edge where nothing wants a gradient.
    """
    add_in_pieces(out, low, value.detach(), negated=True, out=(undone, undone_low), fused=branch.addition)
    return [get_gradient_edge(value)] if value.requires_grad else []


def _add_up(d_at: Tensor, d_leaf: Tensor | None, room: Tensor) -> None:
    if d_leaf is not None:
        torch.add(d_at, d_leaf, out=room)
    elif room is not d_at:
        room.copy_(d_at)


def _undo_parts(
    branch: Branch,
    parts: Parts,
    record: Record | None,
    before: Surroundings,
    known: Undoing,
    room: Sequence[Tensor],
    grads: LeafGradients,
) -> None:
    """Undo a branch whose positions meet: enter in pieces, mix, leave in pieces; then back through each."""
    undone, undone_low, d_undone = room
    with before.restore():
        with torch.no_grad():
            entered = [tensor.requires_grad_() for tensor in branch.enter(parts, known.at, private=known.private)]
        with torch.enable_grad():
            mixed, _ = parts.mix(entered, record, *branch.sides)
        mixed_edge, mixed = [get_gradient_edge(mixed)], mixed.detach()
        d_mixed = lasting_like(mixed)
        tensors = (mixed, known.out, known.low, known.d_out, undone, undone_low, d_mixed)
        for mixed_, out_, low_, d_out_, undone_, undone_low_, d_mixed_ in zip(*map(branch.split, tensors), strict=True):
            with torch.enable_grad():
                leaf = mixed_.detach().requires_grad_()
                value = parts.leave(leaf)
            edge = _take_out(branch, value, out_, low_, undone_, undone_low_)
            (d_leaf,) = grads.through(edge, [leaf], [d_out_.to(value.dtype)])
            d_mixed_.copy_(d_leaf) if d_leaf is not None else d_mixed_.zero_()
    # A graph that was walked still leads to its leaf, and that to all of what was mixed.
    del mixed, mixed_, tensors, leaf, value, edge, d_leaf
    d_entered = list(grads.through(mixed_edge, entered, [d_mixed]))
    del entered, mixed_edge, d_mixed, d_mixed_
    wanted = [index for index, d_part in enumerate(d_entered) if d_part is not None]
    # The first of what was drawn is drawn again.
    with before.restore():
        pieces = (branch.split(tensor) for tensor in (known.at, known.d_at, d_undone))
        d_pieces = zip(*(branch.split(d_entered[index]) for index in wanted), strict=True)  # type: ignore[arg-type]
        for at_, d_at_, d_undone_, d_parts in zip(*pieces, d_pieces, strict=True):
            with torch.enable_grad():
                leaf = known.leaf(at_)
                again = parts.enter(leaf)
            edges = [get_gradient_edge(again[index]) for index in wanted]
            (d_leaf,) = grads.through(edges, [leaf], d_parts)
            _add_up(d_at_, d_leaf, d_undone_)
