"""What only a device can show: nothing waits for it, graphs are captured, and compiled kernels are the definitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_reformer import ReformerConfig, ReformerModelWithLMHead

# torch and cuBLAS warn of what tests do here on purpose: watching for waits, working in autograd's threads.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

FIELDS: dict[str, Any] = {
    "attn_layers": ["local", "lsh", "local", "lsh"],
    "hidden_size": 128,
    "num_attention_heads": 2,
    "attention_head_size": 64,
    "feed_forward_size": 256,
    "num_hashes": 2,
    "num_buckets": [8, 16],
    "axial_pos_shape": (32, 64),
    "axial_pos_embds_dim": (64, 64),
    "max_position_embeddings": 2048,
    "vocab_size": 60,
    "is_decoder": True,
}
RANDOM = {"hidden_dropout_prob": 0.1, "lsh_attention_probs_dropout_prob": 0.1, "hash_seed": None}
FIXED = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "hash_seed": 5}


def build(**changes: Any) -> ReformerModelWithLMHead:
    torch.manual_seed(3)
    model = ReformerModelWithLMHead(ReformerConfig(**{**FIELDS, **changes})).cuda().train()
    model.set_backend("triton")
    return model


def ids_of(length: int = 1000) -> Tensor:
    return torch.randint(60, (2, length), generator=torch.Generator().manual_seed(length)).cuda()


def step(model: ReformerModelWithLMHead, ids: Tensor, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(ids, labels=ids, return_logits=False).loss
    loss.backward()
    return loss.detach()


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Make torch raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_a_training_step_does_not_wait(dtype: torch.dtype | None) -> None:
    model, ids = build(**RANDOM), ids_of()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        step(model, ids, dtype)
        optimizer.step()
    with nobody_waits():
        loss = step(model, ids, dtype)
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(loss)


def _captured(model: ReformerModelWithLMHead, ids: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            step(model, ids)
    torch.cuda.current_stream().wait_stream(aside)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, ids)
    return graph, loss


def _gradients(model: ReformerModelWithLMHead) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_captured_step_draws_anew_in_every_replay() -> None:
    model, ids = build(**RANDOM), ids_of()
    graph, loss = _captured(model, ids)
    seen = set()
    for _ in range(4):
        graph.replay()
        seen.add(loss.item())
        assert all(torch.isfinite(grad).all() for grad in _gradients(model).values())
    assert len(seen) == 4, "rotations and masks are fresh"


def test_a_captured_step_is_the_step() -> None:
    model, ids = build(**FIXED), ids_of()
    graph, loss = _captured(model, ids)
    graph.replay()
    captured, captured_loss = _gradients(model), loss.clone()
    model.zero_grad(set_to_none=True)
    expected_loss = step(model, ids)
    assert torch.equal(captured_loss, expected_loss)
    for name, grad in _gradients(model).items():
        assert torch.equal(captured[name], grad), name


@pytest.mark.parametrize("reversible", [True, False])
def test_kernels_are_the_definitions(reversible: bool) -> None:
    """Same device, same seeds, same masks; fp32, where ids of hashes differ at most by a rounding."""
    model, ids = build(**RANDOM, reversible=reversible), ids_of()
    results = {}
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        model.zero_grad(set_to_none=True)
        torch.manual_seed(7)
        results[backend] = (step(model, ids, None), _gradients(model))
    loss, gradients = results["reference"]
    assert abs(results["triton"][0] - loss) < 1e-4 * loss
    for name, grad in gradients.items():
        assert (results["triton"][1][name] - grad).norm() < 1e-2 * grad.norm() + 1e-6, name


def test_decoding_on_a_gpu() -> None:
    model, ids = build(**FIXED).eval(), ids_of(200)
    written = {}
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        written[backend] = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert (written["triton"] == written["reference"]).float().mean() > 0.95
