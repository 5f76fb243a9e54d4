"""The example for Ray trains with two workers as ranks of one run."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed"),
]


def test_two_workers_train_together(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hash, sort, chunk, attend; reversibly. " * 200, encoding="utf-8")
    command = [str(ROOT / "examples" / "ray_train.py"), "text.txt", "run", "--max-steps", "3", "--seq-len", "64"]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "3 steps, held-out bits per byte" in done.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text("utf-8"))
    # Counted over both workers.
    assert metrics["tokens"] == 2 * 3 * 64
    assert load_file(tmp_path / "run" / "model.safetensors")
    assert (tmp_path / "run" / "checkpoint-3" / "rng_state_1.pth").is_file()
