"""The configuration: every field of transformers' one, its own rules, and the bucket count that training records."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from transformers.models.reformer import configuration_reformer as hf_configuration

import flash_reformer as ours
from tests.models.builders import CLASSES, EXTRAS, build, causal, fields, ids, relative_error

RETIRED = {
    "attention_probs_dropout_prob": 0.1,
    "intermediate_size": 3072,
    "num_attention_chunks": None,
    "num_chunks_after": 0,
    "num_chunks_before": 1,
    "output_past": True,
    "sinusoidal_pos_embds": False,
}
#: A value for every field of HF that is not its default.
OTHER = {
    "attention_head_size": 32,
    "attn_layers": ["lsh", "local"],
    "axial_norm_std": 0.5,
    "axial_pos_embds": False,
    "axial_pos_shape": [8, 16],
    "axial_pos_embds_dim": [32, 32],
    "bos_token_id": 7,
    "chunk_size_feed_forward": 3,
    "chunk_size_lm_head": 5,
    "classifier_dropout": 0.2,
    "eos_token_id": [3, 4],
    "feed_forward_size": 99,
    "hash_seed": 11,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.25,
    "hidden_size": 64,
    "initializer_range": 0.1,
    "is_decoder": True,
    "layer_norm_eps": 1e-6,
    "local_attention_probs_dropout_prob": 0.3,
    "local_attn_chunk_length": 16,
    "local_num_chunks_after": 2,
    "local_num_chunks_before": 3,
    "lsh_attention_probs_dropout_prob": 0.4,
    "lsh_attn_chunk_length": 32,
    "lsh_num_chunks_after": 4,
    "lsh_num_chunks_before": 0,
    "max_position_embeddings": 128,
    "num_attention_heads": 3,
    "num_buckets": [4, 8],
    "num_hashes": 4,
    "pad_token_id": 9,
    "use_cache": False,
    "vocab_size": 77,
}


def known_to_both() -> set[str]:
    """What HF's own class declares, its base class left out."""
    declared = set(hf_configuration.ReformerConfig.__annotations__)
    return {name for name in declared if not name.startswith("_")} - {"model_type", "attribute_map"}


def test_defaults_are_those_of_transformers():
    ours_config, theirs = ours.ReformerConfig(), hf_configuration.ReformerConfig()
    assert len(known_to_both()) > 30
    for name in known_to_both() | {"num_hidden_layers", "chunk_size_feed_forward"}:
        assert getattr(ours_config, name) == getattr(theirs, name), name


def test_the_table_of_other_values_is_complete():
    default = ours.ReformerConfig()
    assert known_to_both() - OTHER.keys() <= {"tie_word_embeddings", "keys_to_ignore_at_inference"}
    assert [name for name, value in OTHER.items() if getattr(default, name) == value] == []


@pytest.mark.floor
def test_round_trips_between_both(tmp_path):
    def values(config):
        return {name: json.loads(json.dumps(getattr(config, name))) for name in OTHER}

    wanted = json.loads(json.dumps(OTHER))
    ours.ReformerConfig(**OTHER).save_pretrained(tmp_path / "ours")
    assert values(hf_configuration.ReformerConfig.from_pretrained(tmp_path / "ours")) == wanted
    hf_configuration.ReformerConfig(**OTHER).save_pretrained(tmp_path / "theirs")
    assert values(ours.ReformerConfig.from_pretrained(tmp_path / "theirs")) == wanted
    assert values(ours.ReformerConfig.from_pretrained(tmp_path / "ours")) == wanted
    assert values(copy.deepcopy(ours.ReformerConfig(**OTHER))) == wanted


def test_our_fields_round_trip_through_transformers(tmp_path):
    changed = {
        "reversible": False,
        "residual_in_fp32": False,
        "wrap_around": False,
        "lsh_attend_across_buckets": False,
        "lsh_allow_duplicate_attention": False,
        "full_attention_below": 17,
        "num_buckets_automatic": True,
    }
    assert set(EXTRAS) == changed.keys() | {"trained_num_buckets"}
    ours.ReformerConfig(**changed).save_pretrained(tmp_path / "a")
    hf_configuration.ReformerConfig.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    again = ours.ReformerConfig.from_pretrained(tmp_path / "b")
    for name, value in changed.items():
        assert getattr(ours.ReformerConfig(), name) != value
        assert getattr(again, name) == value, name


@pytest.mark.floor
@pytest.mark.parametrize("field", RETIRED)
def test_retired_fields_are_read_in_silence(field, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "reformer", field: RETIRED[field]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = ours.ReformerConfig.from_pretrained(tmp_path)
    assert config.local_num_chunks_before == 1
    assert config.feed_forward_size == 512
    assert config.lsh_attention_probs_dropout_prob == 0.0


@pytest.mark.floor
def test_unknown_fields_are_kept_and_misspelt_ones_warn(tmp_path):
    assert ours.ReformerConfig(my_own_note=3).my_own_note == 3
    with pytest.warns(UserWarning, match=r"'num_hashs'.*'num_hashes'"):
        ours.ReformerConfig(num_hashs=2)


def test_the_depth_is_that_of_the_layer_list():
    assert ours.ReformerConfig(attn_layers=["lsh"] * 7).num_hidden_layers == 7
    with pytest.raises(ValueError, match="num_hidden_layers"):
        ours.ReformerConfig(attn_layers=["lsh"] * 7, num_hidden_layers=6)


@pytest.mark.parametrize("name", CLASSES)
def test_every_model_class_takes_the_configuration(name):
    model = build(name)
    assert model.config_class is ours.ReformerConfig
    assert isinstance(model.config, ours.ReformerConfig)
    assert model.config.keys_to_ignore_at_inference == ["past_buckets_states"]


# The automatic bucket count (SEMANTICS 1.4). Chunk 4, table 72: at T tokens, K = 2^(bit_length(2T/4) - 1), and counts
# above 2*max(isqrt(18), 4) = 8 are factorised.


def automatic(**changes):
    return build(num_buckets=None, hash_seed=None, **changes)


def saved_fields(model, folder):
    model.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


def test_evaluation_never_changes_the_configuration(tmp_path):
    model = automatic()
    before = model.config.to_dict()
    with torch.no_grad():
        for length in (3, 8, 70):
            model(ids(1, length))
    assert model.config.to_dict() == before
    saved = saved_fields(model, tmp_path)
    assert saved["num_buckets"] is None
    assert saved["num_buckets_automatic"] is False


def test_evaluation_derives_the_count_anew_for_each_length():
    model = build(num_buckets=None).double()
    for length, count in ((8, 4), (16, 8), (40, [4, 4]), (70, [4, 8])):
        fixed = build(num_buckets=count).double()
        with torch.no_grad():
            assert torch.equal(model(ids(2, length)).logits, fixed(ids(2, length)).logits), length
    other = build(num_buckets=2).double()
    assert relative_error(other(ids(2, 40)).logits, model(ids(2, 40)).logits) > 0.01


def test_training_records_the_longest_length_and_saving_writes_it(tmp_path):
    model = automatic().train()
    for length in (16, 40, 9):
        model(ids(1, length))
    assert model.config.num_buckets is None
    assert model.config.trained_num_buckets == [4, 4]
    saved = saved_fields(model, tmp_path / "a")
    assert saved["num_buckets"] == [4, 4]
    assert saved["num_buckets_automatic"] is True
    assert model.config.num_buckets is None, "saving must not change the live configuration"
    assert hf_configuration.ReformerConfig.from_pretrained(tmp_path / "a").num_buckets == [4, 4]
    short = automatic().train()
    short(ids(1, 16))
    assert saved_fields(short, tmp_path / "b")["num_buckets"] == 8


def test_inference_reuses_the_recorded_count_and_resumed_training_stays_automatic(tmp_path):
    model = build(num_buckets=None).double().train()
    model(ids(1, 40))
    model.save_pretrained(tmp_path / "a")
    loaded = ours.ReformerModelWithLMHead.from_pretrained(tmp_path / "a", dtype=torch.float64)
    fixed = build(num_buckets=[4, 4]).double()
    fresh = build(num_buckets=None).double()
    with torch.no_grad():
        tokens = ids(2, 24)
        assert torch.equal(loaded(tokens).logits, fixed(tokens).logits)
        assert relative_error(loaded(tokens).logits, fresh(tokens).logits) > 0.01
    before = loaded.config.to_dict()
    loaded(tokens)
    assert loaded.config.to_dict() == before
    loaded.train()
    assert torch.equal(loaded(tokens).logits, fresh.train()(tokens).logits)
    assert saved_fields(loaded, tmp_path / "b")["num_buckets"] == [4, 4], "a shorter length does not lower it"
    loaded(ids(1, 70))
    saved = saved_fields(loaded, tmp_path / "c")
    assert saved["num_buckets"] == [4, 8]
    assert saved["num_buckets_automatic"] is True


def test_a_count_set_by_hand_stays(tmp_path):
    model = build(num_buckets=6).train()
    model(ids(1, 40))
    saved = saved_fields(model, tmp_path)
    assert (saved["num_buckets"], saved["num_buckets_automatic"]) == (6, False)


def test_a_model_without_lsh_records_nothing(tmp_path):
    model = automatic(attn_layers=["local"]).train()
    model(ids(1, 40))
    assert saved_fields(model, tmp_path)["num_buckets"] is None


def test_absent_kinds_may_leave_their_fields_empty():
    empty = {"chunk_length": None, "num_chunks_before": None, "num_chunks_after": None}
    for kind, other in (("lsh", "local"), ("local", "lsh")):
        nothing = {f"{kind}_{name}" if "num" in name else f"{kind}_attn_{name}": value for name, value in empty.items()}
        nothing[f"{kind}_attention_probs_dropout_prob"] = None
        model = build(attn_layers=[other], **nothing)
        assert model(ids(1, 21)).logits.shape == (1, 21, 29)
        with pytest.raises(ValueError, match=f"{kind}_num_chunks_before"):
            build(attn_layers=[kind], **nothing)


def test_the_base_model_may_be_causal_or_not():
    for is_decoder in (False, True):
        build("ReformerModel", is_decoder=is_decoder)
        build("ReformerForSequenceClassification", is_decoder=is_decoder)
        build("ReformerForQuestionAnswering", is_decoder=is_decoder)


@pytest.mark.parametrize("name", CLASSES)
def test_models_build_from_the_defaults(name):
    changes = {**causal(name), "hidden_size": 64, "axial_pos_embds_dim": (16, 48), "attn_layers": ["local", "lsh"]}
    model = getattr(ours, name)(ours.ReformerConfig(**changes)).eval()
    assert model(torch.randint(320, (1, 130)))[0].shape[0] == 1
    assert fields()["num_buckets"] == 4
