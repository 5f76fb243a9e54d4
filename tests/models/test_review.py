"""What a fresh pair of eyes once found: depth, overrides of automatic buckets, offloading, lengths of generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import flash_reformer as fr

SIZES: dict[str, Any] = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "axial_pos_shape": (4, 8),
    "axial_pos_embds_dim": (8, 8),
    "feed_forward_size": 16,
    "lsh_attn_chunk_length": 8,
    "local_attn_chunk_length": 8,
    "is_decoder": True,
    "vocab_size": 20,
    "eos_token_id": None,
}


def make() -> fr.ReformerModelWithLMHead:
    torch.manual_seed(0)
    return fr.ReformerModelWithLMHead(fr.ReformerConfig(**SIZES))


def test_depth_follows_attn_layers_wherever_they_are_set(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    for layers in (["lsh"], ["local", "lsh", "local"]):
        config = fr.ReformerConfig.from_pretrained(tmp_path, attn_layers=layers)
        assert config.num_hidden_layers == len(layers)
        assert len(fr.ReformerModel(config).encoder.layers) == len(layers)
    with pytest.raises(ValueError, match="num_hidden_layers must be the length of attn_layers, 2; got 5"):
        fr.ReformerConfig.from_pretrained(tmp_path, num_hidden_layers=5)


def test_a_bucket_count_that_is_asked_for_wins_over_an_automatic_one(tmp_path: Path) -> None:
    model = make().train()
    model(torch.arange(16).view(1, -1))
    model.save_pretrained(tmp_path)
    automatic = fr.ReformerModelWithLMHead.from_pretrained(tmp_path).train()
    assert automatic.reformer._bucket_factors(32) == (8,)
    asked = fr.ReformerModelWithLMHead.from_pretrained(tmp_path, num_buckets=16).train()
    assert asked.reformer._bucket_factors(32) == (16,)
    automatic.config.num_buckets = [2, 4]
    assert automatic.reformer._bucket_factors(32) == (2, 4)


@pytest.mark.parametrize(
    ("field", "value"), [("problem_type", "regresion"), ("num_labels", 0), ("output_attentions", "x")]
)
def test_fields_of_the_base_class_are_checked_too(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        fr.ReformerForSequenceClassification(fr.ReformerConfig(**{**SIZES, field: value}))


def test_embeddings_on_disk_give_the_same_logits(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    whole = fr.ReformerModelWithLMHead.from_pretrained(tmp_path, hash_seed=1).eval()
    places = {"reformer.embeddings": "disk", "reformer.encoder": "cpu", "lm_head": "cpu"}
    offloaded = fr.ReformerModelWithLMHead.from_pretrained(
        tmp_path, hash_seed=1, device_map=places, offload_folder=tmp_path / "offload"
    ).eval()
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(offloaded(ids).logits, whole(ids).logits)


def test_generation_beyond_the_positions_is_refused_before_it_starts() -> None:
    model = make().eval()
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    with pytest.raises(ValueError, match="asks for 30 tokens after a prompt of 4, but the position table holds 32"):
        model.generate(ids, max_new_tokens=30)
    assert model.generate(ids, max_new_tokens=29, do_sample=False).shape == (2, 33)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert model.generate(ids, attention_mask=mask, max_new_tokens=31, do_sample=False).shape == (2, 35)


def test_a_model_that_returns_hidden_states_by_default_generates() -> None:
    model = fr.ReformerModelWithLMHead(fr.ReformerConfig(**SIZES, output_hidden_states=True)).eval()
    generated = model.generate(torch.tensor([[3, 4]]), max_new_tokens=2, do_sample=False)
    assert generated.sequences.shape == (1, 4)


def test_states_that_needed_no_padding_can_be_differentiated_by() -> None:
    model = make().train()
    ids = torch.arange(16).view(1, -1)
    output = model(ids, labels=ids, output_hidden_states=True)
    (gradient,) = torch.autograd.grad(output.loss, [output.hidden_states[1]])
    assert gradient.shape == (1, 16, 16)
    assert gradient.abs().sum() > 0
