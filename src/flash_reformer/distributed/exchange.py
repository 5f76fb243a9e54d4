"""A call whose positions are spread over ranks, which trade them for heads to attend (DeepSpeed-Ulysses, 2023).

Attention needs all positions of a head, everything else all features of a position. So each rank has an equal share of
the positions, in order, and where attention comes, ranks trade: a rank gives away all heads but its own, and gets all
positions of these. Positions that fill up the last shares are cut off before anything attends.

Letters: B batch, T positions, L positions of a rank, H heads, h heads of a rank, P ranks, X anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from flash_reformer.distributed.collectives import Add, Gather, Mine, Trade, add
from flash_reformer.functional import derive_seed
from flash_reformer.layers.exchange import Exchange


class SequenceExchange(Exchange):
    """One call of ``length`` positions on the ranks of a group."""

    shares = True

    def __init__(self, group: ProcessGroup, length: int) -> None:
        self.group = group
        self.length = length
        self.share = -(-length // group.size())
        self._seed: Tensor | None = None

    def _parts(self, x_BTX: Tensor, fill: float) -> Tensor:
        """Return every rank's positions, ``[P, B, L, ...]``."""
        missing = self.share * self.group.size() - x_BTX.shape[1]
        if missing:
            x_BTX = torch.nn.functional.pad(x_BTX, (0, 0) * (x_BTX.dim() - 2) + (0, missing), value=fill)
        return x_BTX.unflatten(1, (self.group.size(), self.share)).movedim(1, 0)

    def _together(self, x_PBLX: Tensor) -> Tensor:
        """Return ``[B, T, ...]``."""
        return x_PBLX.movedim(0, 1).flatten(1, 2)[:, : self.length]

    def my_positions(self, x_BTX: Tensor, fill: float) -> Tensor:
        parts_PBLX = self._parts(x_BTX, fill)
        if x_BTX.requires_grad:
            return Mine.apply(parts_PBLX, self.group)
        return parts_PBLX[self.group.rank()].clone()

    def my_heads(self, x_HX: Tensor) -> Tensor:
        parts_PhX = x_HX.unflatten(0, (self.group.size(), -1))
        return Mine.apply(parts_PhX, self.group) if x_HX.requires_grad else parts_PhX[self.group.rank()]

    def to_heads(self, x_BLHX: Tensor) -> Tensor:
        by_owner_PBLhX = x_BLHX.unflatten(2, (self.group.size(), -1)).movedim(2, 0)
        return self._together(Trade.apply(by_owner_PBLhX, self.group))

    def to_positions(self, x_BThX: Tensor) -> Tensor:
        by_head_PBLhX = Trade.apply(self._parts(x_BThX, 0.0), self.group)
        return by_head_PBLhX.movedim(0, 2).flatten(2, 3)

    def whole(self, x_BLX: Tensor) -> Tensor:
        return self._together(Gather.apply(x_BLX, self.group))

    def all_heads(self, x_BhX: Tensor) -> Tensor:
        return Gather.apply(x_BhX, self.group).movedim(0, 1).flatten(1, 2)

    def each(self, x_X: Tensor) -> Tensor:
        return Gather.apply(x_X, self.group)

    def total(self, x_X: Tensor) -> Tensor:
        return Add.apply(x_X, self.group)

    def agree(self, seed: Tensor | None) -> Tensor | None:
        if seed is not None:
            # A sum to which one rank gives a number, and the others nothing.
            seed = add(seed if self.group.rank() == 0 else torch.zeros_like(seed), self.group)
        self._seed = seed
        return seed

    def seeds(self, seeds_LX: Tensor | None) -> Tensor | None:
        if seeds_LX is None:
            return None
        rotations_L1, dropouts_L1 = seeds_LX.split(1, dim=1)
        return torch.cat([rotations_L1, derive_seed(dropouts_L1, self.group.rank())], dim=1)

    def apart(self) -> contextlib.AbstractContextManager[None]:
        return self._drawing(1 + self.group.rank())

    def alike(self) -> contextlib.AbstractContextManager[None]:
        return self._drawing(0)

    @contextlib.contextmanager
    def _drawing(self, branch: int) -> Iterator[None]:
        """Let the default generators start from the call's seed and ``branch``; afterwards they are as before."""
        if self._seed is None:
            yield
            return
        # Other branches than those of the layers, which are counted from 0.
        number = int(derive_seed(self._seed, 2**31 + branch))
        device = self._seed.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.default_generator.manual_seed(number)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(number)
            yield
