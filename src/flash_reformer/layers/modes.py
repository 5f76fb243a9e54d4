"""Modes (train or eval) of modules that are run again: after a forward somebody may call ``eval()``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

Modes = list[tuple[nn.Module, bool]]


def modes_of(*roots: nn.Module) -> Modes:
    """Return the modes of these modules and of all inside them."""
    return [(module, module.training) for root in roots for module in root.modules()]


@contextlib.contextmanager
def in_modes(modes: Modes) -> Iterator[None]:
    """Put modules into these modes, and back."""
    changed = [(module, module.training, training) for module, training in modes if module.training != training]
    for module, _, training in changed:
        module.training = training
    try:
        yield
    finally:
        for module, before, _ in changed:
            module.training = before
