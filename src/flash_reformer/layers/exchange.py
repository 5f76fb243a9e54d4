"""Where the positions and heads of a call are: here a process by itself, which has all of them.

``distributed`` has the other kind, where ranks hold some positions each and trade them for heads to attend. Layers and
models ask in both cases, so neither knows which it is.

Letters: B batch, T positions, L positions of a rank, H heads, h heads of a rank, L of seeds: layers, X anything.
"""

from __future__ import annotations

import contextlib

from torch import Tensor, nn


class Exchange:
    """One call's exchange. This one moves nothing, and returns the very tensors that it is given."""

    #: Whether positions are spread over ranks.
    shares = False

    def my_positions(self, x_BTX: Tensor, fill: float) -> Tensor:
        """Return the positions ``[B, L, ...]`` of this rank; ``fill`` stands where there are none."""
        return x_BTX

    def my_heads(self, x_HX: Tensor) -> Tensor:
        """Return the heads ``[h, ...]`` of this rank."""
        return x_HX

    def to_heads(self, x_BLHX: Tensor) -> Tensor:
        """Give away heads for positions: return ``[B, T, h, ...]``."""
        return x_BLHX

    def to_positions(self, x_BThX: Tensor) -> Tensor:
        """Give away positions for heads: return ``[B, L, H, ...]``."""
        return x_BThX

    def whole(self, x_BLX: Tensor) -> Tensor:
        """Return all positions ``[B, T, ...]``, on every rank."""
        return x_BLX

    def all_heads(self, x_BhX: Tensor) -> Tensor:
        """Return all heads ``[B, H, ...]``, on every rank."""
        return x_BhX

    def each(self, x_X: Tensor) -> Tensor:
        """Return what every rank has, ``[ranks, ...]``, on every rank."""
        return x_X.unsqueeze(0)

    def total(self, x_X: Tensor) -> Tensor:
        """Return the sum over ranks, on every rank."""
        return x_X

    def agree(self, seed: Tensor | None) -> Tensor | None:
        """Return the seed that one rank has drawn for this call, the root of all ranks' randomness."""
        return seed

    def seeds(self, seeds_LX: Tensor | None) -> Tensor | None:
        """Return seeds of rotations, the same on every rank, and of dropouts, other ones; ``[layers, 2]``."""
        return seeds_LX

    def apart(self) -> contextlib.AbstractContextManager[None]:
        """Draw other numbers from the default generator than other ranks do, and leave it as it was."""
        return contextlib.nullcontext()

    def alike(self) -> contextlib.AbstractContextManager[None]:
        """Draw the same numbers from the default generator as other ranks do, and leave it as it was."""
        return contextlib.nullcontext()


#: What a call is given that is not spread over ranks.
ALONE = Exchange()


class Ranks:
    """Whom a model shares its sequences with. This one is a process by itself."""

    def exchange(self, length: int) -> Exchange:
        """Return the exchange of a call of so many positions, chunks filled up."""
        return ALONE

    def check_same(self, given: Tensor, **facts: int) -> None:
        """Raise ``ValueError`` unless all ranks have the same batch and ask the same of it."""

    def watch(self, module: nn.Module, *_: object) -> None:
        """See to it that gradients of a module's parameters become those of all ranks."""


#: Whom a model shares its sequences with unless it is told to.
BY_ITSELF = Ranks()


class SharesSequences:
    """A model whose positions can be spread over ranks; :mod:`flash_reformer.distributed` sets ``ranks``."""

    ranks: Ranks = BY_ITSELF
