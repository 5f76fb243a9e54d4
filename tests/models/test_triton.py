"""Whole models on the kernels for a GPU, in triton's interpreter: values, gradients, decoding, and what waits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from flash_reformer import (
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerModelWithLMHead,
    functional,
    seeds,
)
from flash_reformer.layers import linear
from tests.kernels.triton.spying import entered

FIELDS: dict[str, Any] = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "feed_forward_size": 48,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "num_hashes": 2,
    "num_buckets": 4,
    "axial_pos_shape": (8, 8),
    "axial_pos_embds_dim": (16, 16),
    "max_position_embeddings": 64,
    "vocab_size": 30,
    "is_decoder": True,
}


Step = tuple[Tensor, dict[str, Tensor]]


def build(**changes: Any) -> ReformerModelWithLMHead:
    torch.manual_seed(3)
    return ReformerModelWithLMHead(ReformerConfig(**{**FIELDS, **changes})).train()


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(30, (batch, length), generator=torch.Generator().manual_seed(length))


def step(model: nn.Module, ids: Tensor, **inputs: Any) -> Step:
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: Step, theirs: Step, bound: float) -> None:
    assert abs(ours[0] - theirs[0]) <= bound * abs(theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).norm() <= bound * grad.norm(), name


KERNELS = {
    "_hash_kernel",
    "attend_kernel",
    "merge_kernel",
    "delta_kernel",
    "attend_backward_kernel",
    "_dropout_kernel",
    "_loss_kernel",
    "_loss_backward_kernel",
}


@pytest.mark.floor
@pytest.mark.parametrize("reversible", [True, False])
def test_training_is_the_reference(reversible: bool) -> None:
    """With every dropout on, a padded batch, and the loss in chunks: each of the kernels takes part."""
    model = build(reversible=reversible, hidden_dropout_prob=0.1, lsh_attention_probs_dropout_prob=0.1)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    inputs = {"attention_mask": mask, "return_logits": False}
    model.set_backend("reference")
    with mock.patch.object(linear, "_SMALL", 0):
        expected = step(model, ids_of(40), **inputs)
        model.set_backend("triton")
        with entered() as names:
            actual = step(model, ids_of(40), **inputs)
        assert set(names) >= KERNELS
        assert_close(actual, expected, 2e-5)
        if reversible:
            model.set_backend("triton", deterministic=False)
            assert_close(step(model, ids_of(40), **inputs), expected, 2e-5)


def test_every_option_of_the_configuration() -> None:
    options = {"lsh_attend_across_buckets": False, "lsh_allow_duplicate_attention": False, "wrap_around": False}
    model = build(**options, num_hashes=1, hidden_dropout_prob=0.0)
    results = {}
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        results[backend] = step(model, ids_of(40, 1))
    assert_close(results["triton"], results["reference"], 2e-5)


def test_masked_language_model() -> None:
    torch.manual_seed(3)
    model = ReformerForMaskedLM(ReformerConfig(**{**FIELDS, "is_decoder": False, "num_hashes": 1})).train()
    results = {}
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        results[backend] = step(model, ids_of(32, 1))
    assert_close(results["triton"], results["reference"], 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_half_precision_models(dtype: torch.dtype) -> None:
    model = build(hidden_dropout_prob=0.0, num_hashes=1)
    ids = ids_of(32, 1)
    exact = step(model, ids)
    model.set_backend("triton")
    with torch.autocast("cpu", dtype=dtype):
        torch.manual_seed(7)
        loss = model(ids, labels=ids).loss
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all(), name
    assert abs(loss - exact[0]) < 0.02 * exact[0]
    half = build(hidden_dropout_prob=0.0, num_hashes=1).to(dtype)
    half.set_backend("triton")
    loss = half(ids, labels=ids).loss
    loss.backward()
    assert abs(loss.detach() - exact[0]) < 0.05 * exact[0]


@pytest.mark.floor
def test_decoding() -> None:
    model = build().eval()
    ids = ids_of(24)
    written = {}
    for backend in ("reference", "triton"):
        model.set_backend(backend)
        torch.manual_seed(5)
        with entered() as names:
            written[backend] = model.generate(ids, max_new_tokens=6, do_sample=False)
        assert ("_attend_at_kernel" in names) is (backend == "triton")
    assert torch.equal(written["triton"], written["reference"])


def test_a_compiled_evaluation_is_one_graph() -> None:
    model = build(num_hashes=1).eval()
    model.set_backend("triton")
    ids = ids_of(32, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.manual_seed(5)
        expected = model(ids, use_cache=False).logits
        torch.manual_seed(5)
        actual = compiled(ids).logits
    torch.testing.assert_close(actual, expected)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_what_the_kernels_do_not_take_is_refused_by_name() -> None:
    large = build(attention_head_size=160)
    with pytest.raises(ValueError, match="backend='triton' takes head sizes up to 128; got 160"):
        large.set_backend("triton")
    assert large.backend == "auto"
    with pytest.raises(TypeError, match="deterministic must be True or False; got 'no'"):
        large.set_backend("auto", deterministic="no")  # type: ignore[arg-type]
    model = build().double()
    model.set_backend("triton")
    with pytest.raises(ValueError, match="takes tensors of dtype float32, bfloat16, float16; got float64 on cpu"):
        model(ids_of(32))
    x = torch.zeros(1, 32, 1, 200)
    order = torch.arange(32).view(1, 1, 1, 32)
    with pytest.raises(ValueError, match="head sizes up to 128; got 200"):
        functional.lsh_attention(x, x, order, chunk_length=16, backend="triton")
    with pytest.raises(ValueError, match="sorts int16 and int32 on a GPU; got int64"):
        functional.sort_positions(order, backend="triton")


def test_what_would_reach_the_memory_of_others_is_refused() -> None:
    x, order = torch.zeros(2, 48, 1, 16), torch.arange(48).expand(2, 1, 1, 48)

    def attend(v: Tensor = x, positions: Tensor = order, mask: Tensor | None = None, **options: Any) -> None:
        given = {"chunk_length": 16, "backend": "triton", **options}
        functional.lsh_attention(x, v, positions, None, mask, **given)

    attend()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"v": torch.zeros(2, 48, 1, 8)}, "v_BTHD has shape"),
        ({"positions": order[..., :32]}, "sorted_positions_BHRT"),
        ({"positions": order.float()}, "sorted_positions_BHRT"),
        ({"mask": torch.ones(2, 48, dtype=torch.long)}, "mask_BT must be bool"),
        ({"mask": torch.ones(1, 48, dtype=torch.bool)}, "mask_BT must be bool"),
        ({"chunk_length": 20}, "48 positions are no multiple of 20"),
        ({"attend_across_buckets": False}, "buckets_BHRT are needed"),
        ({"dropout_p": 0.5}, "dropout needs a seed"),
    )
    for options, says in wrong:
        with pytest.raises(AssertionError, match=says):
            attend(**options)


def test_without_triton_or_a_device_that_it_runs_on() -> None:
    model = build()
    with mock.patch.object(functional, "_triton", return_value="missing"):
        with pytest.raises(ValueError, match=r"is not installed: pip install 'flash-reformer\[triton\]'"):
            model.set_backend("triton")
        with pytest.warns(UserWarning, match="attention on the GPU runs plain PyTorch"):
            assert functional._unsuited_device(torch.device("cuda"))
    model.set_backend("triton")
    with (
        mock.patch.object(functional, "_triton", return_value="compiled"),
        pytest.raises(ValueError, match="here kernels are compiled and the tensor is on cpu"),
    ):
        model(ids_of(32))
    with (
        mock.patch.object(functional, "_triton", return_value="compiled"),
        mock.patch.object(functional, "_capabilities", return_value=((9, 0), (7, 5))),
    ):
        assert functional._unsuited_device(torch.device("cuda:0")) is None
        reason = functional._unsuited_device(torch.device("cuda:1"))
        assert reason is not None
        assert "compute capability 8.0 or newer; cuda:1 has 7.5" in reason
    with (
        mock.patch.object(functional, "_triton", return_value="compiled"),
        mock.patch.object(torch.version, "hip", "6.4"),
    ):
        reason = functional._unsuited_device(torch.device("cuda:0"))
        assert reason is not None
        assert "runs on CUDA devices of NVIDIA; cuda:0 is none of them" in reason


# --- captured graphs --------------------------------------------------------------------------------------------------


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a graph were being captured: states of generators may be neither read nor set."""
    for module in (seeds, linear):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    monkeypatch.setattr("flash_reformer.branches.is_capturing", lambda device: True)


def test_a_captured_step_replays_its_dropouts(capturing: None) -> None:
    """The forward's seeds are kept and given to the recomputation, where no state of a generator is set back."""
    model = build(hidden_dropout_prob=0.2, num_hashes=1, chunk_size_feed_forward=8)
    model.set_backend("triton")
    with (
        mock.patch.object(linear, "_SMALL", 0),
        mock.patch("flash_reformer.branches.Surroundings._set_rng", return_value=None),
    ):
        actual = step(model, ids_of(32, 1))
    plain = build(hidden_dropout_prob=0.2, num_hashes=1, chunk_size_feed_forward=8, reversible=False)
    plain.set_backend("triton")
    with mock.patch.object(linear, "_SMALL", 0):
        expected = step(plain, ids_of(32, 1))
    assert_close(actual, expected, 1e-5)


def test_a_captured_step_refuses_random_modules_of_others(capturing: None) -> None:
    model = build()
    model.reformer.encoder.layers[0].attention.output.dropout = nn.Dropout(0.1)
    with pytest.raises(RuntimeError, match=r"cannot capture the reversible training of .*dropout \(Dropout\)"):
        model(ids_of(32, 1))
    model.eval()
    model(ids_of(32, 1))


def test_fixed_rotations_are_drawn_once_per_device() -> None:
    """While a graph is captured no generator may be used: what was drawn in the warm-up is taken."""
    from flash_reformer.ops import hashing

    shape, device = (2, 16, 1, 4), torch.device("cpu")
    first = hashing._drawn_before(11, shape, torch.float32, device)
    with mock.patch.object(torch, "Generator", side_effect=AssertionError):
        assert hashing._drawn_before(11, shape, torch.float32, device) is first
    assert torch.equal(first, functional.draw_rotations(torch.tensor(11), 2, 16, 1, [8], torch.float32, device))
