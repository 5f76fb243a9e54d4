"""Seeds of dropouts, and what becomes of them where a CUDA graph is captured.

A recomputation repeats its forward because the states of the generators are set back. A graph that is being captured
lets nobody read or set them; there the seeds themselves are kept, and handed out again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class _Draws(threading.local):
    """Where seeds go to while a captured forward runs, and where they come from while it is replayed."""

    into: list[Tensor] | None = None
    out_of: Iterator[Tensor] | None = None


_DRAWS = _Draws()


def is_capturing(device: torch.device) -> bool:
    """Whether a graph is being captured on this device: then the states of generators cannot be read or set."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def draw_seed(device: torch.device) -> Tensor:
    """Return a seed from the device's default generator; inside of a replay, the one that the forward drew.

    Random states are restored for a replay, which does it. Only where a graph is captured are seeds kept instead.
    """
    if _DRAWS.out_of is not None:
        return next(_DRAWS.out_of)
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if _DRAWS.into is not None:
        _DRAWS.into.append(seed)
    return seed


@contextlib.contextmanager
def keeping_seeds(device: torch.device) -> Iterator[list[Tensor]]:
    """Collect the seeds that are drawn inside, if a graph is being captured."""
    seeds: list[Tensor] = []
    before = _DRAWS.into
    _DRAWS.into = seeds if is_capturing(device) else before
    try:
        yield seeds
    finally:
        _DRAWS.into = before


@contextlib.contextmanager
def giving_seeds(seeds: Sequence[Tensor]) -> Iterator[None]:
    """Give out these seeds, in order, if any were kept."""
    before = _DRAWS.out_of
    _DRAWS.out_of = iter(seeds) if seeds else before
    try:
        yield
    finally:
        _DRAWS.out_of = before
