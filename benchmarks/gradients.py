"""How exact the gradients of reversible layers are (FAULTS F1, F10): with dropout, by depth, in every precision.

Run ``python -m benchmarks.gradients``. Errors are relative, of the worst parameter: reversible layers against plain
autograd of the same layers with the same randomness, gradients against finite differences in fp64, rebuilt
activations against those of the forward. transformers' own Reformer is held to plain autograd of *its* layers in the
same way. Prints a table and one JSON line last. ``tests/layers`` asserts the bounds.
"""

from __future__ import annotations

import json
import time
from typing import Any
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from transformers.models.reformer import modeling_reformer as other

from tests.layers.judges import rebuild_errors, slopes
from tests.layers.tools import (
    MIXES,
    gradients,
    make_batch,
    make_config,
    make_model,
    make_pair,
    take_step,
    worst_error,
)

DROPOUTS = ("hidden_dropout_prob", "lsh_attention_probs_dropout_prob", "local_attention_probs_dropout_prob")
DEPTHS = (6, 12, 24)
#: What our configuration has and theirs has not.
OURS = ("reversible", "residual_in_fp32", "wrap_around", "lsh_attend_across_buckets", "lsh_allow_duplicate_attention")


def against_plain(dtype: torch.dtype, autocast: bool = False, **changes: Any) -> float:
    """Return the worst parameter's error of a reversible model against plain autograd; the losses are equal."""

    def loss(model: nn.Module, **inputs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return model(**inputs).loss

    reversible, plain = (take_step(model, loss=loss, **make_batch()) for model in make_pair(dtype, **changes))
    assert torch.equal(reversible.loss, plain.loss)
    return worst_error(reversible.grads, plain.grads)[0]


def against_slopes(**changes: Any) -> float:
    """Return the worst error of a directional derivative in fp64 against finite differences."""
    grads, judged = slopes(make_model(torch.float64, **changes), **make_batch())
    return max(
        abs((grads[name] * direction).sum().item() - slope) / abs(slope) for name, (direction, slope) in judged.items()
    )


class _PlainAutograd:
    """Their stack of layers under plain autograd, with the seeds that their reversible forward left on the layers."""

    @staticmethod
    def apply(hidden: Tensor, layers: Any, attention_mask: Tensor, num_hashes: int, *_: Any) -> Tensor:
        """Do as ``_ReversibleFunction.apply``."""
        hidden, attended = hidden.chunk(2, dim=-1)
        for layer in layers:
            torch.manual_seed(layer.attention_seed)
            attended = attended + layer.attention(hidden, attention_mask=attention_mask).hidden_states
            torch.manual_seed(layer.feed_forward_seed)
            hidden = hidden + layer.feed_forward(attended)
        return torch.cat([attended, hidden], dim=-1)


def of_transformers(**changes: Any) -> float:
    """Return the error of transformers' reversible gradients against plain autograd of the same layers."""
    fields = make_config(**changes).to_dict()
    config = transformers.ReformerConfig(**{name: value for name, value in fields.items() if name not in OURS})
    torch.manual_seed(0)
    model = other.ReformerModelWithLMHead(config).train()
    batch = make_batch(96)  # theirs trains at the full length of its position tables only
    results = []
    for function in (other._ReversibleFunction, _PlainAutograd):
        model.zero_grad()
        with mock.patch.object(other, "_ReversibleFunction", function):
            torch.manual_seed(7)
            loss = model(**batch).loss
            loss.backward()
        results.append((loss.detach(), gradients(model)))
    (loss, grads), (plain_loss, expected) = results
    assert torch.equal(loss, plain_loss), "the same randomness gives the same loss"
    return worst_error(grads, expected)[0]


def main() -> None:
    """Measure and print."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # more of them only wait for each other at these sizes
    start = time.perf_counter()
    table: dict[str, dict[str, float]] = {}
    columns = [*MIXES, *(f"depth {depth}" for depth in DEPTHS)]

    def add(name: str, measure: Any, cases: dict[str, dict[str, Any]], **common: Any) -> None:
        table[name] = {column: measure(**changes, **common) for column, changes in cases.items()}
        cells = (f"{table[name][column]:>10.1e}" if column in table[name] else f"{'':>10}" for column in columns)
        print(f"{name:<38}", *cells, flush=True)

    print(f"{'worst relative error':<38}", *(f"{column:>10}" for column in columns))
    mixes = {mix: {"attn_layers": layers} for mix, layers in MIXES.items()}
    depths = {f"depth {depth}": {"attn_layers": ["local", "lsh"] * (depth // 2)} for depth in DEPTHS}
    for depth in depths.values():
        depth["initializer_range"] = 0.2
    for p in (0.0, 0.1):
        dropout = dict.fromkeys(DROPOUTS, p)
        for dtype in (torch.float32, torch.float64):
            name = f"{str(dtype).removeprefix('torch.')}, dropout {p}"
            add(name, against_plain, {**mixes, **depths}, dtype=dtype, **dropout)
        under = {"dtype": torch.float32, "autocast": True}
        add(f"autocast bfloat16, dropout {p}", against_plain, {**mixes, **depths}, **under, **dropout)
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        add(f"{name} model, float32 streams", against_plain, {**mixes, **depths}, dtype=dtype)
        add(f"{name} model and streams", against_plain, {**mixes, **depths}, dtype=dtype, residual_in_fp32=False)
    add("float64, 4 rounds, dropout 0.1", against_plain, mixes, dtype=torch.float64, num_hashes=4)
    add("float64 against finite differences", against_slopes, mixes)
    add("rebuilt inputs, float32", lambda **c: max(map(max, rebuild_errors(make_model(**c), **make_batch()))), depths)
    for p in (0.0, 0.1):
        add(f"transformers, float32, dropout {p}", of_transformers, mixes, **dict.fromkeys(DROPOUTS, p))
    record = {
        "benchmark": "gradients",
        "worst_relative_error": table,
        "seconds": round(time.perf_counter() - start, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"in {record['seconds']} s")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
