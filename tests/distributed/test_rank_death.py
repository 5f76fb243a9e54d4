"""A rank that dies, is told to stop or computes a NaN: every rank stops, says why, and the run goes on afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flash_reformer.training.checkpoints import own_checkpoints

from . import dying

MODEL = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 16,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "axial_norm_std": 0.02,
    "hidden_dropout_prob": 0.1,
}
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def plan(folder: Path, output: str, **fault: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text("".join(f"line {index} of a text that repeats itself\n" for index in range(40)))
    asked = {"text": [str(text)], "seq_len": 64, "max_steps": 6, "save_interval": 2, "eval_interval": 3, "cpu": True}
    asked |= {"eval_sequences": 2, "sample_tokens": 0, "learning_rate": 1e-2, "output": str(folder / output)}
    return {"asked": asked, "model": MODEL, "place": str(folder / "place"), **fault}


def run(plans: list[dict[str, Any]], *launcher: str) -> str:
    """Run plans; return what stderr said."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *launcher, dying.__file__, json.dumps(plans)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def ends(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(Path(plan["place"], f"rank-{rank}.json").read_text()) for rank in range(dying.RANKS)]


def check_same(whole: Path, broken: Path) -> None:
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    last = own_checkpoints(whole)[-1].name
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        assert (whole / last / name).read_bytes() == (broken / last / name).read_bytes(), name


def lives(folder: Path, *faults: tuple[str, dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Let runs live one after the other; return how the ranks of each one ended."""
    plans = [
        {**plan(folder, name, **fault), "place": str(folder / f"place-{number}")}
        for number, (name, fault) in enumerate(faults)
    ]
    run(plans)
    return [ends(each) for each in plans]


def test_a_rank_that_dies_stops_the_others_and_the_run_goes_on(tmp_path):
    fault = {"fault": "SIGKILL", "step": 4}
    whole, killed, went_on = lives(tmp_path, ("whole", {}), ("broken", fault), ("broken", {}))
    assert [end["said"] for end in (*whole, *went_on)] == ["ended"] * 4
    assert killed[1]["said"] == "SIGKILL"
    said = r"LostRankError: rank 0 has lost another rank \(.*\)\. It stopped at step \d: checkpoint-4 has the run up to"
    assert re.match(said, killed[0]["said"]), killed[0]["said"]
    assert killed[0]["seconds"] < 60
    check_same(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.full
def test_ranks_agree_on_leaving_whichever_was_told_or_has_computed_a_nan(tmp_path):
    told = ("SIGTERM", {"fault": "SIGTERM", "step": 4})
    nan = ("nan", {"fault": "nan", "step": 4})
    whole, left, went_on, spoilt = lives(tmp_path, ("whole", {}), told, ("SIGTERM", {}), nan)
    assert [end["said"] for end in (*whole, *went_on)] == ["ended"] * 4
    for end in left:
        assert end["said"].startswith("Terminated: SIGTERM at step 5: checkpoint-5 has the run up to step 5")
    for end in spoilt:
        assert "norm of the gradient is nan at step 5" in end["said"]
        assert "checkpoint-4 holds the weights before that step" in end["said"]
    check_same(tmp_path / "whole", tmp_path / "SIGTERM")


@pytest.mark.full
def test_torchrun_starts_the_ranks_again_and_the_run_ends_the_same(tmp_path):
    lives(tmp_path, ("whole", {}))
    broken = plan(tmp_path, "broken", fault="SIGKILL", step=3)
    Path(broken["place"]).mkdir()
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3")
    said = run([broken], *launcher)
    assert "exitcode: -9" in said
    assert [end["said"] for end in ends(broken)] == ["ended", "ended"]
    check_same(tmp_path / "whole", tmp_path / "broken")
