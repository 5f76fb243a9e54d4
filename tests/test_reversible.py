"""The reversible chain by itself, with branches that know nothing of attention."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flash_reformer import reversible
from flash_reformer.reversible import Branch, Record, Streams, close_channel, keep, open_channel, plain_block, start

B, T, E = 2, 7, 5


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Layer:
    """Two branches with a weight each. F mixes positions, reads a side and decides something at random once.

    That draw is private: one from the default generator would shift the dropout masks of a replay (FAULTS F1).
    """

    def __init__(
        self, seed: int, dtype: torch.dtype = torch.float64, dropout: float = 0.2, chunk_size: int = 0
    ) -> None:
        self.weights = [(randn(E, E, seed=2 * seed + i) * 0.7).to(dtype).requires_grad_() for i in range(2)]
        self.seed, self.dropout, self.chunk_size = seed, dropout, chunk_size
        self.decisions = 0

    def f(self, x: Tensor, record: Record | None, *sides: Tensor) -> tuple[Tensor, Record]:
        if record is None:
            self.decisions += 1
            record = (torch.randperm(T, generator=torch.Generator().manual_seed(self.seed)),)
        mixed = x + x[:, record[0]]
        out = torch.nn.functional.dropout(torch.tanh(mixed @ self.weights[0]), self.dropout)
        return out * (1 + sum(sides)) if sides else out, record

    def g(self, x: Tensor, record: Record | None) -> tuple[Tensor, Record]:
        return torch.nn.functional.dropout(torch.sin(x @ self.weights[1]), self.dropout), ()

    def branches(self, side: Tensor | None = None) -> tuple[Branch, Branch]:
        return Branch(self.f, () if side is None else (side,)), Branch(self.g, chunk_size=self.chunk_size)

    def __call__(self, streams: Streams, side: Tensor | None = None) -> Streams:
        if streams.channel is None:
            return plain_block(*self.branches(side), streams)[0]
        return reversible.reversible_block(*self.branches(side), streams, lambda: self.weights)


def run_chain(layers: list[Layer], x: Tensor, *, exact_inverse: bool, side: Tensor | None = None) -> Tensor:
    streams = start(x, exact=True)
    streams = open_channel(streams) if exact_inverse else streams
    for layer in layers:
        streams = layer(streams, side)
    return close_channel(streams) if exact_inverse else torch.cat(streams[:2], dim=-1)


def gradients_of_chain(layers: list[Layer], x: Tensor, **options: Any) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    out = run_chain(layers, x, **options)
    side = [options["side"]] if options.get("side") is not None else []
    wanted = [x, *side, *(w for layer in layers for w in layer.weights)]
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), wanted))


# --- additions that lose nothing --------------------------------------------------------------------------------------

FLOATS = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


@given(x=FLOATS, low=st.floats(-1.0, 1.0, width=32), value=FLOATS)
def test_the_low_part_is_what_rounding_lost(x: float, low: float, value: float) -> None:
    """High and low part together are the sum to twice the mantissa of fp32."""
    low *= 2**-25 * max(abs(x), 1e-3)
    parts = [torch.tensor(number, dtype=torch.float32) for number in (x, low, value)]
    high, rest = reversible.add(*parts)
    exact = sum(Fraction(part.item()) for part in parts)
    size = max(abs(Fraction(x)), abs(Fraction(value)), Fraction(1, 1000))
    assert abs(Fraction(high.item()) + Fraction(rest.item()) - exact) <= size * Fraction(1, 2**46)
    # The high part alone is the sum as fp32 has it.
    assert abs(Fraction(high.item()) - exact) <= abs(exact) * Fraction(1, 2**23)


def test_without_low_parts_an_addition_is_plain() -> None:
    x, value = randn(T, seed=1), randn(T, seed=2)
    total, low = reversible.add(x, None, value)
    assert torch.equal(total, x + value)
    assert low is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_pass_an_addition_unchanged(dtype: torch.dtype) -> None:
    x, value = (randn(T, seed=seed, dtype=dtype).requires_grad_() for seed in (1, 2))
    total, low = reversible.add(x, torch.zeros_like(x), value)
    assert not low.requires_grad
    gradient = randn(T, seed=3, dtype=dtype)
    for grad in torch.autograd.grad(total, [x, value], gradient):
        assert torch.equal(grad, gradient)


def test_adding_and_taking_away_returns_the_number() -> None:
    """Plain fp32 additions would be off by a rounding error in most entries, and by more at every further step."""
    x = randn(10_000, seed=1, dtype=torch.float32)
    values = [randn(10_000, seed=seed, dtype=torch.float32) * 10 for seed in range(2, 50)]
    high, low, naive = x, torch.zeros_like(x), x
    for value in values:
        high, low = reversible.add(high, low, value)
        naive = naive + value
    for value in reversed(values):
        high, low = reversible.add(high, low, -value)
        naive = naive - value
    assert (high != x).float().mean() < 1e-3
    assert (high - x).abs().max() <= 2**-22 * x.abs().max()
    assert (naive != x).float().mean() > 0.9


# --- the chain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_side", [False, True])
@pytest.mark.parametrize("chunk_size", [0, 1, 3, 7, 50])
def test_a_chain_is_plain_autograd_of_its_blocks(chunk_size: int, with_side: bool) -> None:
    layers = [Layer(seed, chunk_size=chunk_size) for seed in range(4)]
    x = randn(B, T, E, seed=9).requires_grad_()
    side = randn(1, seed=8).requires_grad_() if with_side else None
    out, grads = gradients_of_chain(layers, x, exact_inverse=True, side=side)
    expected_out, expected = gradients_of_chain(layers, x, exact_inverse=False, side=side)
    assert torch.equal(out, expected_out)
    assert len(grads) == 9 + with_side
    for grad, wanted in zip(grads, expected, strict=True):
        assert wanted.norm() > 0
        assert (grad - wanted).norm() <= 1e-12 * wanted.norm()


def test_gradcheck() -> None:
    """Against finite differences of every input and weight, the random state and decisions held."""
    layers = [Layer(seed, chunk_size=2) for seed in range(2)]
    x, side = randn(B, T, E, seed=9).requires_grad_(), randn(1, seed=8).requires_grad_()

    def chain(x: Tensor, side: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(3)
        return run_chain(layers, x, exact_inverse=True, side=side)

    assert torch.autograd.gradcheck(chain, (x, side, *layers[0].weights, *layers[1].weights), fast_mode=True)


def test_decisions_are_made_once() -> None:
    layers = [Layer(seed) for seed in range(3)]
    gradients_of_chain(layers, randn(B, T, E, seed=9).requires_grad_(), exact_inverse=True)
    assert [layer.decisions for layer in layers] == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inputs_of_every_block_come_back_at_depth_24(dtype: torch.dtype) -> None:
    """In fp32 nearly every number comes back to the bit; streams in half precision stay within their rounding."""
    layers = [Layer(seed, dtype) for seed in range(24)]
    seen: list[list[Tensor]] = [[] for _ in layers]
    for layer, inputs in zip(layers, seen, strict=True):
        f, g = layer.f, layer.g

        def watch_f(x: Tensor, *args: Any, f: Callable[..., Any] = f, inputs: list[Tensor] = inputs) -> Any:
            inputs.append(x.detach().clone())
            return f(x, *args)

        def watch_g(x: Tensor, *args: Any, g: Callable[..., Any] = g, inputs: list[Tensor] = inputs) -> Any:
            inputs.append(x.detach().clone())
            return g(x, *args)

        layer.f, layer.g = watch_f, watch_g  # type: ignore[method-assign]
    gradients_of_chain(layers, randn(B, T, E, seed=9, dtype=dtype).requires_grad_(), exact_inverse=True)
    tolerance = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for x2, y1, y1_again, x2_again in seen:
        for first, again in ((x2, x2_again), (y1, y1_again)):
            assert first.norm() > 0
            assert (first - again).double().norm() <= tolerance * first.double().norm()
    if dtype == torch.float32:
        same = torch.cat([(s[0] == s[3]).flatten() for s in seen])
        assert same.double().mean() > 0.999


def test_large_and_small_numbers_in_one_stream() -> None:
    """Values a million times larger than a stream lose nothing of it."""
    layer = Layer(1, torch.float32, dropout=0.0)
    small = layer.f
    layer.f = lambda x, record, *s: (small(x, record)[0] * 1e6, small(x, record)[1])  # type: ignore[method-assign]
    x = randn(B, T, E, seed=9, dtype=torch.float32).requires_grad_()
    streams = layer(open_channel(start(x, exact=True)))
    found: list[Tensor] = []
    streams.channel[0].register_hook(found.append)
    entered = open_channel(start(x, exact=True))
    entered.channel[0].register_hook(found.append)
    record = (torch.arange(T),)
    layer.f = lambda x, _, *s: (small(x, record)[0] * 1e6, record)  # type: ignore[method-assign]
    close_channel(layer(entered)).sum().backward()
    assert (found[-1] - x).norm() <= 1e-6 * x.norm()
    naive = (x + small(x, record)[0] * 1e6) - small(x, record)[0] * 1e6
    assert (naive - x).norm() > 1e-3 * x.norm()


def test_the_channel_takes_no_memory() -> None:
    """Going forward its tensors are single numbers, after every function."""
    layers = [Layer(seed) for seed in range(2)]
    streams = open_channel(start(randn(B, T, E, seed=9), exact=True))
    stages = [streams]
    for layer in layers:
        stages.append(layer(stages[-1]))
    stages.append(keep(stages[-1]))
    for stage in stages:
        assert len(stage.channel) == 4
        for dummy in stage.channel:
            assert dummy.stride() == (0, 0, 0)
            assert dummy.untyped_storage().nbytes() == 8
            assert dummy.shape == (B, T, E)
            assert dummy.requires_grad


def test_a_chain_stores_its_last_pair_and_nothing_else() -> None:
    stored: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def bytes_stored(depth: int) -> int:
        layers = [Layer(seed) for seed in range(depth)]
        weights = {w.untyped_storage().data_ptr() for layer in layers for w in layer.weights}
        stored.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = run_chain(layers, randn(B, T, E, seed=9), exact_inverse=True)
        assert out.requires_grad
        return sum(size for place, size in stored.items() if place not in weights)

    pair, permutation = 4 * B * T * E * 8, T * 8
    assert bytes_stored(3) == pair + 3 * permutation
    assert bytes_stored(12) == pair + 12 * permutation


def test_a_loss_may_enter_at_every_keep() -> None:
    layers = [Layer(seed) for seed in range(4)]
    weights = [w for layer in layers for w in layer.weights]

    def states(exact_inverse: bool) -> list[Tensor]:
        torch.manual_seed(3)
        streams = start(randn(B, T, E, seed=9), exact=True)
        streams = open_channel(streams) if exact_inverse else streams
        found = []
        for layer in layers:
            streams = layer(streams)
            streams = keep(streams) if exact_inverse else streams
            found.append(streams)
        return found

    for chosen in ([0], [2], [3], [1, 3], [0, 1, 2]):
        for stream in (0, 1):
            grads = []
            for exact_inverse in (True, False):
                found = states(exact_inverse)
                loss = sum(found[i][stream].square().sum() for i in chosen)
                grads.append(torch.autograd.grad(loss, weights, allow_unused=True))
            assert sum(wanted is not None for wanted in grads[1]) >= 2 * max(chosen) + 1
            for grad, wanted in zip(*grads, strict=True):
                if wanted is None:
                    assert grad is None or grad.abs().max() == 0
                else:
                    assert wanted.norm() > 0
                    assert (grad - wanted).norm() <= 1e-12 * wanted.norm()


def test_the_order_of_calls_is_checked() -> None:
    x, layer = randn(B, T, E, seed=9), Layer(0)
    with pytest.raises(AssertionError, match="exact=True"):
        open_channel(start(x, exact=False))
    unopened = start(x, exact=True)
    with pytest.raises(AssertionError, match="open_channel"):
        keep(unopened)
    with pytest.raises(AssertionError, match="open_channel"):
        close_channel(unopened)
    with pytest.raises(AssertionError, match="open_channel"):
        reversible.reversible_block(*layer.branches(), unopened, lambda: layer.weights)
    unclosed = layer(open_channel(unopened))
    with pytest.raises(AssertionError, match="must end in"):
        unclosed.x1.sum().backward()


def test_a_backward_moves_no_random_state() -> None:
    out = run_chain([Layer(0)], randn(B, T, E, seed=9).requires_grad_(), exact_inverse=True)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
