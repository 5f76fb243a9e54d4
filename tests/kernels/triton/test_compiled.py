"""Kernels compile for devices that are not here, without spills where that was promised, in the memory there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

#: Shared memory that leaves room for two programs on either architecture.
MOST_SHARED = 100 * 1024
#: Bytes of registers that a kernel may spill where nothing is promised.
MOST_SPILLED = 1024


def compiled(folder: Path, capability: int, *jobs: str) -> list[dict[str, Any]]:
    """Rows of the table, made by a process of its own: this one interprets kernels."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, "-m", "tests.kernels.triton.compiled", f"--capability={capability}", *jobs]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=root, timeout=300)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {row["job"] for row in rows} == set(jobs)
    return rows


@pytest.mark.floor
@pytest.mark.parametrize(
    ("capability", "jobs", "spill"),
    [
        (90, ["lsh bf16 C64 D64", "lsh bf16 C256 D128 R4", "local bf16 C128 D128"], False),
        (80, ["lsh bf16 C64 D64", "local bf16 C128 D128"], True),
        pytest.param(90, ["lsh fp32 C64 D64", "lsh fp16 C32 D32, every option"], True, marks=pytest.mark.full),
    ],
    ids=["bf16 on sm_90a", "bf16 on sm_80", "others on sm_90a"],
)
def test_kernels_compile(capability: int, jobs: Sequence[str], spill: bool, tmp_path: Path) -> None:
    rows = compiled(tmp_path, capability, *jobs)
    for job in jobs:
        kernels = {row["kernel"].split()[0] for row in rows if row["job"] == job}
        assert kernels >= {"attend_kernel", "delta_kernel", "attend_backward_kernel"}
    for row in rows:
        assert row["spilled"] <= (MOST_SPILLED if spill else 0), row
        assert row["shared"] <= MOST_SHARED, row
