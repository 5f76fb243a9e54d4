"""How close the forward is to transformers' Reformer, over the grid that ``tests/models/test_parity.py`` asserts.

    python -m benchmarks.parity

Prints cases and the worst relative error per family, then one line of JSON.
"""

from __future__ import annotations

import json
import time

import torch
import transformers

from tests.models import parity_grid


def main() -> None:
    """Run the grid and print its table."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more of them only wait for each other at these sizes
    start = time.perf_counter()
    counts: dict[str, int] = {}
    worst: dict[str, tuple[float, str]] = {}
    for case in parity_grid.grid():
        model = parity_grid.model_of(case)
        errors = parity_grid.errors(case, model, parity_grid.outputs_of(model, case.inputs()))
        name, error = max(errors.items(), key=lambda item: item[1])
        counts[case.family] = counts.get(case.family, 0) + 1
        worst[case.family] = max(worst.get(case.family, (-1.0, "")), (error, f"{name} of {case}"))
    seconds = time.perf_counter() - start

    print(f"{'family':<10} {'cases':>5} {'worst':>8}  where")
    for family, (error, where) in worst.items():
        print(f"{family:<10} {counts[family]:>5} {error:>8.1e}  {where}")
    print(f"{sum(counts.values())} cases in {seconds:.1f} s; fp64 but for the family fp32")
    record = {
        "benchmark": "parity",
        "cases": counts,
        "worst_relative_error": {family: error for family, (error, _) in worst.items()},
        "seconds": round(seconds, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
