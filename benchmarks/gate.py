"""The parity gate of the speed benchmark: nothing is timed unless what is timed computes what it should.

For each of ours in a workload, at its width, rounds, dropouts and bucket factors and at up to ``LONGEST`` tokens:

- evaluation in fp64 equals that of transformers' Reformer with the same weights and rotations;
- in training, outputs (of a model: the loss) and every gradient of backend ``"auto"`` equal those of ``"reference"``,
  the definitions, in fp64 and in fp32, the dtype of the race.

In fp32 a vector between two buckets may fall to either side, and then it moves the borders of chunks. A layer's two
backends are therefore given the same buckets, of which all but ``FLIPS`` must agree. A model's are not; its tolerance
leaves room for some such vectors, its comparison in fp64 does not.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.reformer import ReformerConfig as TheirConfig
from transformers.models.reformer import ReformerModelWithLMHead as TheirModel

from benchmarks.contestants import Entry, fields, inputs_of, make_call, our_layer, their_layer, tokens_of
from benchmarks.workloads import Workload
from flash_reformer import ReformerConfig, ReformerModelWithLMHead

LONGEST = {"layer": 4096, "model": 1024}
#: Against transformers, fp64. What is left is its 1e-9 where a row sees only itself (``tests/models/parity_grid.py``).
THEIRS = 1e-7
#: Between our backends: sums of up to ``LONGEST`` terms in another order.
BACKENDS = {torch.float64: 1e-9, torch.float32: 1e-5}
#: The share of vectors that may change buckets in fp32, and what that may do to a model's gradients.
FLIPS = 1e-3
MODEL_FP32 = {"loss": 1e-4, "gradient": 1e-2}
BACKEND_NAMES = ("auto", "reference")
SEED = 3

Values = dict[str, Tensor]


class ParityError(Exception):
    """What is to be timed is wrong."""


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of what is expected."""
    assert value.shape == expected.shape, f"{tuple(value.shape)} is not {tuple(expected.shape)}"
    difference, norm = (value.double() - expected.double()).norm(), expected.double().norm()
    return (difference / norm.clamp(min=1e-30)).item()


def _hold(what: str, error: float, tolerance: float) -> float:
    if not error <= tolerance:  # NaN is red, too
        raise ParityError(f"{what}: relative error {error:.3g} > {tolerance:.3g}")
    return error


def _compare(what: str, values: Values, expected: Values, tolerances: dict[str, float]) -> float:
    """Hold every value, by name, to the tolerance of its kind, the part of its name before a colon."""
    assert values.keys() == expected.keys(), f"{what}: {values.keys() ^ expected.keys()}"
    for name, tensor in expected.items():
        assert tensor.isfinite().all(), f"{what}, {name}: not finite"
        assert tensor.norm() > 0, f"{what}, {name}: zero, it proves nothing"
    every = [
        _hold(f"{what}, {name}", relative_error(values[name], expected[name]), tolerances[name.partition(":")[0]])
        for name in expected
    ]
    return max(every)


def _use_backend(module: nn.Module, backend: str) -> None:
    """Tell a layer outside of a model; a model has a method for it."""
    for part in module.modules():
        if hasattr(part, "backend"):
            part.backend = backend


def _gradients(module: nn.Module) -> Values:
    return {f"gradient:{name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def _layer_values(layer: nn.Module, entry: Entry, dtype: torch.dtype, backend: str, record: Any) -> Values:
    layer.zero_grad()
    _use_backend(layer, backend)
    hidden, grad = (x.to(dtype) for x in inputs_of(short(entry)))
    hidden.requires_grad_()
    out, _ = layer(hidden, make_call(entry, backend=backend, seed=SEED), record=record)
    out.backward(grad)
    return {"output": out.detach(), "gradient:hidden": hidden.grad, **_gradients(layer)}


def _buckets(layer: nn.Module, entry: Entry, dtype: torch.dtype, backend: str) -> Any:
    _use_backend(layer, backend)
    hidden, _ = inputs_of(short(entry))
    with torch.no_grad():
        return layer(hidden.to(dtype), make_call(entry, backend=backend, seed=SEED))[1]


def short(entry: Entry) -> Entry:
    """Return the entry at the length at which it is checked; its bucket factors stay those of its own length."""
    longest = LONGEST["model" if entry.kind == "model" else "layer"]
    return replace(entry, length=min(entry.length, longest), batch=min(entry.batch, 2))


def _num_buckets(entry: Entry) -> int | list[int]:
    return entry.factors[0] if len(entry.factors) == 1 else list(entry.factors)


def check_layer(entry: Entry) -> dict[str, float]:
    """Return the worst errors of our layer; raise :class:`ParityError` for one that is too large."""
    torch.manual_seed(SEED)
    layer = our_layer(entry)
    errors: dict[str, float] = {}
    with torch.no_grad():
        twin = their_layer(entry, hash_seed=SEED, num_buckets=_num_buckets(entry))
        twin.load_state_dict(layer.state_dict())
        hidden = inputs_of(short(entry))[0].double()
        mine, _ = copy.deepcopy(layer).double().eval()(hidden, make_call(entry, seed=SEED))
        error = relative_error(mine, twin.double().eval()(hidden).hidden_states)
        errors["transformers fp64"] = _hold("against transformers, fp64", error, THEIRS)
    for dtype, tolerance in BACKENDS.items():
        judged = copy.deepcopy(layer).to(dtype).train()
        record: Any = None
        if entry.kind == "lsh":
            (buckets,), (expected,) = (_buckets(judged, entry, dtype, backend) for backend in BACKEND_NAMES)
            name = f"buckets {dtype}".replace("torch.", "")
            errors[name] = _hold(name, (buckets != expected).double().mean().item(), FLIPS)
            record = (expected,)
        values = [_layer_values(judged, entry, dtype, backend, record) for backend in BACKEND_NAMES]
        name = f"backends {dtype}".replace("torch.", "")
        errors[name] = _compare(name, *values, {"output": tolerance, "gradient": tolerance})
    return errors


def _model_values(model: Any, entry: Entry, backend: str) -> Values:
    model.zero_grad()
    model.set_backend(backend)
    torch.manual_seed(SEED)
    ids = tokens_of(entry)
    loss = model(ids, labels=ids, return_logits=False).loss
    loss.backward()
    return {"loss": loss.detach(), **_gradients(model)}


def check_model(entry: Entry) -> dict[str, float]:
    """Return the worst errors of our model; raise :class:`ParityError` for one that is too large."""
    made = fields(short(entry), hash_seed=SEED, num_buckets=_num_buckets(entry))
    torch.manual_seed(SEED)
    model: Any = ReformerModelWithLMHead(ReformerConfig(**made))
    errors: dict[str, float] = {}
    with torch.no_grad():
        twin = TheirModel(TheirConfig(**made))
        twin.load_state_dict(model.state_dict())
        ids = tokens_of(short(entry))
        error = relative_error(
            copy.deepcopy(model).double().eval()(ids).logits, twin.double().eval()(ids, use_cache=False).logits
        )
        errors["transformers fp64"] = _hold("against transformers, fp64", error, THEIRS)
    fp64 = dict.fromkeys(MODEL_FP32, BACKENDS[torch.float64])
    for dtype, tolerances in ((torch.float64, fp64), (torch.float32, MODEL_FP32)):
        judged = copy.deepcopy(model).to(dtype).train()
        values = [_model_values(judged, short(entry), backend) for backend in BACKEND_NAMES]
        name = f"backends {dtype}".replace("torch.", "")
        errors[name] = _compare(name, *values, tolerances)
    return errors


def check(workload: Workload) -> dict[str, dict[str, float]]:
    """Check all of ours in a workload; raise :class:`ParityError`, naming the entry, where one is wrong."""
    ours = [entry for entry in workload.entries if entry.who == "ours"]
    # A layer's or model's checks cover both passes; of several lengths, as in the cost per token, the longest speaks.
    length = max(entry.length for entry in ours)
    judged = {(e.kind, e.rounds, e.dropout): replace(e, length=length, passes="training") for e in ours}
    found = {}
    for (kind, rounds, dropout), entry in judged.items():
        name = f"{kind}, rounds {rounds}, dropout {dropout}, {short(entry).length} of {length} tokens"
        try:
            found[name] = (check_model if kind == "model" else check_layer)(entry)
        except ParityError as error:
            raise ParityError(f"{name}: {error}") from None
    return found
