"""How memory and time of a training step grow with depth and with length, up to a novel in one sequence.

Run ``python -m benchmarks.sizes`` (about half an hour on two quiet cores, 16 GiB of memory for transformers' longest
step) or with ``--quick`` (a few minutes: short lengths, few layers). Every row is a fresh process that takes one full
step: forward, backward, AdamW, its moments made before. Peaks are of resident memory, above that of the process once
everything is imported.

* Depth: what may grow is what depth needs in any case: weights, their gradients, AdamW's two moments, and 4 bytes per
  position, head and hash round in every LSH layer. What grows beyond it is printed as the excess. Here freed memory
  goes back at once, so that the peak is what tensors take.
* Length: a model of a novel's size, with the allocator as users have it, ours and transformers' in turn. A length at
  which a contestant runs into ``--memory-limit`` or ``--time-limit`` is the last that it tries; the row says so.

Prints tables and one JSON line last, and draws ``sizes.svg`` into ``docs/plots/`` (with ``--quick`` into
``runs/bench/``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.depth_memory import ROOT, peak_rss
from benchmarks.facts import cpu_model
from benchmarks.shapes import NOVEL
from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from flash_reformer.training.memory import memory_of_process

MB, GB = 2**20, 2**30
DEPTHS, DEPTH_LENGTH = (6, 12, 24, 48), 16_384
LENGTHS = (4_096, 16_384, 65_536, 131_072, 262_144, 524_288)
QUICK_DEPTHS, QUICK_DEPTH_LENGTH, QUICK_LENGTHS = (2, 4), 2_048, (1_024, 2_048, 4_096)
#: The exit code of a process that passed its memory limit.
TOO_MUCH = 9
#: Kept from the sizes of transformers' configuration: what it does not have.
OURS = ("reversible", "residual_in_fp32", "wrap_around", "lsh_attend_across_buckets", "lsh_allow_duplicate_attention")
Row = dict[str, Any]


def build(who: str, layers: int, length: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Return a model and what its forward gets beside tokens and labels."""
    fields = {**NOVEL, "attn_layers": ["local", "lsh"] * (layers // 2)}
    torch.manual_seed(0)
    if who == "ours":
        return ReformerModelWithLMHead(ReformerConfig(**fields)).train(), {"return_logits": False}
    # Theirs trains at the full length of its position tables only.
    fields["axial_pos_shape"] = (length // 1024, 1024)
    config = transformers.ReformerConfig(**{name: value for name, value in fields.items() if name not in OURS})
    return transformers.ReformerModelWithLMHead(config).train(), {"use_cache": False}


def _watch(limit: float) -> None:
    """End this process as soon as its memory passes the limit."""

    def look() -> None:
        while True:
            if (memory_of_process() or 0) > limit:
                os._exit(TOO_MUCH)
            time.sleep(0.02)

    threading.Thread(target=look, daemon=True).start()


def measure(who: str, layers: int, length: int, threads: int, memory_limit: float) -> Row:
    """Take one step in this process and return what it took."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    baseline = memory_of_process() or peak_rss()
    _watch(baseline + memory_limit)
    model, named = build(who, layers, length)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now its moments exist, as in every step but the first
    optimizer.zero_grad()
    ids = torch.randint(NOVEL["vocab_size"], (1, length), generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    loss = model(ids, labels=ids, **named).loss
    forward = time.perf_counter() - start
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    assert loss.isfinite()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    positions = 4 * NOVEL["num_attention_heads"] * NOVEL["num_hashes"] * length
    return {
        "peak": peak_rss() - baseline,
        "baseline": baseline,
        "seconds": round(seconds, 2),
        "forward_seconds": round(forward, 2),
        "parameters": sum(p.numel() for p in model.parameters()),
        "allowed_to_grow": 4 * weights + layers // 2 * positions,
    }


def in_fresh_process(options: argparse.Namespace, who: str, layers: int, length: int, **environment: str) -> Row:
    """Run :func:`measure` in a process of its own; a row that could not be measured has ``skipped``."""
    row: Row = {"who": who, "layers": layers, "length": length}
    limit = options.memory_limit * GB
    asked = json.dumps({"threads": options.threads, "memory_limit": limit, **row})
    command = [sys.executable, "-m", "benchmarks.sizes", "--measure", asked]
    # Set before torch starts, and waiting threads that soon give way.
    spin = os.environ.get("GOMP_SPINCOUNT", "1000")
    around = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "GOMP_SPINCOUNT": spin, **environment}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=around, cwd=ROOT, timeout=options.time_limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {**row, "skipped": f"over the limit of {options.time_limit:g} s"}
    if done.returncode == TOO_MUCH:
        return {**row, "skipped": f"over the limit of {options.memory_limit:g} GiB"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {**row, "skipped": f"exit code {done.returncode}: {last}"}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


def by_depth(options: argparse.Namespace) -> list[Row]:
    """Measure memory against depth."""
    rows: list[Row] = []
    length = options.depth_length
    print(f"-- one step of {length:,} tokens by depth; MB")
    print(f"{'layers':>6} {'peak':>8} {'growth':>8} {'allowed':>8} {'excess':>8} {'s/step':>8}")
    for layers in options.depths:
        row = in_fresh_process(options, "ours", layers, length, MALLOC_MMAP_THRESHOLD_="262144")
        rows.append(row)
        if "skipped" in row or "skipped" in rows[0]:
            print(f"{layers:>6} {row.get('skipped', 'the first row is missing')}", flush=True)
            continue
        row["growth"] = row["peak"] - rows[0]["peak"]
        row["allowance"] = row["allowed_to_grow"] - rows[0]["allowed_to_grow"]
        row["excess"] = row["growth"] - row["allowance"]
        cells = (row["peak"], row["growth"], row["allowance"], row["excess"])
        print(f"{layers:>6}", *(f"{size / MB:>8.1f}" for size in cells), f"{row['seconds']:>8.2f}", flush=True)
    return rows


def by_length(options: argparse.Namespace) -> list[Row]:
    """Measure memory and time against length, in turn."""
    rows: list[Row] = []
    ended: set[str] = set()
    print(f"-- one step of {options.layers} layers by length, {options.threads} threads")
    print(f"{'tokens':>8} {'who':<13} {'peak MB':>9} {'KB/token':>9} {'s/step':>8} {'tokens/s':>9}")
    for length in options.lengths:
        for who in options.who:
            if who in ended:
                row: Row = {"who": who, "layers": options.layers, "length": length}
                row["skipped"] = "a shorter length was over a limit"
            else:
                row = in_fresh_process(options, who, options.layers, length)
            rows.append(row)
            if "skipped" in row:
                ended.add(who)
                print(f"{length:>8} {who:<13} {row['skipped']}", flush=True)
                continue
            cells = f"{row['peak'] / MB:>9.0f} {row['peak'] / length / 1024:>9.2f} {row['seconds']:>8.2f}"
            print(f"{length:>8} {who:<13} {cells} {length / row['seconds']:>9.0f}", flush=True)
    return rows


def draw(depth: list[Row], length: list[Row], folder: Path) -> str:
    """Draw time and memory against length, and memory against depth, and return the name of the file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.hashsalt": "sizes", "svg.fonttype": "none", "font.size": 9})
    figure, panels = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    looks = {"ours": ("flash-reformer", "tab:blue"), "transformers": ("transformers", "tab:orange")}
    for axes, field, scale, label in (
        (panels[0], "seconds", 1.0, "seconds of a training step"),
        (panels[1], "peak", 1 / GB, "peak memory above the imports, GiB"),
    ):
        for who, (name, colour) in looks.items():
            points = [(row["length"], scale * row[field]) for row in length if row["who"] == who and field in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, color=colour, marker="o", markersize=3)
        ticks = sorted({row["length"] for row in length})
        axes.set(xscale="log", yscale="log", xlabel="tokens in one sequence", ylabel=label)
        axes.set_xticks(ticks, [f"{T // 1024}K" for T in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    found = [row for row in depth if "growth" in row]
    layers = [row["layers"] for row in found]
    for field, name, line in (("growth", "measured", "-"), ("allowance", "weights, their state, positions", "--")):
        panels[2].plot(layers, [row[field] / MB for row in found], line, label=name, color="tab:blue", marker="o")
    panels[2].set(xlabel="layers", ylabel=f"growth of the peak from {layers[0] if layers else 0} layers on, MB")
    panels[2].grid(alpha=0.3)
    panels[2].legend(fontsize=7)
    facts = "E 256, 2 heads of 64, feed-forward 512, chunks of 64, 8,192 buckets, 1 round, fp32, dropout 0.05"
    figure.supxlabel(f"{facts}, {cpu_model()}", fontsize=7)
    figure.savefig(folder / "sizes.svg", metadata={"Date": None})
    plt.close("all")
    return "sizes.svg"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def main() -> None:
    """Measure as the command line says; ``--measure`` is what its own processes are called with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths and few layers")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--time-limit", type=float, default=1200.0, help="seconds that one row may take")
    parser.add_argument("--memory-limit", type=float, default=18.0, help="GiB that one row may take")
    parser.add_argument("--depths", type=_numbers, help="numbers of layers")
    parser.add_argument("--depth-length", type=int, help="tokens in the rows by depth")
    parser.add_argument("--lengths", type=_numbers, help="multiples of 1024")
    parser.add_argument("--layers", type=int, default=6, help="layers in the rows by length")
    parser.add_argument("--who", type=lambda text: text.split(","), default=["ours", "transformers"])
    parser.add_argument("--plots", type=Path, help="where the plot goes")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(**options.measure)))
        return
    quick = options.quick
    options.depths = options.depths or (QUICK_DEPTHS if quick else DEPTHS)
    options.depth_length = options.depth_length or (QUICK_DEPTH_LENGTH if quick else DEPTH_LENGTH)
    options.lengths = options.lengths or (QUICK_LENGTHS if quick else LENGTHS)
    folder = options.plots or (ROOT / "runs" / "bench" if quick else ROOT / "docs" / "plots")
    depth, length = by_depth(options), by_length(options)
    plot = draw(depth, length, folder)
    limits = {"time_s": options.time_limit, "memory_gib": options.memory_limit}
    record = {"benchmark": "sizes", "quick": quick, "threads": options.threads, "limits": limits, "plot": plot}
    print(json.dumps({**record, "depth_length": options.depth_length, "depth": depth, "length": length}))


if __name__ == "__main__":
    main()
