"""Does a dry run say what a run then takes? Memory and time, estimated and measured, for models from tiny to a novel's.

Run ``python -m benchmarks.dry_run`` (about ten minutes on two quiet cores) or with ``--quick`` (the small ones). Per
case a fresh process makes the dry run, and right after it another one trains: whatever else the machine does should
disturb both alike. Memory is the peak of a process while it trains, above what it had after its imports. Time is that
of the run with its evaluations and checkpoints. Errors are relative to what was measured; 20 % are allowed. Prints a
table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.depth_memory import ROOT
from benchmarks.shapes import NOVEL
from flash_reformer.training import dry_run, train
from flash_reformer.training.memory import memory_of_process, peak_of_process
from flash_reformer.training.presets import PRESETS

ALLOWED = 0.2
MB = 2**20
DEMO = PRESETS["demo"].model
_SIZES = ("hidden_size", "num_attention_heads", "attention_head_size", "feed_forward_size", "num_buckets")
NOVEL_MODEL = {
    **{name: NOVEL[name] for name in _SIZES},
    "attn_layers": ["local", "lsh"] * 3,
    "local_attn_chunk_length": 64,
    "lsh_attn_chunk_length": 64,
}
TINY = {**DEMO, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 16, "feed_forward_size": 64}
#: Name: task, settings, fields of the model; the first ones are quick.
CASES: dict[str, tuple[str, dict[str, Any], Mapping[str, Any]]] = {
    "tiny, 8 x 512": ("clm", {"seq_len": 512, "batch_size": 8, "max_steps": 60}, TINY),
    "demo, 4,096": ("clm", {"seq_len": 4096, "max_steps": 24}, DEMO),
    "demo, 4,096, bf16": ("clm", {"seq_len": 4096, "max_steps": 24, "precision": "bf16"}, DEMO),
    "masked, 8 x 512": ("mlm", {"max_steps": 24, "eval_sequences": 16}, {}),
    "demo, 4 x 1,024, 4 rounds": (
        "clm",
        {"seq_len": 1024, "batch_size": 4, "max_steps": 24},
        {**DEMO, "num_hashes": 4},
    ),
    "demo, 2 x 2,048, 4 batches a step": (
        "clm",
        {"seq_len": 2048, "batch_size": 2, "gradient_accumulation": 4, "max_steps": 8},
        DEMO,
    ),
    "novel's, 16,384": ("clm", {"seq_len": 16_384, "max_steps": 4}, NOVEL_MODEL),
    "novel's, 65,536": ("clm", {"seq_len": 65_536, "max_steps": 2}, NOVEL_MODEL),
}
QUICK = 2

Row = dict[str, Any]


def _settings(task: str, given: dict[str, Any], folder: str) -> dict[str, Any]:
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = tuple(str(path) for name in ("asyncio", "email", "json") for path in sorted((library / name).glob("*.py")))
    common = {"text": texts, "cpu": True, "output": f"{folder}/run", "eval_sequences": 2, "held_out": 0.2}
    return {**common, **({"sample_tokens": 0} if task == "clm" else {}), **given}


def estimated(name: str) -> Row:
    """Make the dry run of a case in this process."""
    task, given, model = CASES[name]
    found = dry_run(task, _settings(task, given, "nowhere"), model)
    return {
        "peak": found.memory_peak,
        "seconds": found.seconds,
        "seconds_per_step": found.seconds_per_step,
        "evaluations": found.evaluations,
        "length": found.length,
        "calibrated": list(found.calibrated),
        "calibration_seconds": round(found.calibration_seconds, 2),
    }


class _Peak(TrainerCallback):
    """Notes the peak of memory while a run trains; what follows (plots, say) is no part of its steps."""

    peak = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note it."""
        self.peak = peak_of_process() or 0


def measured(name: str) -> Row:
    """Train as a case says in this process."""
    task, given, model = CASES[name]
    baseline, watch = memory_of_process() or 0, _Peak()
    with tempfile.TemporaryDirectory() as folder:
        metrics = train(task, _settings(task, given, folder), model, callbacks=[watch]).metrics
    evaluations = sum("eval_loss" in entry for entry in metrics["history"])
    return {"peak": watch.peak - baseline, "seconds": metrics["seconds"], "evaluations": evaluations}


def _in_fresh_process(what: str, name: str) -> Row:
    command = [sys.executable, "-m", "benchmarks.dry_run", what, name]
    environment = {**os.environ, "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "1000")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    if done.returncode:
        raise SystemExit(f"{what} {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str) -> Row:
    """Return what was said and what was, with the errors."""
    said, was = _in_fresh_process("--dry", name), _in_fresh_process("--real", name)
    assert said["evaluations"] == was["evaluations"], "the run's rhythm is known"
    errors = {f"{key}_error": said[key] / was[key] - 1 for key in ("peak", "seconds")}
    return {"case": name, "said": said, "measured": was, **errors}


def main() -> None:
    """Compare all cases, or do one of the two in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small ones")
    parser.add_argument("--only", help="the cases whose names contain this")
    parser.add_argument("--dry", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--real", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry or options.real:
        print(json.dumps(estimated(options.dry) if options.dry else measured(options.real)))
        return
    names = [name for name in CASES if options.only is None or options.only in name]
    rows = []
    print(f"{'':<34} {'MB said':>8} {'taken':>7} {'error':>7} {'s said':>8} {'taken':>7} {'error':>7}")
    for name in names[: QUICK if options.quick else None]:
        rows.append(row := compare(name))
        cells = [
            f"{row['said']['peak'] / MB:>8.0f} {row['measured']['peak'] / MB:>7.0f} {row['peak_error']:>+7.1%}",
            f"{row['said']['seconds']:>8.1f} {row['measured']['seconds']:>7.1f} {row['seconds_error']:>+7.1%}",
        ]
        print(f"{name:<34}", *cells, flush=True)
    within = {key: all(abs(row[f"{key}_error"]) <= ALLOWED for row in rows) for key in ("peak", "seconds")}
    print(f"all within {ALLOWED:.0%}: memory {within['peak']}, time {within['seconds']}")
    print(json.dumps({"benchmark": "dry_run", "allowed": ALLOWED, "within": within, "rows": rows}))


if __name__ == "__main__":
    main()
