"""Dry runs: what they count, what they measure, and that they leave nothing behind."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch

from flash_reformer import buffers
from flash_reformer.training import calibration, dry_run, estimate, memory, train_clm
from flash_reformer.training.budget import Budget
from flash_reformer.training.building import build_model
from flash_reformer.training.calibration import Calibration, Request, calibrate, cut
from flash_reformer.training.settings import CausalSettings
from flash_reformer.training.tasks.causal import CausalLanguageModelling
from flash_reformer.training.vocabulary import Vocabulary
from tests.cli.test_cli import complaint, run
from tests.training.runs import QUICK, TINY

SIZES = (
    "--layers local,lsh --hidden-size 16 --num-heads 2 --head-size 8 --feed-forward-size 16 --local-chunk-length 4 "
    "--lsh-chunk-length 16 --seq-len 64 --cpu --max-steps 3 --batch-size 2 --eval-sequences 2"
).split()


@pytest.fixture
def measured(monkeypatch):
    """Calibrations in no process of their own, with numbers that are given; the request that was made is kept."""
    kept = {}

    def answer(request):
        kept["request"] = request
        return kept["answer"]

    monkeypatch.setattr(estimate, "_in_fresh_process", answer)
    kept["answer"] = Calibration(
        length=64, steps=3, says=["3 steps"], seconds=1.0, micro_step=2.0, optimizer=0.5, evaluation=0.25, save=0.125,
        peak=10_000_000, baseline=500_000_000,
    )  # fmt: skip
    return kept


def asked(text, **changes):
    return {**QUICK, "text": (text,), **changes}


def test_a_dry_run_measures_steps_and_writes_nothing(text, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "SECONDS", 1.0)
    state, folder = torch.get_rng_state(), tmp_path / "run"
    before = sorted(tmp_path.rglob("*"))
    result = run("train", "clm", "--text", text, "--output", folder, *SIZES, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(state, torch.get_rng_state())
    says = result.stdout
    model = build_model(CausalLanguageModelling(CausalSettings(text=(text,), seq_len=64), Vocabulary.of_bytes()), TINY)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert f"parameters: {counted:,}" in says
    for part in ("lsh attention", "weights", "optimizer", "streams", "buckets", "calibration", "64 tokens per row"):
        assert part in says
    assert "3 steps" in says
    assert "4 evaluations" in says  # before the first step and after each of three, six being asked for
    assert result.stderr == ""


def test_a_dry_run_is_of_a_new_run(text, tmp_path):
    for more in (["--resume"], ["--overwrite"]):
        said = complaint("train", "clm", "--output", tmp_path, "--dry-run", *more)
        # Whichever of the two speaks, it names the other.
        assert "it contradicts" in said
        assert "--dry-run" in said
        assert more[0] in said


def test_parameters_are_counted_by_part(text, measured):
    found = dry_run("clm", asked(text), TINY)
    assert found.parameters["word embeddings"] == 258 * 16
    assert found.parameters["position embeddings"] == 8 * 4 + 8 * 12
    assert found.parameters["lsh attention"] == 16 * 16 * 3 + 2 * 16  # query-key, value, output; norm
    assert found.parameters["local attention"] == 16 * 16 * 4 + 2 * 16
    assert found.parameters["feed-forward"] == 2 * (16 * 16 * 2 + 2 * 16 + 2 * 16)
    assert found.parameters["final norm"] == 2 * 32
    assert found.parameters["head"] == 32 * 258 + 258


def test_memory_is_what_was_measured_and_its_parts_are_counted(text, measured):
    found = dry_run("clm", asked(text, batch_size=2), {**TINY, "num_hashes": 3})
    weights = 4 * sum(found.parameters.values())
    assert found.memory["weights"] == found.memory["gradients"] == weights
    assert found.memory["optimizer (two moments)"] == 2 * weights
    assert found.memory["streams, low parts and their gradients"] == 6 * 4 * 2 * 64 * 16
    assert found.memory["buckets kept by LSH layers"] == 2 * 2 * 2 * 3 * 64
    assert found.memory_peak - found.memory["data"] == 10_000_000
    assert found.memory[estimate.OTHER] > 0
    measured["answer"] = dataclasses.replace(measured["answer"], peak=None)
    assert estimate.OTHER not in dry_run("clm", asked(text), TINY).memory


def test_longer_rows_than_were_measured_take_more_by_the_law(text, measured):
    answer = {"length": 16, "bytes_per_token": 1000.0, "kept": 500}
    measured["answer"] = dataclasses.replace(measured["answer"], **answer)
    found = dry_run("clm", asked(text), {**TINY, "attn_layers": ["lsh", "lsh", "lsh"]})
    # 48 tokens more, the buckets of two more layers, and four times the freed results.
    beyond = 48 * 1000 + 2 * 2 * 2 * 48 + 3 * 500
    assert found.memory_peak - found.memory["data"] == 10_000_000 + beyond
    # Time is stretched in proportion.
    assert found.seconds_per_step == pytest.approx(4 * 2.0 + 0.5, abs=0.05)
    assert found.seconds_per_evaluation == pytest.approx(4 * 0.25 * 2)


@pytest.mark.parametrize(
    ("changes", "evaluations", "saves"),
    [
        ({"max_steps": 13}, 7, 6),
        ({"max_steps": 13, "eval_interval": 4, "save_interval": 6}, 5, 3),
        ({"max_steps": 7, "keep": "best", "eval_interval": 3, "save_interval": 7}, 4, 3),
    ],
)
def test_the_time_of_a_run_counts_what_it_does(changes, evaluations, saves, text, measured, tmp_path):
    found = dry_run("clm", asked(text, **changes, gradient_accumulation=2), TINY)
    assert (found.steps, found.evaluations, found.saves) == (changes["max_steps"], evaluations, saves)
    assert found.seconds_per_step == pytest.approx(2 * 2.0 + 0.5, abs=0.05)
    expected = found.steps * 4.5 + evaluations * 2 * 0.25 + saves * 0.125
    assert found.seconds == pytest.approx(expected, rel=0.02)
    history = train_clm(asked(text, **changes, output=str(tmp_path / "run")), TINY).metrics["history"]
    assert sum("eval_loss" in entry for entry in history) == evaluations


def test_minutes_hold_as_many_steps_as_fit(text, measured):
    found = dry_run("clm", asked(text, max_steps=None, max_minutes=10.0), TINY)
    assert found.seconds == pytest.approx(600, abs=5)
    assert found.evaluations == 7
    assert dry_run("clm", asked(text, max_steps=5, max_minutes=10.0), TINY).steps == 5


def test_many_steps_are_counted_quickly():
    settings = CausalSettings(eval_interval=1000, save_interval=500)
    assert estimate._counts(settings, Budget(1_000_000, None), 1.0, 1.0, 1.0) == (1_000_000, 1001, 2000)


def test_what_train_would_refuse_is_refused(text, measured):
    with pytest.raises(ValueError, match="no text to train on"):
        dry_run("clm", QUICK, TINY)
    with pytest.raises(ValueError, match="seq_len must be at most 64"):
        dry_run("clm", asked(text, seq_len=65), {**TINY, "axial_pos_shape": [8, 8]})
    assert "request" not in measured


def test_several_processes_are_refused(text, measured, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="a dry run is of one process"):
        dry_run("clm", asked(text), TINY)


@pytest.mark.parametrize("changes", [{"streaming": True}, {"seq_len_schedule": "0:32,0.5:64", "grow_positions": True}])
def test_a_stream_is_measured_at_its_longest(changes, text, measured):
    found = dry_run("clm", asked(text, **changes), TINY)
    assert {batch["input_ids"].shape for batch in measured["request"].training} == {(1, 64)}
    assert math.prod(measured["request"].config["axial_pos_shape"]) >= 64
    assert found.seconds_per_step == pytest.approx(2.0 + 0.5, abs=0.05)


def test_rounds_that_change_count_as_long_as_they_last(text, measured):
    measured["answer"].by_rounds = [1.0, 0.25]
    found = dry_run("clm", asked(text, max_steps=8, num_hashes_schedule="0:4,6:1"), TINY)
    assert {batch["num_hashes"] for batch in measured["request"].training} == {4}
    assert found.seconds_per_step == pytest.approx((6 * 2.0 + 2 * 0.5) / 8 + 0.5, abs=0.05)
    ratios = calibrate(dataclasses.replace(measured["request"], threads=1, seconds=1.0)).by_rounds
    assert ratios[0] == 1.0
    assert ratios[1] > 0


@pytest.mark.parametrize("changes", [{"sequence_parallel": 2}, {"parallel": "fsdp"}, {"static_graph": True}])
def test_what_is_about_ranks_is_refused(changes, text, measured):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} .* is about ranks, and a dry run is of one process"):
        dry_run("clm", asked(text, **changes), TINY)


def test_a_calibration_that_dies_says_why(text, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false" if os.path.exists("/bin/false") else "/usr/bin/false")
    with pytest.raises(RuntimeError, match="the calibration failed with exit code 1: it said nothing"):
        dry_run("clm", asked(text), TINY)


def request_of(text, measured, **changes) -> Request:
    dry_run("clm", asked(text, **changes), TINY)
    return measured["request"]


def test_a_step_that_fits_is_measured_whole(text, measured):
    found = calibrate(dataclasses.replace(request_of(text, measured), threads=1, seconds=2.0))
    assert found.length == 64
    assert found.bytes_per_token == 0.0
    assert min(found.micro_step, found.optimizer, found.evaluation, found.save) > 0
    assert found.micro_step < found.seconds


def test_a_step_that_does_not_fit_is_extrapolated(text, measured, monkeypatch):
    """With no time at all, only the shortest steps are run, and the law of memory from a model of two layers."""
    monkeypatch.setattr(calibration, "_LOOK", 16)
    for name in ("_c_library", "_set_mmap"):
        monkeypatch.setattr(calibration, name, lambda *_: None, raising=False)
    limits = []
    monkeypatch.setattr(buffers, "keep_results", limits.append)
    found = calibrate(dataclasses.replace(request_of(text, measured), threads=1, seconds=1e-3))
    assert found.length == 16
    assert limits == [0]
    assert found.bytes_per_token >= 0.0
    assert "a model of local and lsh alone" in found.says[1] or "the model" in found.says[1]


def test_what_is_cut_stays_inside():
    batch = {"input_ids": torch.arange(12).view(2, 6), "start_positions": torch.tensor([5, 1]), "return_logits": False}
    found = cut(batch, 4)
    assert found["input_ids"].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert found["start_positions"].tolist() == [3, 1]
    assert found["return_logits"] is False


def test_freed_results_are_kept_as_far_as_an_estimate_says():
    assert buffers._results._kept.limit == estimate.KEPT_AT_MOST
    buffers.keep_results(0)
    try:
        assert buffers.kept_results() == 0
        buffers.keep_results(estimate.KEPT_AT_MOST)
        tensor = buffers.empty((2**20,), torch.float32)
        del tensor
        assert buffers.kept_results() == 4 * 2**20
    finally:
        buffers.keep_results(0)
        buffers.keep_results(estimate.KEPT_AT_MOST)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are reset by Linux")
def test_a_peak_is_forgotten():
    meter = calibration.Meter(torch.device("cpu"))
    block = bytearray(b"x" * 2**27)
    high = meter.peak()
    del block
    meter.reset()
    if Path("/proc/self/clear_refs").exists() and os.access("/proc/self/clear_refs", os.W_OK):
        assert meter.peak() < high - 2**26
    assert json.dumps(memory.peak_memory())
