"""Judges that owe nothing to reversible layers: finite differences, and what a backward rebuilds against what was.

``benchmarks/gradients.py`` prints what the tests of this room assert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from flash_reformer import functional
from tests.layers.tools import Gradients, loss_of, take_step

SPAN = 1e-4


class Buckets:
    """The hash buckets of one forward, to be used again in others.

    Buckets jump, so the gradient through them is that of the piece at hand. Differences must stay on that piece.
    """

    def __init__(self) -> None:
        self.of_layers: list[Tensor] = []

    @contextmanager
    def _patched(self, hash_vectors: Any) -> Iterator[None]:
        with mock.patch.object(functional, "hash_vectors", hash_vectors):
            yield

    def record(self) -> Any:
        """Within this context layers hash as ever, and their buckets are kept."""
        original = functional.hash_vectors

        def hash_vectors(*args: Any, **kwargs: Any) -> Tensor:
            self.of_layers.append(original(*args, **kwargs))
            return self.of_layers[-1]

        return self._patched(hash_vectors)

    def replay(self) -> Any:
        """Within this context the layers of one forward get the kept buckets, in order."""
        following = iter(self.of_layers)
        return self._patched(lambda *args, **kwargs: next(following))


@torch.no_grad()
def slope(model: nn.Module, parameter: Tensor, direction: Tensor, buckets: Buckets, seed: int, **inputs: Any) -> float:
    """The derivative of the loss along ``direction``, by central differences, to fourth order in ``SPAN``."""
    middle, total = parameter.clone(), 0.0
    for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        parameter.copy_(middle + steps * SPAN * direction)
        torch.manual_seed(seed)
        with buckets.replay():
            total += weight * loss_of(model, **inputs).item()
    parameter.copy_(middle)
    return total / (12 * SPAN)


def slopes(model: nn.Module, seed: int = 7, **inputs: Any) -> tuple[Gradients, dict[str, tuple[Tensor, float]]]:
    """Return the gradients, and for each parameter a random direction with the loss's slope along it."""
    buckets = Buckets()
    with buckets.record():
        grads = take_step(model, seed, **inputs).grads
    generator = torch.Generator().manual_seed(3)
    judged = {}
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        judged[name] = direction, slope(model, parameter, direction, buckets, seed, **inputs)
    return grads, judged


def rebuilt(
    model: nn.Module, loss: Callable[..., Tensor] = loss_of, **inputs: Any
) -> list[list[tuple[Tensor, Tensor]]]:
    """Return, per layer from the bottom, the inputs of attention and feed-forward: as they were, and as rebuilt.

    Attention reads the second stream of the block's input. Feed-forward reads the first stream of its output, which
    is the next block's first input. So together they are every block's input.
    """
    seen: list[tuple[list[Tensor], list[Tensor]]] = []
    hooks = []
    for layer in model.reformer.encoder.layers:
        pair: tuple[list[Tensor], list[Tensor]] = ([], [])
        for module, inputs_seen in zip((layer.attention, layer.feed_forward), pair, strict=True):

            def note(module: nn.Module, args: Any, named: Any, inputs_seen: list[Tensor] = inputs_seen) -> None:
                # transformers' layers, which benchmarks put here, too, give theirs by name.
                inputs_seen.append((args[0] if args else named["hidden_states"]).detach().clone())

            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
        seen.append(pair)
    take_step(model, loss=loss, **inputs)
    for hook in hooks:
        hook.remove()
    return [[(first, again) for first, again in pair] for pair in seen]


def rebuild_errors(model: nn.Module, loss: Callable[..., Tensor] = loss_of, **inputs: Any) -> list[tuple[float, float]]:
    """Return the relative errors of what :func:`rebuilt` returns, per layer: attention's input, feed-forward's."""
    errors = []
    for pair in rebuilt(model, loss, **inputs):
        found = []
        for first, again in pair:
            assert first.norm() > 0
            found.append(((first - again).double().norm() / first.double().norm()).item())
        errors.append((found[0], found[1]))
    return errors
