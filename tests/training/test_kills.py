"""Killed at any moment, also while a checkpoint is being written, a run ends with the weights of an undisturbed one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_reformer.training.checkpoints import own_checkpoints, partials

from . import killing

TINY = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 16,
    "local_attn_chunk_length": 16,
    "lsh_attn_chunk_length": 16,
    "axial_norm_std": 0.02,
    # Every source of randomness that a run has: dropouts, and rotations that no seed fixes.
    "hidden_dropout_prob": 0.1,
    "local_attention_probs_dropout_prob": 0.1,
    "lsh_attention_probs_dropout_prob": 0.1,
}
ASKED = {
    "seq_len": 64,
    "eval_sequences": 2,
    "learning_rate": 1e-2,
    "cpu": True,
    "gradient_accumulation": 2,
    "keep": "best",
    "eval_interval": 2,
    "save_interval": 3,
    "log_interval": 4,
}


def plan(folder: Path, task: str, *, kills: int, steps: int, steps_per_life: int = 6, **more: Any) -> dict[str, Any]:
    text = folder / "text.txt"
    text.write_text("".join(f"line {index} of a text that repeats itself\n" for index in range(60)))
    asked = {**ASKED, "text": [str(text)], "max_steps": steps, **more}
    places = {name: str(folder / name) for name in ("whole", "broken")}
    deaths = {"kills": kills, "seed": 7, "steps_per_life": steps_per_life}
    return {"task": task, "asked": asked, "model": TINY, **deaths, **places}


def killed(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Kill a run as planned; return what is known of each death."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, killing.__file__, json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["kills"]


def same(one: Any, other: Any) -> bool:
    """Say whether two states are equal, to the last bit of their tensors."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool((one == other).all()) if hasattr(one, "all") else one == other


def check_same_end(whole: Path, broken: Path) -> None:
    assert (whole / "model.safetensors").read_bytes() == (broken / "model.safetensors").read_bytes()
    last = own_checkpoints(whole)[-1].name
    assert own_checkpoints(broken)[-1].name == last
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        states = [torch.load(run / last / name, weights_only=False) for run in (whole, broken)]
        assert same(*states), name
    assert not partials(broken)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (whole, broken)]
    assert metrics[0]["kept_step"] == metrics[1]["kept_step"]
    judged = [{e["step"]: e["eval_loss"] for e in each["history"] if "eval_loss" in e} for each in metrics]
    assert judged[0] == judged[1]


def test_equality_of_states_sees_a_bit():
    state = {"a": [torch.zeros(2), 3], "b": (1.0,)}
    assert same(state, {"a": [torch.zeros(2), 3], "b": (1.0,)})
    assert not same(state, {"a": [torch.tensor([0.0, 1e-45]), 3], "b": (1.0,)})
    assert not same(state, {"a": [torch.zeros(2), 3], "b": (2.0,)})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_run_killed_three_times_ends_like_an_undisturbed_one(tmp_path):
    deaths = killed(plan(tmp_path, "clm", kills=3, steps=10, steps_per_life=4, sample_tokens=0))
    assert len(deaths) == 3
    check_same_end(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("task", ["clm", "mlm"])
def test_a_run_killed_twenty_times_ends_like_an_undisturbed_one(task, tmp_path):
    more = {"sample_tokens": 0} if task == "clm" else {"mask_unit": "token", "batch_size": 1}
    deaths = killed(plan(tmp_path, task, kills=20, steps=90, **more))
    print("\n".join(map(str, deaths)))
    assert len(deaths) == 20
    # Some died with a checkpoint half written, or between its last file and its name.
    assert sum(any("checkpoint" in name for name in death["half"]) for death in deaths) >= 3
    check_same_end(tmp_path / "whole", tmp_path / "broken")
