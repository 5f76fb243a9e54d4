"""What the tests of this room share: tiny configurations, models with weights that matter, the twin in transformers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.reformer import configuration_reformer as hf_configuration
from transformers.models.reformer import modeling_reformer as hf

import flash_reformer as ours

#: Odd and mostly prime sizes, so that no two axes can be confused. Attention is sharp enough to matter.
TINY = {
    "attention_head_size": 5,
    "attn_layers": ["local", "lsh"],
    "axial_norm_std": 0.3,
    "axial_pos_embds_dim": [4, 7],
    "axial_pos_shape": [6, 12],
    "eos_token_id": 2,
    "feed_forward_size": 13,
    "hash_seed": 3,
    "hidden_dropout_prob": 0.0,
    "hidden_size": 11,
    "initializer_range": 0.4,
    "local_attention_probs_dropout_prob": 0.0,
    "local_attn_chunk_length": 4,
    "lsh_attention_probs_dropout_prob": 0.0,
    "lsh_attn_chunk_length": 4,
    "max_position_embeddings": 72,
    "num_attention_heads": 3,
    "num_buckets": 4,
    "pad_token_id": 1,
    "vocab_size": 29,
}

#: Our fields that transformers' configuration does not have.
EXTRAS = (
    "reversible",
    "residual_in_fp32",
    "wrap_around",
    "lsh_attend_across_buckets",
    "lsh_allow_duplicate_attention",
    "full_attention_below",
    "num_buckets_automatic",
    "trained_num_buckets",
)

CLASSES = (
    "ReformerModel",
    "ReformerModelWithLMHead",
    "ReformerForMaskedLM",
    "ReformerForSequenceClassification",
    "ReformerForQuestionAnswering",
)
VOCAB = TINY["vocab_size"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fields(**changes: Any) -> dict[str, Any]:
    """The tiny configuration's fields with some changed; copies, since configurations may keep lists."""
    return copy.deepcopy({**TINY, **changes})


def causal(name: str) -> dict[str, Any]:
    """What ``is_decoder`` must be for a class."""
    return {"is_decoder": name == "ReformerModelWithLMHead"}


def build(name: str = "ReformerModelWithLMHead", *, seed: int = 0, **changes: Any) -> Any:
    """One of our models in evaluation mode, from a seed, with every bias and norm away from its start."""
    config = ours.ReformerConfig(**fields(**{**causal(name), **changes}))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(ours, name)(config).eval()
    return stir(model, seed)


@torch.no_grad()
def stir(model: nn.Module, seed: int) -> nn.Module:
    """Move biases and norms from 0 and 1, where a mistake with them would not show. ``lm_head.bias`` stays 0."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1 and name != "lm_head.bias":
            noise = torch.randn(parameter.shape, generator=generator(seed + len(name)))
            parameter += 0.1 * noise.to(parameter.dtype)
    return model


def hf_config(config: ours.ReformerConfig) -> hf_configuration.ReformerConfig:
    """The configuration of transformers with the same fields."""
    shared = {name: value for name, value in config.to_dict().items() if name not in (*EXTRAS, "transformers_version")}
    return hf_configuration.ReformerConfig(**copy.deepcopy(shared))


def hf_twin(model: Any) -> Any:
    """A fresh model of transformers with our weights. Fresh, since its first forward freezes the bucket count."""
    twin = getattr(hf, type(model).__name__)(hf_config(model.config))
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.to(next(model.parameters()).dtype).train(model.training)


def ids(batch: int, length: int, seed: int = 0, *, vocab: int = VOCAB) -> Tensor:
    """Random token ids; id 2, which ends sequences, is left out."""
    return torch.randint(3, vocab, (batch, length), generator=generator(1000 * seed + length))


def mask(kind: str | None, batch: int, length: int) -> Tensor | None:
    """A mask ``[B, T]`` of 0 and 1. The rows of a batch differ in every kind."""
    if kind is None:
        return None
    real = torch.ones(batch, length, dtype=torch.long)
    if kind == "right":
        real[0, length - length // 3 :] = 0
    elif kind == "left":
        real[-1, : length // 3 + 1] = 0
    elif kind == "scattered":
        real = (torch.rand(batch, length, generator=generator(length)) < 0.7).long()
        real[:, length // 2] = 1
        real[0, length // 3] = 0
    else:
        assert kind == "whole row", kind
        real[-1] = 0
    return real


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected magnitude."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert actual.isfinite().all()
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "value") -> None:
    """Close, and the expectation is neither zero nor a constant, so that neither can pass."""
    assert expected.numel() == 1 or expected.unique().numel() > 1, f"{name}: a constant proves nothing"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: relative error {error:.3g} > {tolerance:.3g}"
