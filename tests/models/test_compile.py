"""Compilers: evaluation is one graph, training works, an exported program takes any length.

The back ends here need no compiler: they run the graph that was captured.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from flash_reformer import (
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerModelWithLMHead,
)

FIELDS: dict[str, Any] = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "feed_forward_size": 48,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "num_hashes": 2,
    "num_buckets": 4,
    "axial_pos_shape": (8, 16),
    "axial_pos_embds_dim": (16, 16),
    "vocab_size": 50,
}
#: Compiled and eager differ in how products are cut.
CLOSE = 1e-5


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(model_class: type[Any] = ReformerModelWithLMHead, **changes: Any) -> Any:
    torch.manual_seed(3)
    causal = model_class is ReformerModelWithLMHead
    return model_class(ReformerConfig(**{**FIELDS, "is_decoder": causal, **changes})).eval()


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(length))


def first_logits(output: Any) -> Tensor:
    return output.start_logits if hasattr(output, "start_logits") else output.logits


@pytest.mark.floor
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kernels", ["cpu", "reference"])
@pytest.mark.parametrize("hash_seed", [3, None])
def test_evaluation_is_one_graph(kernels: str, backend: str, hash_seed: int | None) -> None:
    model = build(hash_seed=hash_seed)
    model.set_backend(kernels)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids, mask = ids_of(51), torch.ones(2, 51, dtype=torch.long)
    mask[0, :7] = 0
    for inputs in ({}, {"attention_mask": mask}, {"labels": ids}):
        with torch.no_grad():
            torch.manual_seed(5)
            expected = model(ids, use_cache=False, **inputs)
            torch.manual_seed(5)
            found = compiled(ids, **inputs)
        assert found.past_buckets_states is None, "a graph makes no cache"
        assert (found.logits - expected.logits).abs().max() < CLOSE


@pytest.mark.parametrize("hash_seed", [3, None])
def test_rotations_of_a_graph_follow_the_generator(hash_seed: int | None) -> None:
    """Without ``hash_seed`` two calls of one graph hash differently; with it, alike."""
    model = build(hash_seed=hash_seed, attn_layers=["lsh"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.manual_seed(1)
        first, second = compiled(ids_of(96)).logits, compiled(ids_of(96)).logits
        torch.manual_seed(1)
        assert torch.equal(compiled(ids_of(96)).logits, first)
    assert torch.equal(first, second) is (hash_seed is not None)


@pytest.mark.parametrize(
    "model_class", [ReformerForMaskedLM, ReformerForSequenceClassification, ReformerForQuestionAnswering]
)
def test_the_other_tasks_are_one_graph_too(model_class: type[Any]) -> None:
    model = build(model_class, hash_seed=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        found, expected = first_logits(compiled(ids_of(51))), first_logits(model(ids_of(51)))
    assert (found - expected).abs().max() < CLOSE


def test_gradients_of_a_compiled_evaluation() -> None:
    model = build(hash_seed=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = ids_of(64)
    grads = []
    for call in (model, compiled):
        model.zero_grad()
        call(ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in grads[0].items():
        assert grad.norm() > 0, name
        assert (grads[1][name] - grad).norm() < 1e-4 * grad.norm(), name


# torch's own, where a graph ends in the middle of a model.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
@pytest.mark.parametrize("reversible", [True, False])
def test_training_works_and_is_the_same(reversible: bool) -> None:
    """Reversible blocks run as they are, between graphs; the gradients are the same to the last bits."""
    model = build(reversible=reversible, local_attention_probs_dropout_prob=0.1).train()
    compiled = torch.compile(model, backend="aot_eager")
    ids = ids_of(64)
    results = []
    for call in (model, compiled):
        torch.manual_seed(7)
        model.zero_grad()
        loss = call(ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (loss, grads), (compiled_loss, compiled_grads) = results
    assert abs(loss - compiled_loss) < CLOSE
    for name, grad in grads.items():
        assert (compiled_grads[name] - grad).norm() < 1e-4 * grad.norm(), name


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.model(input_ids, attention_mask=attention_mask).logits


@pytest.mark.floor
@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_any_length(strict: bool) -> None:
    """One program for every length between a chunk and the table: multiples of the chunk and not."""
    model = build(hash_seed=3)
    program = torch.export.export(
        _Logits(model), (ids_of(50),), dynamic_shapes={"input_ids": {1: Dim("T", min=9, max=128)}}, strict=strict
    )
    for length in (9, 16, 23, 64, 127, 128):
        with torch.no_grad():
            expected = model(ids_of(length), use_cache=False).logits
            found = program.module()(ids_of(length))
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < CLOSE, length


def test_export_takes_masks_and_names_its_operators() -> None:
    model = build(hash_seed=3)
    T = Dim("T", min=9, max=128)
    mask = torch.ones(2, 50, dtype=torch.long)
    mask[1, 20:] = 0
    program = torch.export.export(
        _Logits(model), (ids_of(50), mask), dynamic_shapes={"input_ids": {1: T}, "attention_mask": {1: T}}
    )
    with torch.no_grad():
        for length in (33, 50):
            cut = mask[:, :length]
            expected = model(ids_of(length), attention_mask=cut, use_cache=False).logits
            assert (program.module()(ids_of(length), cut) - expected).abs().max() < CLOSE
    targets = {str(node.target) for node in program.graph.nodes if "flash_reformer" in str(node.target)}
    for name in (
        "draw_rotations",
        "cpu_hash_vectors",
        "cpu_sort_positions",
        "cpu_lsh_attention",
        "cpu_local_attention",
    ):
        assert any(name in target for target in targets), name


def test_a_saved_program_runs_elsewhere(tmp_path: Any) -> None:
    """Importing the package is all that a new process needs."""
    model = build(hash_seed=3)
    shapes = {"input_ids": {1: Dim("T", min=9, max=128)}}
    torch.export.save(torch.export.export(_Logits(model), (ids_of(50),), dynamic_shapes=shapes), tmp_path / "model.pt2")
    torch.save(ids_of(77), tmp_path / "ids.pt")
    code = (
        "import sys, torch, flash_reformer; folder = sys.argv[1];"
        "ids = torch.load(folder + '/ids.pt');"
        "torch.save(torch.export.load(folder + '/model.pt2').module()(ids), folder + '/logits.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    with torch.no_grad():
        expected = model(ids_of(77), use_cache=False).logits
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() < CLOSE


def test_inference_mode_gives_what_no_grad_does() -> None:
    model = build(hash_seed=3)
    with torch.no_grad():
        expected = model(ids_of(70), use_cache=False).logits
    with torch.inference_mode():
        found = model(ids_of(70), use_cache=False).logits
    assert found.is_inference()
    assert torch.equal(found, expected)
