"""What one forward call knows and every layer needs. It travels as an argument; nothing of it lives on a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flash_reformer.layers.exchange import ALONE, Exchange

if TYPE_CHECKING:
    from flash_reformer.layers.decode_storage import Fill


@dataclass(frozen=True)
class Call:
    """The facts of one forward call. Seeds are int64 tensors: of calls on a GPU there, so that nobody waits for them.

    Attributes:
        mask_BT: bool, True at real tokens; None where all are real.
        num_hashes: hash rounds of the LSH layers.
        bucket_factors: factors of the bucket count, their product the number of buckets.
        rotation_seed: the seed that every LSH layer uses as it is (``config.hash_seed``); None derives one per layer.
        seeds_LX: seeds of every layer's rotations and attention dropout, ``[layers, 2]``; None where none are needed.
        exact: every layer attends exactly, whatever its chunk length.
        backend: which implementation of the operations to use.
        deterministic: whether gradients must not depend on the order in which a device adds.
        fill: where keys and values go if this forward fills a decoding cache.
        exchange: where positions and heads are, of this rank and of others. Masks are of all positions.
    """

    mask_BT: Tensor | None
    num_hashes: int
    bucket_factors: tuple[int, ...]
    rotation_seed: Tensor | None
    seeds_LX: Tensor | None
    exact: bool
    backend: str
    deterministic: bool = True
    fill: Fill | None = None
    exchange: Exchange = ALONE

    def seed_for_rotations(self, layer_idx: int) -> Tensor:
        """Return the seed of layer ``layer_idx``'s hash rotations."""
        if self.rotation_seed is not None:
            return self.rotation_seed
        assert self.seeds_LX is not None, "a call without hash_seed draws a seed"
        return self.seeds_LX[layer_idx, 0]

    def dropout(self, p: float, layer_idx: int, training: bool) -> dict[str, Any]:
        """Return the arguments that switch layer ``layer_idx``'s attention dropout on, or off outside training."""
        if not training or p == 0.0:
            return {"dropout_p": 0.0, "dropout_seed": None}
        assert self.seeds_LX is not None, "a call in training draws a seed"
        return {"dropout_p": p, "dropout_seed": self.seeds_LX[layer_idx, 1]}
