"""RNG etiquette (SEMANTICS 1.3), sentence by sentence, and determinism."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_reformer import functional
from tests.layers.tools import MIXES, gradients, loss_of, make_batch, make_mask, make_model, make_pair


def state_after(model: nn.Module, seed: int = 5, **inputs: Any) -> Tensor:
    torch.manual_seed(seed)
    model(**inputs)
    return torch.get_rng_state()


def state_of(seed: int) -> Tensor:
    return torch.Generator().manual_seed(seed).get_state()


@pytest.fixture
def rotations(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The rotations of every LSH layer from now on, in order."""
    seen: list[Tensor] = []
    hash_vectors = functional.hash_vectors

    def spy(vectors: Tensor, rotations: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(rotations.clone())
        return hash_vectors(vectors, rotations, *args, **kwargs)

    monkeypatch.setattr(functional, "hash_vectors", spy)
    return seen


@pytest.mark.parametrize("mix", MIXES)
def test_hash_seed_and_evaluation_leave_the_generator_alone(mix: str) -> None:
    model = make_model(attn_layers=MIXES[mix], hash_seed=3).eval()
    assert torch.equal(state_after(model, **make_batch()), state_of(5))
    with torch.no_grad():
        assert torch.equal(state_after(model, **make_batch()), state_of(5))


@pytest.mark.parametrize(
    "changes", [{}, {"num_hashes": 4}, {"attn_layers": ["lsh"] * 5}, {"reversible": False}], ids=str
)
@pytest.mark.parametrize("length", [5, 33, 48])
def test_evaluation_without_hash_seed_draws_one_number(length: int, changes: dict[str, Any]) -> None:
    """One 63-bit integer, whatever the layers, rounds and length."""
    model = make_model(**changes).eval()
    torch.manual_seed(5)
    torch.randint(2**63 - 1, ())
    expected = torch.get_rng_state()
    assert not torch.equal(expected, state_of(5))
    assert torch.equal(state_after(model, **make_batch(length)), expected)
    with torch.no_grad():
        assert torch.equal(state_after(model, **make_batch(length)), expected)


@pytest.mark.parametrize("hash_seed", [None, 3])
@pytest.mark.parametrize("mix", MIXES)
def test_training_leaves_reversible_and_plain_in_the_same_state(mix: str, hash_seed: int | None) -> None:
    states = [
        state_after(model, **make_batch(43), attention_mask=make_mask("left", 43))
        for model in make_pair(attn_layers=MIXES[mix], hash_seed=hash_seed)
    ]
    assert torch.equal(*states)
    assert not torch.equal(states[0], state_of(5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("hash_seed", [None, 3])
def test_a_backward_never_moves_the_generator(reversible: bool, training: bool, hash_seed: int | None) -> None:
    model = make_model(reversible=reversible, hash_seed=hash_seed).train(training)
    loss = loss_of(model, **make_batch())
    torch.manual_seed(99)
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state_of(99))


def test_a_backward_that_fails_does_not_move_the_generator_either() -> None:
    model = make_model()
    loss = loss_of(model, **make_batch())
    torch.manual_seed(99)

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    model.reformer.encoder.layers[1].attention.output.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        loss.backward()
    assert torch.equal(torch.get_rng_state(), state_of(99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_hash_seed_gives_the_rotations_of_manual_seed_and_randn(dtype: torch.dtype, rotations: list[Tensor]) -> None:
    """In every layer the same, and in every forward."""
    model = make_model(dtype, attn_layers=["lsh", "local", "lsh"], hash_seed=11, num_buckets=[4, 6], num_hashes=3)
    model(**make_batch())
    model(**make_batch())
    torch.manual_seed(11)
    expected = torch.randn(3, 5, 3, (4 + 6) // 2, dtype=dtype)
    assert len(rotations) == 4
    assert all(torch.equal(seen, expected) for seen in rotations)


def test_fresh_rotations_differ_by_layer_and_by_forward(rotations: list[Tensor]) -> None:
    model = make_model(attn_layers=["lsh", "lsh"]).eval()
    model(**make_batch())
    model(**make_batch())
    assert len(rotations) == 4
    for i, one in enumerate(rotations):
        assert all(not torch.equal(one, other) for other in rotations[:i])
    # Independent, not merely different: no correlation beyond that of 30 draws or so.
    flat = torch.stack([one.flatten() for one in rotations])
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.6


def test_a_recomputation_draws_no_rotations(rotations: list[Tensor]) -> None:
    loss = loss_of(make_model(attn_layers=["lsh", "lsh"]), **make_batch())
    assert len(rotations) == 2
    loss.backward()
    assert len(rotations) == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("hash_seed", [None, 3])
def test_f7_manual_seed_makes_a_forward_reproducible(hash_seed: int | None, training: bool) -> None:
    model = make_model(hash_seed=hash_seed).train(training)
    torch.manual_seed(1)
    first = loss_of(model, **make_batch())
    second = loss_of(model, **make_batch())
    torch.manual_seed(1)
    again = loss_of(model, **make_batch())
    assert torch.equal(first, again)
    # Without a hash_seed or with dropout, the next forward is another one.
    assert torch.equal(first, second) == (hash_seed is not None and not training)


@pytest.mark.parametrize("hash_seed", [None, 3])
def test_f7_the_users_random_numbers_go_on(hash_seed: int | None) -> None:
    """Where hashing reseeds the default generator, everything drawn after a forward is the same number."""
    model = make_model(hash_seed=hash_seed)
    torch.manual_seed(1)
    drawn = []
    for _ in range(3):
        loss_of(model, **make_batch()).backward()
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3
    torch.manual_seed(1)
    for value in drawn:
        loss_of(model, **make_batch()).backward()
        assert torch.rand(()).item() == value


def train(reversible: bool, steps: int = 20) -> tuple[list[float], dict[str, Tensor]]:
    model = make_model(reversible=reversible)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(2)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, **make_batch(seed=step % 2))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients(model)


def test_twenty_steps_repeat_bit_for_bit() -> None:
    """Same seed, same losses; and reversible training is plain training."""
    (losses, grads), (again, grads_again) = train(True), train(True)
    assert losses == again
    assert all(torch.equal(grad, grads_again[name]) for name, grad in grads.items())
    assert losses[-1] < losses[0] - 0.3
    plain, _ = train(False)
    assert plain == train(False)[0]
    assert losses == pytest.approx(plain, rel=1e-4)
