"""``python -m benchmarks.gpu``; what it does stands in ``benchmarks/gpu/__init__.py``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

import benchmarks.gpu

RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    """Run what the command line asks for and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=benchmarks.gpu.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on a CPU; measures nothing")
    parser.add_argument("--seconds", type=float, help="what the whole run may take; 500, in a rehearsal 230")
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="stages besides parity; all by default")
    parser.add_argument("--backend", default="triton", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rehearse:
        # Triton decides when it is imported, so this comes before anything that may import it.
        os.environ["TRITON_INTERPRET"] = "1"
    # A checkout needs no installation.
    sys.path.append(str(Path(__file__).parents[2] / "src"))
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device; --rehearse runs the same code on a CPU", file=sys.stderr)
        return 2
    import transformers

    from benchmarks.gpu.script import run

    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    name = "gpu-rehearsal.json" if arguments.rehearse else "gpu.json"
    seconds = arguments.seconds or (230.0 if arguments.rehearse else 500.0)
    return run(
        rehearse=arguments.rehearse,
        backend=arguments.backend,
        seconds=seconds,
        path=arguments.out or RESULTS / name,
        only=arguments.only,
    )


if __name__ == "__main__":
    sys.exit(main())
