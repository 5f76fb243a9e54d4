import json
import math

import pytest
import torch

from flash_reformer.training import resume_clm, train_clm
from flash_reformer.training.building import build_model
from flash_reformer.training.presets import PRESETS
from flash_reformer.training.sampling import generate_text, load_language_model
from flash_reformer.training.settings import CausalSettings
from flash_reformer.training.tasks.causal import CausalLanguageModelling
from flash_reformer.training.vocabulary import Vocabulary
from tests.training.runs import QUICK, TINY, Interrupt, weights


def test_a_run_learns_and_leaves_what_it_says(text, tmp_path):
    events = []
    output = tmp_path / "run"
    result = train_clm(
        {**QUICK, "text": (text,), "output": str(output), "max_steps": 30, "sample_tokens": 5, "eval_interval": 10},
        TINY,
        report=events.append,
    )
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(result.metrics))
    assert metrics["held_out_bits_per_byte_at_start"] == pytest.approx(8.0, abs=0.4)
    assert metrics["held_out_bits_per_byte"] < 6.0
    assert metrics["steps"] == 30
    assert metrics["tokens"] == 30 * 64
    assert all(path.exists() for path in result.paths.values())
    assert (output / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (output / "loss_curve.svg").read_bytes()
    assert (output / "sample.txt").read_text() == "".join(result.sample)
    judged = [entry["step"] for entry in metrics["history"] if "eval_bits_per_byte" in entry]
    assert judged == [0, 10, 20, 30]
    kinds = [event.event for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("step") == 30
    last = events[-1]
    assert last.fraction == 1.0
    assert last.tokens == 30 * 64
    assert last.held_out == metrics["held_out_bits_per_byte"]
    assert last.tokens_per_second > 0
    assert math.isfinite(last.training)
    config = load_language_model(output).config
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id, config.is_decoder) == (258, 0, 1, True)
    assert config.use_cache is True


def test_the_same_seed_gives_the_same_run_and_another_seed_another(text, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train_clm({**QUICK, "text": (text,), "output": str(tmp_path / name), "seed": seed}, TINY)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.decoder.weight"], c["lm_head.decoder.weight"])


def test_how_often_a_run_is_judged_does_not_change_it(text, tmp_path):
    for name, interval in (("a", 1), ("b", 6)):
        train_clm({**QUICK, "text": (text,), "output": str(tmp_path / name), "eval_interval": interval}, TINY)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_ends_like_an_undisturbed_one_bit_for_bit(text, tmp_path, accumulation):
    # 70 sequences per epoch at most, so 40 steps of 2 sequences also cross an epoch's border.
    asked = {**QUICK, "text": (text,), "max_steps": 40, "save_interval": 15, "eval_interval": 20}
    asked |= {"batch_size": 2, "gradient_accumulation": accumulation}
    whole = train_clm({**asked, "output": str(tmp_path / "whole")}, TINY)
    with pytest.raises(KeyboardInterrupt):
        train_clm({**asked, "output": str(tmp_path / "broken")}, TINY, callbacks=[Interrupt(37)])
    assert (tmp_path / "broken" / "checkpoint-30").is_dir()
    torch.manual_seed(12345)
    resumed = resume_clm({"output": str(tmp_path / "broken")})
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.metrics["held_out_bits_per_byte"] == whole.metrics["held_out_bits_per_byte"]
    losses = [[e["loss"] for e in run.metrics["history"] if "loss" in e] for run in (whole, resumed)]
    assert losses[0] == losses[1]


def test_resume_refuses_what_would_make_it_another_run(text, tmp_path):
    output = str(tmp_path / "run")
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        resume_clm({"output": output})
    train_clm({**QUICK, "text": (text,), "output": output}, TINY)
    with pytest.raises(ValueError, match="already at the end"):
        resume_clm({"output": output})
    with pytest.raises(ValueError, match="seed cannot change on resume: the run has 0"):
        resume_clm({"output": output, "seed": 1})
    with pytest.raises(ValueError, match="is no checkpoint"):
        resume_clm({"output": output}, resume_from=str(tmp_path))
    longer = resume_clm({"output": output, "max_steps": 8})
    assert longer.metrics["steps"] == 8
    (tmp_path / "run" / "run.json").write_text("{]")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        resume_clm({"output": output, "max_steps": 9})


def test_minutes_bound_a_run_and_count_over_resumptions(text, tmp_path):
    asked = {**QUICK, "text": (text,), "max_steps": None, "max_minutes": 2 / 60, "output": str(tmp_path / "run")}
    result = train_clm(asked, TINY)
    assert 2 <= result.metrics["seconds"] < 15
    rates = [entry["learning_rate"] for entry in result.metrics["history"] if "learning_rate" in entry]
    assert rates[-1] < 0.5 * max(rates)
    assert 0 < result.metrics["held_out_bits_per_byte"] < 8
    with pytest.raises(ValueError, match="already at the end"):
        resume_clm({"output": str(tmp_path / "run")})


def test_init_from_goes_on_with_saved_weights(text, tmp_path):
    first = train_clm({**QUICK, "text": (text,), "output": str(tmp_path / "a")}, TINY)
    asked = {**QUICK, "text": (text,), "output": str(tmp_path / "b"), "init_from": str(tmp_path / "a")}
    second = train_clm(asked)
    assert second.metrics["held_out_bits_per_byte_at_start"] == first.metrics["held_out_bits_per_byte"]
    with pytest.raises(ValueError, match="init_from brings its own model: it contradicts hidden_size"):
        train_clm({**asked, "output": str(tmp_path / "c")}, {"hidden_size": 8})
    with pytest.raises(ValueError, match="is no saved model"):
        train_clm({**asked, "output": str(tmp_path / "c"), "init_from": str(tmp_path)})


def test_an_earlier_run_is_kept_unless_told_otherwise(text, tmp_path):
    asked = {**QUICK, "text": (text,), "output": str(tmp_path / "run")}
    train_clm(asked, TINY)
    with pytest.raises(ValueError, match="already holds a run"):
        train_clm(asked, TINY)
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    train_clm({**asked, "max_steps": 3}, TINY, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"
    with pytest.raises(ValueError, match="seq_len must be at most 64, the positions of the model; got 65"):
        train_clm({**asked, "seq_len": 65}, {**TINY, "axial_pos_shape": [8, 8]}, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(ValueError, match="already holds other files"):
        train_clm({**asked, "output": str(tmp_path / "other")}, TINY, overwrite=True)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "no text to train on"),
        ({"text": ("a",), "dataset": "b"}, "--text and --dataset contradict"),
        ({"text": ("a",), "max_steps": None}, "no end is set"),
        ({"text": ("a",), "text_column": "body"}, "text_column 'body' is about --dataset"),
        ({"text": ("a",), "output": ""}, "output is missing"),
        ({"text": ("a",), "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"text": ("a",), "learning_rate": -1.0}, "learning_rate must be a positive number"),
        ({"text": ("a",), "precision": "fp8"}, "precision must be one of fp32, bf16, fp16"),
        ({"text": ("nowhere.txt",)}, "there is no such file"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(asked, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_clm({**QUICK, "output": str(tmp_path / "run"), **asked}, TINY)
    assert not (tmp_path / "run").exists()


def language_model(text: str, seq_len: int, **fields: object) -> object:
    settings = CausalSettings(text=(text,), seq_len=seq_len)
    return build_model(CausalLanguageModelling(settings, Vocabulary.of_bytes()), {**TINY, **fields})


def test_fields_that_bytes_dictate_cannot_be_others(text):
    with pytest.raises(ValueError, match="vocab_size must be 258"):
        language_model(text, 100, vocab_size=300)
    assert math.prod(language_model(text, 100).config.axial_pos_shape) >= 100


def test_the_demo_keeps_the_default_dropouts_and_mixes_both_kinds_of_layers(text):
    preset = PRESETS["demo"]
    assert preset.training["standard_library"]
    settings = CausalSettings(**{**preset.training, "standard_library": False, "text": (text,)})
    config = build_model(CausalLanguageModelling(settings, Vocabulary.of_bytes()), preset.model).config
    assert config.hidden_dropout_prob == config.local_attention_probs_dropout_prob == 0.05
    assert config.lsh_attention_probs_dropout_prob == 0.0
    assert set(config.attn_layers) == {"local", "lsh"}
    assert preset.training["seq_len"] == 4096 == math.prod(config.axial_pos_shape)


def test_bf16_trains_on_a_cpu_and_fp16_is_refused(text, tmp_path):
    asked = {**QUICK, "text": (text,), "output": str(tmp_path / "run")}
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train_clm({**asked, "precision": "fp16"}, TINY)
    assert not (tmp_path / "run").exists()
    result = train_clm({**asked, "precision": "bf16"}, TINY)
    assert result.metrics["held_out_bits_per_byte"] < result.metrics["held_out_bits_per_byte_at_start"]


def test_generation_depends_on_its_seed_alone_and_leaves_the_generator_alone(text):
    model = language_model(text, 128).eval()
    state = torch.get_rng_state()
    first = generate_text(model, b"ab", max_new_tokens=30, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert generate_text(model, b"ab", max_new_tokens=30, seed=5) == first
    assert generate_text(model, b"ab", max_new_tokens=30, seed=6) != first
    assert generate_text(model, b"ab", max_new_tokens=5, greedy=True) == generate_text(
        model, b"ab", max_new_tokens=5, top_k=1
    )


def test_generation_refuses_more_than_the_positions_hold(text):
    model = language_model(text, 64).eval()
    assert len(generate_text(model, b"a" * 60, max_new_tokens=3)) <= 3
    with pytest.raises(ValueError, match="max_new_tokens 4 after a prompt of 60 tokens"):
        generate_text(model, b"a" * 60, max_new_tokens=4)


def test_generation_stops_where_the_model_ends_the_text(text):
    model = language_model(text, 128).eval()
    with torch.no_grad():
        model.lm_head.bias[1] = 100.0
    assert generate_text(model, b"ab", max_new_tokens=30) == b""
    with torch.no_grad():
        model.lm_head.bias[1] = 0.0
        model.lm_head.bias[67] = 100.0
    assert generate_text(model, b"ab", max_new_tokens=30) == b"A" * 30


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"greedy": True, "top_k": 3}, "contradict"),
    ],
)
def test_sampling_options_out_of_range_are_refused(options, message, text):
    model = language_model(text, 128)
    with pytest.raises(ValueError, match=message):
        generate_text(model, b"ab", **options)
