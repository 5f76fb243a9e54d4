"""Does the memory of a training step grow with depth (Reformer, section 3)?

Run ``python -m benchmarks.depth_memory``. Each row is a fresh process: build a model, take an AdamW step, report the
peak of resident memory. What may grow is what depth needs in any case: parameters, their gradients, the
optimizer's two moments, and 4 bytes per position, head and hash round in every LSH layer. Prints a table and one
JSON line last. ``tests/layers/test_memory.py`` asserts the bound.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flash_reformer import ReformerConfig, ReformerModelWithLMHead

LENGTH, HEADS, ROUNDS = 4096, 2, 1
DEPTHS = (6, 12, 24)
ROOT = Path(__file__).parent.parent


def make_model(layers: int, reversible: bool) -> ReformerModelWithLMHead:
    """Return a model whose activations, at ``LENGTH`` tokens, are far larger than its weights."""
    config = ReformerConfig(
        attn_layers=["local", "lsh"] * (layers // 2),
        hidden_size=64,
        num_attention_heads=HEADS,
        attention_head_size=32,
        feed_forward_size=128,
        vocab_size=64,
        axial_pos_shape=(64, 64),
        axial_pos_embds_dim=(32, 32),
        num_buckets=64,
        num_hashes=ROUNDS,
        is_decoder=True,
        reversible=reversible,
    )
    torch.manual_seed(0)
    return ReformerModelWithLMHead(config).train()


def peak_rss() -> int:
    """Return the peak of this program's resident memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage, whose peak on Linux starts at that of the process that started this one.
        (line,) = (line for line in status.read_text("utf-8").splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(layers: int, reversible: bool) -> dict[str, Any]:
    """Train for one step in this process and return what it took."""
    torch.set_num_threads(1)
    before = peak_rss()
    model = make_model(layers, reversible)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(64, (1, LENGTH))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now its moments exist, as in every step but the first
    optimizer.zero_grad()
    start = time.perf_counter()
    loss = model(ids, labels=ids, return_logits=False).loss
    loss.backward()
    optimizer.step()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    assert loss.isfinite()
    assert gradients == parameters
    return {
        "layers": layers,
        "reversible": reversible,
        "peak": peak_rss(),
        "before": before,
        # Weights, gradients, two moments; positions of every LSH layer.
        "allowed_to_grow": 4 * parameters + layers // 2 * 4 * HEADS * ROUNDS * LENGTH,
        "seconds": round(time.perf_counter() - start, 2),
    }


def measure_in_subprocess(layers: int, reversible: bool) -> dict[str, Any]:
    """Run :func:`measure` in a fresh process, whose peak is nobody else's."""
    # With a fixed threshold glibc hands every freed tensor back at once, so resident memory is what tensors take.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "benchmarks.depth_memory", "--measure", str(layers)]
    arguments += [] if reversible else ["--plain"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"measuring {layers} layers failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all depths, or with ``--measure`` one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", type=int, metavar="LAYERS", help="this depth only, in this process")
    parser.add_argument("--plain", action="store_true", help="with --measure: plain autograd")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, not arguments.plain)))
        return
    MB = 2**20
    rows = []
    print(f"{'layers':>6} {'kind':<11} {'peak MB':>8} {'growth MB':>10} {'allowed MB':>11} {'s/step':>7}")
    for reversible in (True, False):
        first = None
        for layers in DEPTHS:
            row = measure_in_subprocess(layers, reversible)
            first = first or row
            row["growth"] = row["peak"] - first["peak"]
            row["allowance"] = row["allowed_to_grow"] - first["allowed_to_grow"]
            rows.append(row)
            print(
                f"{layers:>6} {'reversible' if reversible else 'plain':<11} {row['peak'] / MB:>8.0f} "
                f"{row['growth'] / MB:>10.1f} {row['allowance'] / MB:>11.1f} {row['seconds']:>7.2f}",
                flush=True,
            )
    print(json.dumps({"benchmark": "depth_memory", "length": LENGTH, "rows": rows, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
