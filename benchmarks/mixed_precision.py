"""What half precision costs: drift of what the backward rebuilds, error of gradients, and losses of whole runs.

Run ``python -m benchmarks.mixed_precision``, about ten minutes on one core; ``--quick`` leaves the runs out. Per
precision and depth: the streams that the backward rebuilds against those that the forward had (root mean square and
largest difference, both over the stream's root mean square), and the worst parameter's gradient against plain autograd
of the same layers under the same precision. transformers' Reformer is held to plain autograd of *its* layers in the
same way. Then the demo's model is trained on a part of Python's standard library with three seeds each in fp32 and
bf16: the mean held-out result of bf16 is to lie within what the seed changes. Prints tables and one JSON line last.
``tests/layers/test_half_precision_drift.py`` asserts the bounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers.models.reformer import modeling_reformer as other

from benchmarks.gradients import OURS, _PlainAutograd
from flash_reformer.training import train_clm
from flash_reformer.training.presets import PRESETS
from tests.layers.judges import rebuilt
from tests.layers.tools import (
    gradients,
    loss_of,
    make_batch,
    make_config,
    make_model,
    make_pair,
    relative_error,
    take_step,
    worst_error,
)

DEPTHS = (6, 12, 24)
SEEDS = (0, 1, 2)
STEPS, LENGTH, EVALUATIONS = 250, 512, 16
#: Packages of the standard library that are learned from: about a megabyte.
PACKAGES = ("asyncio", "email", "json", "logging", "unittest", "xml")

Loss = Callable[..., Tensor]


def under_autocast(dtype: torch.dtype) -> Loss:
    """Return how to get a loss under autocast."""

    def loss(model: nn.Module, **inputs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return model(**inputs).loss

    return loss


#: Name, the dtype of the model, how its loss is got, and what else is set.
PRECISIONS: tuple[tuple[str, torch.dtype, Loss, dict[str, Any]], ...] = (
    ("float32", torch.float32, loss_of, {}),
    ("autocast bfloat16", torch.float32, under_autocast(torch.bfloat16), {}),
    ("autocast float16", torch.float32, under_autocast(torch.float16), {}),
    ("bfloat16 model, float32 streams", torch.bfloat16, loss_of, {}),
    ("float16 model, float32 streams", torch.float16, loss_of, {}),
    ("bfloat16 model and streams", torch.bfloat16, loss_of, {"residual_in_fp32": False}),
    ("float16 model and streams", torch.float16, loss_of, {"residual_in_fp32": False}),
)


def drift(dtype: torch.dtype, loss: Loss, depth: int, **changes: Any) -> dict[str, float]:
    """Return how far rebuilt streams and gradients of a reversible model are off; the losses are equal."""
    changes = {"attn_layers": ["local", "lsh"] * (depth // 2), "initializer_range": 0.2, **changes}
    pairs = [pair for layer in rebuilt(make_model(dtype, **changes), loss, **make_batch()) for pair in layer]
    reversible, plain = (take_step(model, loss=loss, **make_batch()) for model in make_pair(dtype, **changes))
    assert torch.equal(reversible.loss, plain.loss)
    return {**_drift_of(pairs), "gradient": worst_error(reversible.grads, plain.grads)[0]}


def _drift_of(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    largest = [
        ((again.double() - first.double()).abs().max() / first.double().pow(2).mean().sqrt()).item()
        for first, again in pairs
    ]
    return {"rms": max(relative_error(again, first) for first, again in pairs), "max": max(largest)}


def drift_of_transformers(dtype: torch.dtype, loss: Loss, depth: int) -> dict[str, Any]:
    """Return the same of transformers' Reformer without dropout, or the error that it ends with."""
    changes = {"attn_layers": ["local", "lsh"] * (depth // 2), "initializer_range": 0.2}
    dropouts = ("hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
    fields = make_config(**changes, **dict.fromkeys(dropouts, 0.0)).to_dict()
    config = transformers.ReformerConfig(**{name: value for name, value in fields.items() if name not in OURS})
    torch.manual_seed(0)
    model = other.ReformerModelWithLMHead(config).to(dtype).train()
    batch = make_batch(96)  # theirs trains at the full length of its position tables only
    results = []
    try:
        for function in (other._ReversibleFunction, _PlainAutograd):
            model.zero_grad()
            with mock.patch.object(other, "_ReversibleFunction", function):
                torch.manual_seed(7)
                value = loss(model, **batch)
                value.backward()
            results.append((value.detach(), gradients(model)))
        (value, grads), (plain_value, expected) = results
        # Both saw the same numbers in the forward, so that only the backward can differ.
        found: dict[str, Any] = {"gradient": worst_error(grads, expected)[0], "same_loss": value.equal(plain_value)}
        pairs = [pair for layer in rebuilt(model, loss, **batch) for pair in layer]
        return {**found, **_drift_of(pairs)}
    except (RuntimeError, TypeError, ValueError) as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}


def drifts() -> list[dict[str, Any]]:
    """Measure all precisions and depths, ours and transformers'."""
    rows = []
    print(f"{'':<14} {'precision':<32} {'layers':>6} {'rms':>9} {'max':>9} {'gradient':>9}")
    for name, dtype, loss, changes in PRECISIONS:
        for depth in DEPTHS:
            found = [("ours", drift(dtype, loss, depth, **changes))]
            if not changes:
                found.append(("transformers", drift_of_transformers(dtype, loss, depth)))
            for who, row in found:
                rows.append({"who": who, "precision": name, "layers": depth, **row})
                said = row.get("error") or " ".join(f"{row[key]:>9.1e}" for key in ("rms", "max", "gradient"))
                print(f"{who:<14} {name:<32} {depth:>6} {said}", flush=True)
    return rows


def texts() -> tuple[str, ...]:
    """Return the files that runs learn from."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return tuple(str(path) for package in PACKAGES for path in sorted((library / package).rglob("*.py")))


def run(precision: str, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Train the demo's model and return its losses."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        training = {
            "text": texts(),
            "seq_len": LENGTH,
            "max_steps": steps,
            "precision": precision,
            "seed": seed,
            "learning_rate": PRESETS["demo"].training["learning_rate"],
            "eval_sequences": EVALUATIONS,
            "eval_interval": max(1, steps // 5),
            "save_interval": steps,
            "sample_tokens": 0,
            "cpu": True,
            "output": f"{folder}/run",
        }
        history = train_clm(training, PRESETS["demo"].model).metrics["history"]
    key = "eval_bits_per_byte"
    judged = [(entry["step"], round(entry[key], 4)) for entry in history if key in entry]
    seconds = round(time.perf_counter() - start, 1)
    print(f"{precision} seed {seed}: held-out bits per byte {judged[0][1]} -> {judged[-1][1]}, {seconds} s", flush=True)
    return {"precision": precision, "seed": seed, "held_out": judged, "seconds": seconds}


def runs() -> dict[str, Any]:
    """Train with all seeds, precisions in turn, and compare."""
    found = [run(precision, seed) for seed in SEEDS for precision in ("fp32", "bf16")]
    ends = {p: [row["held_out"][-1][1] for row in found if row["precision"] == p] for p in ("fp32", "bf16")}
    low, high = min(ends["fp32"]), max(ends["fp32"])
    difference = statistics.fmean(ends["bf16"]) - statistics.fmean(ends["fp32"])
    print(
        f"fp32 ends between {low} and {high}; bf16 at {ends['bf16']}, {difference:+.4f} on average; the same seeds "
        f"differ by {[round(b - a, 4) for a, b in zip(ends['fp32'], ends['bf16'], strict=True)]}"
    )
    return {
        "rows": found,
        "fp32": ends["fp32"],
        "bf16": ends["bf16"],
        "spread_over_seeds": high - low,
        "mean_difference": difference,
        "within": abs(difference) <= high - low,
        "steps": STEPS,
        "length": LENGTH,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave the runs out")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more of them only wait for each other at these sizes
    record = {"benchmark": "mixed_precision", "drift": drifts(), "runs": None if arguments.quick else runs()}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
