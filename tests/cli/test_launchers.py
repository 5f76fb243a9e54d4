"""The command line under torchrun: two ranks are one run, with one voice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flash_reformer.cli import main

FLAGS = (
    "--text text.txt --seq-len 48 --max-steps 2 --cpu --layers local --hidden-size 16 --num-heads 2 --head-size 8 "
    "--feed-forward-size 16 --hidden-dropout 0 --local-attention-dropout 0 --sample-tokens 0 --warmup-steps 0"
)


def on_two_ranks(flags: str, folder: Path) -> subprocess.CompletedProcess[str]:
    launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 -m flash_reformer.cli train clm"
    return subprocess.run(
        [sys.executable, *launcher.split(), *flags.split()],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_two_ranks_are_one_run_with_one_voice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text("hash, sort, chunk, attend; reversibly. " * 100, encoding="utf-8")
    done = on_two_ranks(f"{FLAGS} --output two", tmp_path)
    assert done.returncode == 0, done.stderr
    for line in ("step 0: held-out", "parameters, 2 steps, 192 tokens in", "loss curve (PNG):"):
        assert done.stdout.count(line) == 1, done.stdout
    assert (tmp_path / "two" / "checkpoint-2" / "rng_state_1.pth").is_file()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", f"flash-reformer train clm {FLAGS} --batch-size 2 --output one".split())
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code in (0, None)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-6

    again = on_two_ranks(f"{FLAGS} --output two", tmp_path)
    assert again.returncode == 1
    assert again.stderr.count("error: --output two already holds a run") == 1, again.stderr
    assert "rank 0: error: --output two already holds a run" in again.stderr
    assert again.stderr.count("in prepare_folder") == 0


def test_a_rank_that_follows_says_nothing_of_wrong_flags(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flash_reformer.cli.GRACE", 0.0)
    monkeypatch.setattr(sys, "argv", "flash-reformer train clm --typo".split())
    codes = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as left:
            main()
        codes.append(left.value.code)
        assert ("No such option" in capsys.readouterr().err) == (rank == "0")
    assert codes == [2, 2]
