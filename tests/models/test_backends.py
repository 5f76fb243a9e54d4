"""One model on every backend: the same values and gradients, dropout included, and a choice that does what it says."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flash_reformer import ReformerConfig, ReformerModelWithLMHead, functional
from flash_reformer.layers.linear import Dropout, Linear

FIELDS: dict[str, Any] = {
    "attn_layers": ["local", "lsh", "lsh"],
    "hidden_size": 128,
    "num_attention_heads": 2,
    "attention_head_size": 32,
    "feed_forward_size": 256,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 32,
    "num_hashes": 2,
    "axial_pos_shape": (16, 64),
    "axial_pos_embds_dim": (64, 64),
    "vocab_size": 60,
    "is_decoder": True,
}
DROPOUTS = {
    "hidden_dropout_prob": 0.1,
    "local_attention_probs_dropout_prob": 0.1,
    "lsh_attention_probs_dropout_prob": 0.1,
}


def build(**changes: Any) -> ReformerModelWithLMHead:
    torch.manual_seed(3)
    return ReformerModelWithLMHead(ReformerConfig(**{**FIELDS, **changes})).train()


def ids_of(length: int, batch: int = 2) -> Tensor:
    return torch.randint(60, (batch, length), generator=torch.Generator().manual_seed(length))


def step(model: nn.Module, ids: Tensor, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(ids, labels=ids, **inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.floor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree_in_training(dtype: torch.dtype, reversible: bool, masked: bool) -> None:
    """At a size where linear maps are convolutions and dropout draws masks of its own."""
    model = build(**DROPOUTS, reversible=reversible).to(dtype)
    ids = ids_of(700)
    inputs = {}
    if masked:
        mask = torch.ones_like(ids)
        mask[1, :200] = 0
        inputs["attention_mask"] = mask
    results = {}
    for backend in ("reference", "cpu", "auto"):
        model.set_backend(backend)
        results[backend] = step(model, ids, **inputs)
    loss, grads = results["reference"]
    bound = 1e-10 if dtype == torch.float64 else 2e-5
    for backend in ("cpu", "auto"):
        other_loss, other_grads = results[backend]
        assert abs(other_loss - loss) < bound * loss
        assert other_grads.keys() == grads.keys()
        for name, grad in grads.items():
            assert (other_grads[name] - grad).norm() <= bound * grad.norm(), name
    assert all(torch.equal(results["auto"][1][name], results["cpu"][1][name]) for name in grads), "auto is cpu here"


def test_the_switch_reaches_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    names = ("hash_vectors", "sort_positions", "lsh_attention", "local_attention", "linear", "dropout")
    seen: dict[str, set[str]] = {name: set() for name in names}

    def spy(name: str) -> Any:
        original = getattr(functional, name)

        def call(*args: Any, backend: str = "auto", **kwargs: Any) -> Any:
            seen[name].add(backend)
            return original(*args, backend=backend, **kwargs)

        return call

    for name in names:
        monkeypatch.setattr(functional, name, spy(name))
    for backend in ("reference", "cpu", "auto"):
        model.set_backend(backend)
        for chosen in seen.values():
            chosen.clear()
        step(model, ids_of(700))
        # The reference's linear layers are torch's own.
        plain = {"linear": set()} if backend == "reference" else {}
        assert seen == {**{name: {backend} for name in names}, **plain}
    assert sum(isinstance(module, (Linear, Dropout)) for module in model.modules()) > 12


def test_a_backend_by_name_runs_or_raises() -> None:
    model = build()
    with pytest.raises(ValueError, match="backend must be one of 'auto', 'reference', 'cpu', 'triton'; got 'gpu'"):
        model.set_backend("gpu")
    assert model.backend == "auto"
    model.set_backend("cpu")
    with pytest.raises(ValueError, match="backend='cpu' runs on CPU tensors"), torch.no_grad():
        model.to("meta").eval()(torch.zeros(1, 64, dtype=torch.long, device="meta"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_exact_attention_by_the_table(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``"auto"`` is the number in the table of the backend, for the rounds of the call."""
    monkeypatch.setitem(functional.FULL_ATTENTION_BELOW, backend, (100, 200))
    ids = ids_of(150)
    found = {}
    for limit in ("auto", 0, 200):
        model = build(full_attention_below=limit, hash_seed=1).eval()
        model.set_backend(backend)
        with torch.no_grad():
            found[limit] = {rounds: model(ids, num_hashes=rounds, use_cache=False).logits for rounds in (1, 2, 3)}
    assert torch.equal(found["auto"][1], found[0][1])
    for rounds in (2, 3):
        assert torch.equal(found["auto"][rounds], found[200][rounds])
        assert not torch.equal(found["auto"][rounds], found[0][rounds])


def test_the_table_is_what_the_configuration_takes() -> None:
    for by_rounds in functional.FULL_ATTENTION_BELOW.values():
        assert list(by_rounds) == sorted(by_rounds)
    assert set(functional.FULL_ATTENTION_BELOW) == set(functional.BACKENDS) - {"auto"}
    for wrong in ("automatic", -1, 1.5, True, None):
        with pytest.raises((ValueError, TypeError), match="full_attention_below must be an integer >= 0, or 'auto'"):
            ReformerConfig(full_attention_below=wrong)


def test_automatic_exact_attention_saves_loads_and_decodes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached steps follow the same limit: exact below it, hashed beyond, as the forward without a cache."""
    monkeypatch.setitem(functional.FULL_ATTENTION_BELOW, "cpu", (40, 48))
    build(full_attention_below="auto", attn_layers=["lsh"], hash_seed=1).save_pretrained(tmp_path)
    model = ReformerModelWithLMHead.from_pretrained(tmp_path).eval().double()
    assert model.config.full_attention_below == "auto"
    ids = ids_of(70)
    with torch.no_grad():
        cache = model(ids[:, :30], use_cache=True).past_buckets_states
        assert cache.layout.exact_below == 48
        for end in range(31, 71):
            cached = model(ids[:, end - 1 : end], past_buckets_states=cache).logits[:, -1]
            full = model(ids[:, :end], use_cache=False).logits[:, -1]
            assert (cached - full).abs().max() < 1e-9, end
    text = model.generate(ids[:, :30], max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert text.shape == (2, 60)


def test_two_models_in_two_threads() -> None:
    """No buffer is shared: each thread gets what it gets alone, to the bit."""
    models = [build(**DROPOUTS), build(**DROPOUTS)]
    inputs = [ids_of(700), ids_of(512)]
    # Dropout and rotations draw from one generator; evaluation with a fixed hash seed draws nothing.
    for model in models:
        model.config.hash_seed = 5
        model.eval()
    alone = [step(model, ids) for model, ids in zip(models, inputs, strict=True)]
    found: list[list[Any]] = [[], []]

    def work(index: int) -> None:
        for _ in range(4):
            model = copy.deepcopy(models[index])
            loss = model(inputs[index], labels=inputs[index]).loss
            loss.backward()
            grads = {name: p.grad for name, p in model.named_parameters()}
            found[index].append((loss.detach(), grads))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (loss, grads), results in zip(alone, found, strict=True):
        assert len(results) == 4
        for other_loss, other_grads in results:
            assert torch.equal(other_loss, loss)
            for name, grad in grads.items():
                assert (other_grads[name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_inference_mode_leaves_nothing_behind() -> None:
    """Buffers that a thread keeps are made outside of it: whoever comes next may write to them."""

    def work() -> None:
        try:
            model = build(hash_seed=5).eval()
            with torch.inference_mode():
                model(ids_of(512), use_cache=False)
            step(model.train(), ids_of(512))
            step(build(hash_seed=6), ids_of(700))
        except Exception as error:
            failed.append(error)

    # In a thread of its own, which has made no buffers yet.
    failed: list[Exception] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed, failed


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning:torch.ao")
def test_the_reference_has_plain_linear_layers_that_can_be_quantised() -> None:
    model = build(hash_seed=5).eval()
    ids = ids_of(300)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        model.set_backend("reference")
        assert not any(type(module) is Linear for module in model.modules())
        quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
        assert any("quantized" in type(module).__module__ for module in quantised.modules())
        for backend in ("reference", "auto"):
            quantised.set_backend(backend)
            found = quantised(ids, use_cache=False).logits
            assert 0 < (found - before).abs().max() < 0.1
    model.set_backend("auto")
    assert not any(type(module) is nn.Linear for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, before)


def test_a_resized_head_keeps_its_backend() -> None:
    model = build()
    model.set_backend("cpu")
    model.resize_token_embeddings(70)
    assert type(model.lm_head.decoder) is Linear
    assert model.lm_head.decoder.backend == "cpu"
