"""Run benchmarks one after the other, each in a fresh process, and keep their last line, which is JSON.

``python -m benchmarks.run`` runs all of them, ``python -m benchmarks.run parity gradients`` some. Results go to
``benchmarks/results/NAME.json`` with the versions and the machine that made them. ``--quick speed`` runs the shorter
version of those that have one; its result is ``NAME-quick.json``, so that the longer one's stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.facts import facts

#: Name of a module in this folder, and what it shows.
BENCHMARKS = {
    "parity": "evaluation forwards against transformers' Reformer",
    "gradients": "reversible against plain gradients, finite differences, reconstruction",
    "decode": "cost of a token after a long context, against transformers' Reformer",
    "speed": "time and memory of layers and models, against transformers, reformer-pytorch and exact attention",
    "depth_memory": "peak memory of a training step against depth",
    "sizes": "memory and time of a training step against depth and length, up to a novel, against transformers",
    "mixed_precision": "drift of what the backward rebuilds in half precision, losses of runs in bf16 and fp32",
    "dry_run": "what a dry run says of memory and time against what runs then take",
    "sequence_parallel": "peak memory of a training step per rank against ranks that share the sequence",
    "duplication": "the duplication task, three seeds, both ways",
    "recipes": "what the recipes learn with their defaults, judged by the pipelines",
    "tokenizers": "tokenizers against SentencePiece and transformers' own: ids that differ, MB/s",
}
#: Those that have a shorter version.
QUICK = ("speed", "sizes", "mixed_precision", "dry_run")
RESULTS = Path(__file__).parent / "results"


def run(name: str, *options: str) -> dict[str, object]:
    """Run one benchmark, its output shown as it comes, and return its result with :func:`facts` and its duration."""
    start = time.perf_counter()
    command = [sys.executable, "-m", f"benchmarks.{name}", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line if line.strip() else last
    if process.returncode:
        raise SystemExit(f"benchmark {name} failed with exit code {process.returncode}; nothing was recorded")
    return {**facts(), "seconds": round(time.perf_counter() - start, 1), "result": json.loads(last)}


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all by default")
    parser.add_argument("--quick", action="store_true", help=f"the shorter version; of {', '.join(QUICK)}")
    arguments = parser.parse_args()
    names = arguments.names or list(QUICK if arguments.quick else BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    if arguments.quick and (whole := [name for name in names if name not in QUICK]):
        parser.error(f"{whole[0]} has no quick version; {', '.join(QUICK)} has")
    suffix, options = ("-quick", ["--quick"]) if arguments.quick else ("", [])
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        print(f"== {name}: {BENCHMARKS[name]}", flush=True)
        result = json.dumps(run(name, *options), indent=1)
        (RESULTS / f"{name}{suffix}.json").write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
