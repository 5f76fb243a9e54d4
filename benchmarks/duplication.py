"""The duplication task, ``0 w 0 w`` (Reformer, section 5): can gradients through LSH attention with dropout teach it?

Run ``python -m benchmarks.duplication``. For each seed a model is trained twice from the same randomness, reversibly
and by plain autograd. Prints accuracies of the second word (evaluated with the training's hash rounds and with eight),
the accuracy with the LSH layers silenced, and one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from flash_reformer.layers.attention import LSHSelfAttention
from flash_reformer.training.synthetic import VOCAB_SIZE, duplication_accuracy, train_duplication


def silence_lsh(model: torch.nn.Module) -> None:
    """Zero what LSH layers put out, for good."""
    for layer in model.modules():
        if isinstance(layer, LSHSelfAttention):
            torch.nn.init.zeros_(layer.value.weight)


def run(seed: int, steps: int) -> dict[str, object]:
    """Train one seed both ways and measure."""
    result: dict[str, object] = {"seed": seed, "steps": steps}
    losses: dict[bool, list[float]] = {True: [], False: []}
    for reversible in (True, False):
        start = time.perf_counter()
        model = train_duplication(
            seed, steps, reversible=reversible, on_step=lambda _, loss, kept=losses[reversible]: kept.append(loss)
        )
        name = "reversible" if reversible else "plain"
        result[f"{name}_seconds"] = round(time.perf_counter() - start, 1)
        result[f"{name}_accuracy"] = round(duplication_accuracy(model), 4)
        result[f"{name}_accuracy_8_rounds"] = round(duplication_accuracy(model, num_hashes=8), 4)
        if reversible:
            silence_lsh(model)
            result["silenced_accuracy"] = round(duplication_accuracy(model), 4)
    first = next((i + 1 for i, (a, b) in enumerate(zip(losses[True], losses[False], strict=True)) if a != b), None)
    result["first_step_with_another_loss"] = first
    result["largest_loss_difference"] = max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True))
    return result


def main() -> None:
    """Run all seeds and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    results = []
    for seed in arguments.seeds:
        results.append(run(seed, arguments.steps))
        print(*(f"{key}={value}" for key, value in results[-1].items()), flush=True)
    print(
        json.dumps(
            {"benchmark": "duplication", "chance": 1 / (VOCAB_SIZE - 1), "torch": torch.__version__, "runs": results}
        )
    )


if __name__ == "__main__":
    main()
