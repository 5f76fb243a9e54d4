"""What the tests of this room share: small models, one training step, and the comparison of gradients by name.

A *pair* is a reversible model and one with ``reversible=False`` that has the same weights. Plain autograd of the
same blocks is the definition of the gradients, so every test here holds the first to the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flash_reformer import ReformerConfig, ReformerForMaskedLM, ReformerModelWithLMHead
from flash_reformer.functional import derive_seeds
from flash_reformer.layers.call import Call

BATCH, LENGTH, VOCAB = 2, 48, 29
MIXES = {
    "local": ["local", "local"],
    "lsh": ["lsh", "lsh"],
    "local-lsh": ["local", "lsh", "local"],
    "lsh-local": ["lsh", "local", "lsh"],
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}

Gradients = dict[str, Tensor]


def make_config(**changes: Any) -> ReformerConfig:
    """A small model with every dropout on. Sizes differ from each other, so a swapped axis cannot pass."""
    fields: dict[str, Any] = {
        "attn_layers": MIXES["local-lsh"],
        "hidden_size": 12,
        "num_attention_heads": 3,
        "attention_head_size": 5,
        "feed_forward_size": 17,
        "vocab_size": VOCAB,
        "axial_pos_shape": (8, 12),
        "axial_pos_embds_dim": (5, 7),
        "axial_norm_std": 0.5,
        "max_position_embeddings": 96,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 6,
        "num_buckets": 4,
        "num_hashes": 2,
        "hidden_dropout_prob": 0.1,
        "lsh_attention_probs_dropout_prob": 0.15,
        "local_attention_probs_dropout_prob": 0.2,
        "hidden_act": "gelu",
        "initializer_range": 0.3,
        "is_decoder": True,
    }
    return ReformerConfig(**{**fields, **changes})


def make_model(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    config = make_config(**changes)
    torch.manual_seed(seed)
    model = (ReformerModelWithLMHead if config.is_decoder else ReformerForMaskedLM)(config)
    return model.to(dtype).train()


def make_pair(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """Return a reversible model and its twin under plain autograd."""
    return make_model(dtype, reversible=True, **changes), make_model(dtype, reversible=False, **changes)


def make_batch(length: int = LENGTH, seed: int = 1) -> dict[str, Tensor]:
    ids = torch.randint(VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def make_call(**changes: Any) -> Call:
    """What the stack is told in a training forward, for tests that call it without its model."""
    fields: dict[str, Any] = {
        "mask_BT": None,
        "num_hashes": 2,
        "bucket_factors": (4,),
        "rotation_seed": None,
        "seeds_LX": derive_seeds(torch.tensor(17), 16, 2),
        "exact": False,
        "backend": "auto",
    }
    return Call(**{**fields, **changes})


def make_mask(kind: str, length: int = LENGTH) -> Tensor:
    mask = torch.ones(BATCH, length, dtype=torch.long)
    if kind == "left":
        mask[1, : length // 3] = 0
    elif kind == "right":
        mask[0, -(length // 2) :] = 0
    else:
        assert kind == "scattered"
        mask = (torch.rand(BATCH, length, generator=torch.Generator().manual_seed(length)) < 0.7).long()
    return mask


@dataclass(frozen=True)
class Step:
    """What one forward and backward left behind."""

    loss: Tensor
    grads: Gradients
    rng_after_forward: Tensor
    rng_after_backward: Tensor


def loss_of(model: nn.Module, **inputs: Any) -> Tensor:
    return model(**inputs).loss


def gradients(model: nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def take_step(model: nn.Module, seed: int = 7, loss: Callable[..., Tensor] = loss_of, **inputs: Any) -> Step:
    """Run ``loss(model, **inputs)`` and its backward from a fixed random state."""
    model.zero_grad()
    torch.manual_seed(seed)
    value = loss(model, **inputs)
    after_forward = torch.get_rng_state()
    value.backward()
    return Step(value.detach(), gradients(model), after_forward, torch.get_rng_state())


def relative_error(value: Tensor, expected: Tensor) -> float:
    difference = (value.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-30)).item()


def worst_error(grads: Gradients, expected: Gradients) -> tuple[float, str]:
    """Return the largest relative error over the parameters, and whose it is."""
    assert grads.keys() == expected.keys()
    return max((relative_error(grads[name], expected[name]), name) for name in expected)


def assert_gradients_match(
    grads: Gradients, expected: Gradients, tolerance: float, names: set[str] | None = None
) -> None:
    """Hold every gradient to the expected one by name; none of them may be zero.

    ``names`` are the parameters that must have a gradient, where those are known from elsewhere.
    """
    assert expected, "there is nothing to compare"
    assert names is None or expected.keys() == names
    for name, grad in expected.items():
        assert grad.isfinite().all(), f"{name} is not finite"
        assert grad.norm() > 0, f"{name} is zero: it proves nothing"
    error, name = worst_error(grads, expected)
    assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_pair_agrees(
    pair: tuple[nn.Module, nn.Module], tolerance: float, loss: Callable[..., Tensor] = loss_of, **inputs: Any
) -> Step:
    """The two models' losses agree to the bit, their gradients to ``tolerance``, their random states everywhere."""
    reversible, plain = (take_step(model, loss=loss, **inputs) for model in pair)
    assert torch.equal(reversible.loss, plain.loss)
    assert torch.equal(reversible.rng_after_forward, plain.rng_after_forward)
    assert torch.equal(reversible.rng_after_backward, reversible.rng_after_forward)
    wanted = {name for name, p in pair[1].named_parameters() if p.requires_grad}
    assert_gradients_match(reversible.grads, plain.grads, tolerance, wanted)
    return reversible
