"""Does the memory of a training step fall with the ranks that share a sequence?

Run ``python -m benchmarks.sequence_parallel``. For 1, 2 and 4 ranks as many fresh processes take an AdamW step on one
sequence of the novel's sizes (with 4 heads, so that 4 ranks divide them) and report the peak of resident memory above
what there was before the model was built. A second, much shorter length tells what does not depend on the sequence:
weights, gradients, moments, buffers; the rest is what the length adds. Prints a table and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.depth_memory import peak_rss
from flash_reformer import ReformerConfig, ReformerModelWithLMHead
from flash_reformer.distributed import parallelize_sequence

RANKS = (1, 2, 4)
LENGTH, SHORT = 65_536, 4_096
MB = 2**20
ROOT = Path(__file__).parent.parent


def make_model() -> ReformerModelWithLMHead:
    """Return a model of the novel's sizes, but for twice as many heads."""
    config = ReformerConfig(
        attn_layers=["local", "lsh"] * 3,
        hidden_size=256,
        num_attention_heads=4,
        attention_head_size=64,
        feed_forward_size=512,
        vocab_size=320,
        axial_pos_shape=(512, 1024),
        axial_pos_embds_dim=(64, 192),
        max_position_embeddings=524_288,
        num_buckets=[64, 128],
        num_hashes=1,
        is_decoder=True,
        hash_seed=0,
        hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    return ReformerModelWithLMHead(config).train()


def measure(rank: int, ranks: int, length: int, meeting: str) -> dict[str, Any]:
    """Train for one step as one of the ranks, and return what it took."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    before = peak_rss()
    model = make_model()
    if ranks > 1:
        parallelize_sequence(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(320, (1, length), generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # now its moments exist, as in every step but the first
    optimizer.zero_grad()
    loss = model(ids, labels=ids, return_logits=False).loss
    loss.backward()
    optimizer.step()
    peak = peak_rss() - before
    dist.barrier()
    dist.destroy_process_group()
    return {"peak": peak, "loss": loss.item()}


def measure_in_processes(ranks: int, length: int) -> list[dict[str, Any]]:
    """Run :func:`measure` in as many fresh processes, whose peaks are nobody else's."""
    # With a fixed threshold glibc hands every freed tensor back at once, so resident memory is what tensors take.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.sequence_parallel", "--measure"]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(ranks), str(length), f"{folder}/meeting"],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=ROOT,
            )
            for rank in range(ranks)
        ]
        outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"measuring {ranks} ranks failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def main() -> None:
    """Measure all numbers of ranks, or with ``--measure`` one rank in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=4, metavar=("RANK", "RANKS", "LENGTH", "MEETING"), help="one rank, here")
    arguments = parser.parse_args()
    if arguments.measure:
        rank, ranks, length, meeting = arguments.measure
        print(json.dumps(measure(int(rank), int(ranks), int(length), meeting)))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'ranks':>5} {'peak MB':>8} {'of 1':>6} {'short MB':>9} {'length adds MB':>15} {'of 1':>6}")
    for ranks in RANKS:
        of_ranks, of_short = (measure_in_processes(ranks, length) for length in (LENGTH, SHORT))
        peak, short = (max(each["peak"] for each in some) for some in (of_ranks, of_short))
        row = {
            "ranks": ranks,
            "peak": peak,
            "peaks": [each["peak"] for each in of_ranks],
            "peak_of_short": short,
            "length_adds": peak - short,
            "loss": of_ranks[0]["loss"],
        }
        rows.append(row)
        row["share"] = round(peak / rows[0]["peak"], 3)
        row["share_of_what_length_adds"] = round(row["length_adds"] / rows[0]["length_adds"], 3)
        print(
            f"{ranks:>5} {peak / MB:>8.0f} {row['share']:>6.3f} {short / MB:>9.0f} {row['length_adds'] / MB:>15.0f} "
            f"{row['share_of_what_length_adds']:>6.3f}",
            flush=True,
        )
    found = {"benchmark": "sequence_parallel", "length": LENGTH, "short": SHORT, "rows": rows}
    print(json.dumps({**found, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
