"""Checkpoints go to transformers' Reformer and back, strictly; old ones load clean; what is saved comes back."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers.models.reformer import modeling_reformer as hf

import flash_reformer as ours
from tests.models.builders import CLASSES, TINY, build, causal, fields, hf_config, hf_twin, ids, relative_error

KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def load_strictly(cls: Any, folder: Path, **kwargs: Any) -> Any:
    """``from_pretrained`` without a missing, unexpected or mismatched key and without a warning of any kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = cls.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert {key: list(info[key]) for key in KEYS} == {key: [] for key in KEYS}
    return model


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    return model(ids(2, 21))[0]


def assert_equal_states(actual: Any, expected: Any) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("axial", [True, False])
@pytest.mark.parametrize("name", CLASSES)
def test_keys_and_shapes_are_those_of_transformers(name, axial):
    model = build(name, axial_pos_embds=axial)
    expected = getattr(hf, name)(hf_config(model.config)).state_dict()
    assert {key: value.shape for key, value in model.state_dict().items()} == {
        key: value.shape for key, value in expected.items()
    }
    assert {key for key, _ in model.named_parameters()} == {key for key in expected if "mask_value" not in key}


@pytest.mark.floor
@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_of_transformers_loads_here(name, tmp_path):
    twin = hf_twin(build(name, num_labels=2))
    twin.save_pretrained(tmp_path)
    model = load_strictly(getattr(ours, name), tmp_path)
    assert not model.training
    assert_equal_states(model, twin)
    assert relative_error(outputs(model), outputs(twin)) < 1e-5


@pytest.mark.floor
@pytest.mark.parametrize("name", CLASSES)
def test_our_checkpoint_loads_in_transformers(name, tmp_path):
    model = build(name, num_labels=2)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    twin = load_strictly(getattr(hf, name), tmp_path)
    assert_equal_states(twin, model)
    assert relative_error(outputs(twin), outputs(model)) < 1e-5
    assert_equal_states(load_strictly(getattr(ours, name), tmp_path), model)


def test_a_language_model_without_its_head_and_back(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "lm")
    base, info = ours.ReformerModel.from_pretrained(tmp_path / "lm", output_loading_info=True)
    assert not info["missing_keys"]
    assert_equal_states(base, model.reformer)
    base.save_pretrained(tmp_path / "base")
    again, info = ours.ReformerModelWithLMHead.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.bias", "lm_head.decoder.weight"}
    assert not info["unexpected_keys"]
    assert_equal_states(again.reformer, model.reformer)


def write_old_checkpoint(folder: Path, *, with_bias: bool = True) -> Any:
    """What transformers wrote in 2020: a pickle with constants as buffers, the bias under two names, retired fields."""
    model = build(attn_layers=["lsh", "local"])
    with torch.no_grad():
        model.lm_head.bias.normal_()
    state = dict(model.state_dict())
    state["lm_head.decoder.bias"] = state["lm_head.bias"]
    if not with_bias:
        del state["lm_head.bias"]
    for layer, names in enumerate((("self_mask_value", "mask_value"), ("mask_value",))):
        for name in names:
            for size, value in (("float16", -1e4), ("float32", -1e9)):
                key = f"reformer.encoder.layers.{layer}.attention.self_attention.{name}_{size}"
                state[key] = torch.tensor(value)
    torch.save(state, folder / "pytorch_model.bin")
    config = {
        **fields(is_decoder=True, attn_layers=["lsh", "local"]),
        "architectures": ["ReformerModelWithLMHead"],
        "attention_probs_dropout_prob": 0.1,
        "chunk_size_lm_head": 0,
        "intermediate_size": 3072,
        "model_type": "reformer",
        "num_attention_chunks": None,
        "num_chunks_after": 0,
        "num_chunks_before": 1,
        "num_hidden_layers": 2,
        "output_past": True,
        "sinusoidal_pos_embds": False,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 100}},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def complaints(caplog):
    """Whatever transformers logs at warning level or above; its loggers do not propagate by themselves."""
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield lambda: [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    logger.removeHandler(caplog.handler)


@pytest.mark.floor
def test_an_old_checkpoint_loads_clean(tmp_path, complaints):
    old = write_old_checkpoint(tmp_path)
    model = load_strictly(ours.ReformerModelWithLMHead, tmp_path)
    assert complaints() == []
    assert_equal_states(model, old)
    assert relative_error(outputs(model), outputs(old)) < 1e-6


def test_an_old_checkpoint_without_the_bias_says_that_it_is_missing(tmp_path, complaints):
    """Both names were always written, for one tensor. Should only the alias be there, the loss must not be silent."""
    write_old_checkpoint(tmp_path, with_bias=False)
    model, info = ours.ReformerModelWithLMHead.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.bias"}
    assert not info["unexpected_keys"]
    assert "lm_head.bias" in "".join(complaints())
    assert torch.equal(model.lm_head.bias, torch.zeros(29))


def test_an_old_checkpoint_saved_again_is_a_new_one(tmp_path):
    write_old_checkpoint(tmp_path)
    ours.ReformerModelWithLMHead.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    state = safetensors.torch.load_file(tmp_path / "new" / "model.safetensors")
    assert state.keys() == build(attn_layers=["lsh", "local"]).state_dict().keys()
    load_strictly(hf.ReformerModelWithLMHead, tmp_path / "new")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept(dtype, tmp_path):
    model = build().to(dtype)
    model.save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in state.values()} == {dtype}
    loaded = load_strictly(ours.ReformerModelWithLMHead, tmp_path, dtype=dtype)
    assert_equal_states(loaded, model)
    assert outputs(loaded).dtype == dtype
    assert torch.equal(outputs(loaded), outputs(model))
    # Rotations are drawn in the dtype of the vectors, so only exact attention compares across dtypes.
    exact = {"full_attention_below": 72}
    half = load_strictly(ours.ReformerModelWithLMHead, tmp_path, dtype=dtype, **exact)
    wide = load_strictly(ours.ReformerModelWithLMHead, tmp_path, dtype=torch.float32, **exact)
    assert 0 < relative_error(outputs(half), outputs(wide)) < 0.05
    assert load_strictly(ours.ReformerModelWithLMHead, tmp_path, dtype="auto").dtype == dtype


def test_shards_come_together(tmp_path):
    model = build()
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal_states(load_strictly(ours.ReformerModelWithLMHead, tmp_path), model)


def test_a_meta_device_model_is_filled(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = ours.ReformerModelWithLMHead(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = load_strictly(ours.ReformerModelWithLMHead, tmp_path)
    assert torch.equal(outputs(loaded), outputs(model))


def test_initialisation_is_as_documented():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = fields(vocab_size=999, hidden_size=96, axial_pos_embds_dim=[32, 64], is_decoder=True)
        model = ours.ReformerModelWithLMHead(ours.ReformerConfig(**config))
    for name, parameter in model.named_parameters():
        if "weights." in name:
            assert parameter.std().item() == pytest.approx(TINY["axial_norm_std"], rel=0.25), name
        elif parameter.dim() == 1:
            assert torch.equal(parameter, torch.full_like(parameter, float("layer_norm.weight" in name))), name
        else:
            assert parameter.std().item() == pytest.approx(TINY["initializer_range"], rel=0.1), name
            assert abs(parameter.mean().item()) < 0.1


@pytest.mark.parametrize("size", [37, 23])
@pytest.mark.parametrize("name", ["ReformerModelWithLMHead", "ReformerForMaskedLM"])
def test_resized_vocabulary_keeps_what_fits_and_reloads(name, size, tmp_path):
    model = build(name)
    with torch.no_grad():
        model.lm_head.bias.normal_()
    kept = min(size, 29)
    tokens = ids(2, 21, vocab=kept)
    with torch.no_grad():
        before = model(tokens).logits
    old_bias = model.lm_head.bias.detach().clone()
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == size
    assert model.reformer.embeddings.word_embeddings.weight.shape == (size, 11)
    assert model.lm_head.decoder.weight.shape == (size, 22)
    assert model.lm_head.bias.shape == (size,)
    assert torch.equal(model.lm_head.bias[:kept], old_bias[:kept])
    with torch.no_grad():
        after = model(tokens).logits
    assert torch.equal(after[..., :kept], before[..., :kept])
    (after_grad,) = torch.autograd.grad(model(tokens).logits.sum(), model.lm_head.bias)
    assert torch.equal(after_grad, torch.full((size,), float(tokens.numel())))
    model.save_pretrained(tmp_path)
    again = load_strictly(type(model), tmp_path)
    assert_equal_states(again, model)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, after)
    load_strictly(getattr(hf, name), tmp_path)


def test_new_tokens_start_at_the_mean_by_default():
    model = build(seed=2)
    with torch.no_grad():
        model.lm_head.bias.fill_(3.0)
    mean = model.lm_head.decoder.weight.mean(0)
    model.resize_token_embeddings(37)
    new = model.lm_head.decoder.weight[29:]
    assert (new - mean).abs().max() < 0.2 * model.lm_head.decoder.weight.std()
    assert model.lm_head.bias.tolist() == [3.0] * 29 + [0.0] * 8


def test_tied_embeddings_are_refused():
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        ours.ReformerConfig(tie_word_embeddings=True)
    config = ours.ReformerConfig(**fields(**causal("ReformerModelWithLMHead")))
    config.tie_word_embeddings = True
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        ours.ReformerModelWithLMHead(config)


def test_a_state_dict_copies_into_a_fresh_model():
    model, other = build(), build(seed=1)
    assert relative_error(outputs(other), outputs(model)) > 0.1
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(other), outputs(model))
