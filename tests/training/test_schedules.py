"""What changes as a run goes: rounds of hashing, lengths of sequences, and positions that grow with them."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from flash_reformer.training import ranks, resume_clm, train_clm
from flash_reformer.training.lengths import fitting_shape, grow_positions
from flash_reformer.training.presets import axial_shape
from flash_reformer.training.schedules import Schedule
from flash_reformer.training.settings import CausalSettings
from tests.training.runs import QUICK, TINY, Interrupt, weights


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {index} of a text that repeats itself\n" for index in range(300)))
    return str(path)


def test_a_schedule_holds_each_value_from_its_start_on():
    by_step = Schedule.parse("0:1, 10:2,25:7", "rounds", low=1)
    assert [by_step.at(step, 0.99) for step in (0, 9, 10, 24, 25, 10**6)] == [1, 1, 2, 2, 7, 7]
    by_fraction = Schedule.parse("0:1,0.29:2,.9:4", "rounds", low=1)
    assert [by_fraction.at(step, step / 100) for step in (0, 28, 29, 89, 90, 100)] == [1, 1, 2, 2, 4, 4]
    assert Schedule.parse("0:3", "rounds", low=1).at(5, 0.5) == 3


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("", "must be START:VALUE pairs"),
        ("0:1,,5:2", "must be START:VALUE pairs"),
        ("0:-1", "must be START:VALUE pairs"),
        ("0:1.5", "must be START:VALUE pairs"),
        ("5:1", "must begin at 0"),
        ("0:1,5:2,5:3", "must have rising starts"),
        ("0:1,0.5:2,7:3", "all steps or all fractions"),
        ("0:1,1.0:2", "below 1"),
        ("0:1,4:0", "values of at least 1, got '0:1,4:0'"),
    ],
)
def test_what_is_no_schedule_is_refused_by_the_name_of_the_setting(written, message):
    with pytest.raises(ValueError, match=f"num_hashes_schedule.*{message}"):
        CausalSettings(num_hashes_schedule=written)


class Watch(TrainerCallback):
    """Notes what the model is given: rounds and shape of the input, in training and evaluation."""

    def __init__(self) -> None:
        self.trained: list[tuple[int | None, tuple[int, ...]]] = []
        self.judged: list[tuple[int | None, tuple[int, ...]]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def note(module, positional, given):
            seen = self.trained if module.training else self.judged
            seen.append((given.get("num_hashes"), tuple(given["input_ids"].shape)))

        model.register_forward_pre_hook(note, with_kwargs=True)


def test_rounds_follow_the_schedule_and_evaluation_takes_its_own(text, tmp_path):
    asked = {**QUICK, "text": (text,), "num_hashes_schedule": "0:1,0.5:2,0.9:3", "max_steps": 10, "eval_interval": 5}
    watch = Watch()
    train_clm({**asked, "output": str(tmp_path / "a"), "eval_num_hashes": 5}, TINY, callbacks=[watch])
    assert [rounds for rounds, _ in watch.trained] == 5 * [1] + 4 * [2] + [3]
    assert {rounds for rounds, _ in watch.judged} == {None}  # the config's
    assert ReformerConfig.from_pretrained(tmp_path / "a").num_hashes == 5
    assert ReformerConfig.from_pretrained(tmp_path / "a" / "checkpoint-10").num_hashes == 5
    train_clm({**asked, "output": str(tmp_path / "b"), "max_steps": 2}, TINY)
    assert ReformerConfig.from_pretrained(tmp_path / "b").num_hashes == 3


def test_many_rounds_in_evaluation_change_nothing_in_training(text, tmp_path):
    asked = {**QUICK, "text": (text,), "save_interval": 3}
    plain = train_clm({**asked, "output": str(tmp_path / "a")}, {**TINY, "num_hashes": 2})
    watch = Watch()
    with pytest.raises(KeyboardInterrupt):
        train_clm(
            {**asked, "output": str(tmp_path / "b"), "eval_num_hashes": 4},
            {**TINY, "num_hashes": 2},
            callbacks=[Interrupt(4)],
        )
    more = resume_clm({"output": str(tmp_path / "b")}, callbacks=[watch])
    assert [rounds for rounds, _ in watch.trained] == 3 * [2]
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert plain.metrics["held_out_bits_per_byte"] != more.metrics["held_out_bits_per_byte"]
    assert ReformerConfig.from_pretrained(tmp_path / "b").num_hashes == 4


LENGTHS = {"seq_len_schedule": "0:32,0.5:64,0.75:300", "seq_len": 300, "max_steps": 8, "batch_size": 2}


@pytest.mark.parametrize("grows", [False, True])
def test_sequences_get_longer_and_a_run_resumes_across_that(text, tmp_path, grows):
    asked = {**QUICK, **LENGTHS, "text": (text,), "held_out": 0.1, "grow_positions": grows, "streaming": grows}
    asked |= {"save_interval": 1, "save_total_limit": 99, "eval_interval": 4}
    watch, told = Watch(), []
    whole = train_clm({**asked, "output": str(tmp_path / "whole")}, TINY, callbacks=[watch], report=told.append)
    shapes = [shape for _, shape in watch.trained]
    assert shapes == 4 * [(18, 32)] + 2 * [(8, 64)] + 2 * [(2, 300)]
    tokens = sum(rows * length for rows, length in shapes)
    assert whole.metrics["tokens"] == told[-1].tokens == tokens
    history = whole.metrics["history"]
    assert [entry["eval_seq_len"] for entry in history if "eval_seq_len" in entry] == [32, 32, 300]
    grid = tuple(axial_shape(300))
    saved = [ReformerConfig.from_pretrained(tmp_path / "whole" / f"checkpoint-{step}") for step in (1, 5, 8)]
    shown = [config.axial_pos_shape for config in saved]
    assert shown == ([fitting_shape(grid, length) for length in (32, 64, 300)] if grows else 3 * [grid])
    a = weights(tmp_path / "whole")
    for stop in (4, 6) if grows else (5,):  # at the end of a stage, at the end of another, or within one
        output = tmp_path / f"broken-{stop}"
        output.mkdir()
        (output / "run.json").write_text(
            (tmp_path / "whole" / "run.json").read_text().replace(str(tmp_path / "whole"), str(output))
        )
        resumed = resume_clm({"output": str(output)}, resume_from=copied(tmp_path / "whole", output, stop))
        b = weights(output)
        assert all(torch.equal(a[name], b[name]) for name in a), stop
        assert resumed.metrics["held_out_bits_per_byte"] == whole.metrics["held_out_bits_per_byte"]
        assert resumed.metrics["tokens"] == tokens


def copied(run: Path, output: Path, step: int) -> str:
    """Put a checkpoint of a run into another folder, as if that run had been stopped after it."""
    shutil.copytree(run / f"checkpoint-{step}", output / f"checkpoint-{step}")
    return str(output / f"checkpoint-{step}")


def language_model(**fields) -> ReformerModelWithLMHead:
    torch.manual_seed(0)
    sizes = {**TINY, "axial_pos_shape": (4, 8), "axial_pos_embds_dim": (4, 12), "vocab_size": 20, "is_decoder": True}
    return ReformerModelWithLMHead(ReformerConfig(**{**sizes, **fields}))


@pytest.mark.parametrize("axial", [True, False])
def test_growing_keeps_old_positions_and_what_the_optimizer_knows_of_them(axial):
    model = language_model(axial_pos_embds=axial, max_position_embeddings=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(20, (2, 32))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    old = [parameter.detach().clone() for parameter in model.get_position_embeddings().parameters()]
    moments = [dict(optimizer.state[p]) for p in model.get_position_embeddings().parameters()]
    count = len(optimizer.state)
    state = torch.get_rng_state()
    grow_positions(model, 32, 7, optimizer)  # nothing to do
    assert [p.shape for p in model.get_position_embeddings().parameters()] == [each.shape for each in old]
    grow_positions(model, 57, 7, optimizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.max_length_of_positions == (64 if axial else 57)
    new = list(model.get_position_embeddings().parameters())
    drawn = new[0].detach()[old[0].shape[0] :]
    assert new[0].shape[0] == (8 if axial else 57)
    assert len(optimizer.state) == count
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    for before, after, moment in zip(old, new, moments, strict=True):
        size = before.shape[0]
        assert torch.equal(after[:size], before)
        if after.shape != before.shape:
            assert (after[size:] != 0).all()
        for name in ("exp_avg", "exp_avg_sq"):
            grown = optimizer.state[after][name]
            assert grown.shape == after.shape
            assert torch.equal(grown[:size], moment[name])
            assert (moment[name] != 0).any()
            assert not grown[size:].any()
        assert optimizer.state[after]["step"] == 1
    again = language_model(axial_pos_embds=axial, max_position_embeddings=32)
    grow_positions(again, 57, 7)
    kept = 4 if axial else 32
    assert torch.equal(next(again.get_position_embeddings().parameters())[kept:], drawn)
    ids = torch.randint(20, (2, 57))
    before = new[0].detach().clone()
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert (new[0][-1] != before[-1]).any()


def test_a_saved_model_grows_to_longer_sequences(text, tmp_path):
    train_clm({**QUICK, "text": (text,), "output": str(tmp_path / "a")}, TINY)
    asked = {**QUICK, "text": (text,), "held_out": 0.1, "seq_len": 200, "init_from": str(tmp_path / "a")}
    with pytest.raises(ValueError, match=r"at most 64, .* got 200; or let them grow with grow_positions"):
        train_clm({**asked, "output": str(tmp_path / "b")})
    train_clm({**asked, "output": str(tmp_path / "b"), "grow_positions": True, "max_steps": 1, "learning_rate": 1e-9})
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    rows = "reformer.embeddings.position_embeddings.weights.0"
    assert a[rows].shape[0] == 8
    assert b[rows].shape[0] == 25
    assert torch.allclose(b[rows][:8], a[rows], atol=1e-6)
    saved = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert saved["model_max_length"] == 200


@pytest.mark.parametrize(
    ("asked", "sizes", "message"),
    [
        ({"num_hashes_schedule": "0:1"}, {"attn_layers": ["local"]}, "num_hashes_schedule would have no effect"),
        ({"eval_num_hashes": 2}, {"attn_layers": ["local"]}, "eval_num_hashes would have no effect"),
        ({"eval_num_hashes": 0}, {}, "eval_num_hashes must be at least 1"),
        ({"seq_len_schedule": "0:1"}, {}, "values of at least 2"),
        ({"seq_len_schedule": "0:32", "seq_len": 64}, {}, "seq_len must be 32, the longest of seq_len_schedule"),
        ({"seq_len_schedule": "0:32,0.5:64", "max_epochs": 1}, {}, "max_epochs contradict each other"),
        ({"seq_len_schedule": "0:32,0.5:64", "max_minutes": 1}, {}, "needs max_steps alone"),
        ({"seq_len_schedule": "0:32,3:64", "keep": "best"}, {}, "contradicts keep 'best'"),
        ({"seq_len_schedule": "0:32,3:64", "early_stopping": 2}, {}, "contradicts early_stopping 2"),
        ({"seq_len_schedule": "0:32,3:64"}, {"axial_pos_shape": [4, 8]}, "seq_len must be at most 32"),
    ],
)
def test_schedules_that_cannot_be_kept_are_refused(asked, sizes, message, text, tmp_path):
    quick = {name: value for name, value in QUICK.items() if name != "seq_len"}
    sizes = {**TINY, **sizes}
    if sizes["attn_layers"] == ["local"]:
        sizes = {name: value for name, value in sizes.items() if not name.startswith("lsh")}
    with pytest.raises(ValueError, match=message):
        train_clm({**quick, "text": (text,), "output": str(tmp_path / "run"), **asked}, sizes)
    assert not (tmp_path / "run").exists()


def test_growing_in_several_processes_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="grow_positions works in one process"):
        train_clm({**QUICK, "text": (text,), "output": str(tmp_path / "run"), "grow_positions": True}, TINY)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("length", [256, 1000, 4096, 65_536, 262_144, 524_288, 1_048_576])
def test_every_length_has_a_table_about_as_wide_as_high(length):
    rows, columns = axial_shape(length)
    assert length <= rows * columns < length + columns
    assert 0.5 <= rows / columns <= 2
    assert math.log2(columns).is_integer()


def test_text_shorter_than_a_sequence_is_said_and_trains(text, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("word " * 60)
    asked = {**QUICK, "text": (str(short),), "held_out": 0.2, "output": str(tmp_path / "run"), "max_steps": 1}
    with pytest.warns(UserWarning, match="seq_len is 1048576") as said:
        train_clm({**asked, "seq_len": 1_048_576}, {**TINY, "hidden_size": 4, "attention_head_size": 4})
    assert [str(each.message).split(":")[0] for each in said] == [
        f"seq_len is 1048576, but the {kind} text has {tokens} tokens"
        for kind, tokens in (("training", 242), ("held-out", 62))
    ]
    assert ReformerConfig.from_pretrained(tmp_path / "run").max_length_of_positions == 1_048_576
