"""Run benchmarks one after the other, each in a fresh process, and keep their last line, which is JSON.

``python -m benchmarks.run`` runs all of them, ``python -m benchmarks.run parity gradients`` some. Results go to
``benchmarks/results/NAME.json`` with the versions and the machine that made them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

#: Name of a module in this folder, and what it shows.
BENCHMARKS = {
    "parity": "evaluation forwards against transformers' Reformer",
    "gradients": "reversible against plain gradients, finite differences, reconstruction",
    "decode": "cost of a token after a long context, against transformers' Reformer",
    "depth_memory": "peak memory of a training step against depth",
    "duplication": "the duplication task, three seeds, both ways",
    "recipes": "what the recipes learn with their defaults, judged by the pipelines",
    "tokenizers": "tokenizers against SentencePiece and transformers' own: ids that differ, MB/s",
}
RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, object]:
    """Return what a number needs beside it to mean anything."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def run(name: str) -> dict[str, object]:
    """Run one benchmark, its output shown as it comes, and return its result with :func:`facts` and its duration."""
    start = time.perf_counter()
    command = [sys.executable, "-m", f"benchmarks.{name}"]
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
    names = parser.parse_args().names or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    RESULTS.mkdir(exist_ok=True)
    for name in names:
        print(f"== {name}: {BENCHMARKS[name]}", flush=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(run(name), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
