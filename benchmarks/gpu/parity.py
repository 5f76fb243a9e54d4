"""The parity suite: what is measured computes what its definition says, on the device on which it is measured.

Kernels are compared with the definitions (``backend="reference"``) in fp64. A kernel's error may be twice that of the
definition in the kernel's own dtype, or ``FLOOR``, whichever is more: fp32 must be fp32, half precision no worse than
plain PyTorch's. Errors are norms of differences relative to norms. Positions are given, so that no vector on the border
of two buckets can matter; hashes are judged apart, by the share of vectors that fall elsewhere. Where whole models are
compared, such a vector can move a result; there one of ``SEEDS`` must agree.

Letters: B batch, T positions, H heads, D head size, R rounds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu.attention import deterministic_options
from benchmarks.gpu.device import Device
from benchmarks.gpu.lanes import OVER, Row, failure
from benchmarks.gpu.plan import NOVEL
from benchmarks.gpu.stages import Context
from flash_reformer import ReformerConfig, ReformerModelWithLMHead, functional

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: Errors that are small enough whatever the definition's own error is.
FLOOR = {FP32: 1e-5, FP16: 2e-3, BF16: 1e-2}
LSE = 1e-3
#: The share of vectors that may hash elsewhere than in fp64, or twice the definition's own.
FLIPS = 2e-3
SEEDS = (0, 1, 2)
#: Whole models in fp32, and reversible against plain gradients, in fp32 and under autocast.
MODEL, REVERSIBLE, AUTOCAST, STEPS = 5e-3, 1e-4, 2e-2, 2e-3


class Red(Exception):
    """What would be measured is wrong."""


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference relative to that of what is expected."""
    assert value.shape == expected.shape, f"{tuple(value.shape)} is not {tuple(expected.shape)}"
    difference, norm = (value.double() - expected.double()).norm(), expected.double().norm()
    return (difference / norm.clamp(min=1e-30)).item()


@dataclass(frozen=True)
class Attention:
    """One comparison of attention, forward and backward."""

    kind: str
    dtype: torch.dtype = FP32
    length: int = 512
    chunk: int = 64
    head_size: int = 64
    rounds: int = 2
    masked: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What stands in the report."""
        what = f"{self.kind}, {str(self.dtype).removeprefix('torch.')}, D {self.head_size}, chunk {self.chunk}"
        what += f", {self.rounds} rounds" if self.kind == "lsh" else ""
        told = [f"{key}={value}" for key, value in self.options.items() if key != "dropout_seed"]
        return ", ".join([what, *told, *(["masked"] if self.masked else [])])

    def check(self, device: Device, backend: str) -> dict[str, float]:
        """Return the errors; raise :class:`Red` for one that is too large."""
        # With the batch of what is measured, so that the same compiled kernels are judged; masks need two rows.
        B, H = (2 if self.masked else 1), 2
        given = _randn((B, self.length, H, self.head_size), device, 4)
        mask = torch.ones(B, self.length, dtype=torch.bool, device=device.torch)
        mask[-1, 3 * self.length // 4 :] = False
        K = max(2, self.length // self.chunk)
        generator = torch.Generator().manual_seed(5)
        buckets = torch.randint(K, (B, H, self.rounds, self.length), generator=generator).to(device.torch, torch.int16)
        buckets = torch.where(mask[:, None, None], buckets, K) if self.masked else buckets
        positions = functional.sort_positions(buckets.to(torch.int16), backend="reference")
        own = {"chunk_length": self.chunk, "causal": True, **self.options}

        def values(backend: str, dtype: torch.dtype) -> list[Tensor]:
            # Rounded to the kernel's dtype first: judged is the arithmetic, not the rounding of its inputs.
            query, key, v, grad = (x.to(self.dtype).to(dtype) for x in given)
            inputs = [x.detach().requires_grad_() for x in ((query, v) if self.kind == "lsh" else (query, key, v))]
            rest: dict[str, Any] = {**own, "backend": backend}
            seen = mask if self.masked else None
            if backend == "reference":
                rest.pop("deterministic", None)
            if self.kind == "exact":
                del rest["chunk_length"]
                out, lse = functional.exact_attention(*inputs, seen, **rest)
            elif self.kind == "lsh":
                out, lse = functional.lsh_attention(*inputs, positions, buckets.to(torch.int16), seen, **rest)
            else:
                out, lse = functional.local_attention(*inputs, seen, **rest)
            # Rows that see only themselves have about -1e5, next to which no error of the others would show.
            return [out.detach(), lse.detach().clamp(min=-100), *torch.autograd.grad(out, inputs, grad)]

        expected = values("reference", FP64)
        plain, found = values("reference", self.dtype), values(backend, self.dtype)
        names = ["output", "lse", *(f"gradient {i}" for i in range(len(expected) - 2))]
        errors = {}
        for name, value, mine, true in zip(names, found, plain, expected, strict=True):
            # Sums are fp32 inside, also where inputs are not, so an lse is closer than an output.
            least = min(FLOOR[self.dtype], LSE) if name == "lse" else FLOOR[self.dtype]
            bound = max(2 * relative_error(mine, true), least)
            errors[name] = _hold(name, relative_error(value, true), bound)
        return errors


def _hold(what: str, error: float, bound: float) -> float:
    if not error <= bound:  # NaN is red, too
        raise Red(f"{what}: error {error:.3g} > {bound:.3g}")
    return error


def _randn(shape: tuple[int, ...], device: Device, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=FP64).to(device.torch) for _ in range(count)]


#: In order of importance: whatever is measured first is checked first.
ATTENTIONS = (
    Attention("lsh", BF16, rounds=1),
    Attention("lsh", BF16, rounds=4),
    Attention("local", BF16),
    Attention("lsh", FP32, rounds=4, masked=True),
    # Tiles that are not full, heads that are no power of two, windows longer than the ring.
    Attention("lsh", BF16, chunk=24, head_size=40, length=96, masked=True, options={"num_chunks_before": 5}),
    Attention("local", FP16, chunk=24, head_size=40, length=96, masked=True, options={"num_chunks_after": 2}),
    Attention("local", FP32, masked=True),
    Attention("lsh", BF16, head_size=128, rounds=4),
    Attention("local", BF16, head_size=128, chunk=128),
    Attention("lsh", FP16),
    Attention("lsh", BF16, chunk=256, head_size=128, length=1024),
    Attention("lsh", BF16, chunk=128),
    Attention("exact", BF16, length=256),
    Attention("lsh", BF16, options={"dropout_p": 0.1, "dropout_seed": torch.tensor(3)}),
    Attention("lsh", FP32, rounds=4, options={"allow_duplicate_attention": False}),
    Attention("lsh", FP32, options={"attend_across_buckets": False}),
    Attention("lsh", FP32, options={"causal": False, "num_chunks_after": 1}),
    Attention("local", FP32, options={"wrap_around": False, "dropout_p": 0.1, "dropout_seed": torch.tensor(3)}),
)
#: The rehearsal's: each path once.
TOYS = (
    Attention("lsh", BF16, length=64, chunk=16, head_size=16, rounds=1),
    Attention("lsh", FP32, length=64, chunk=16, head_size=16, masked=True),
    Attention("exact", FP32, length=64, head_size=16, masked=True, options={"exclude_self": True}),
    Attention("local", FP32, length=64, chunk=16, head_size=16, masked=True),
    Attention(
        "lsh", FP32, length=64, chunk=16, head_size=16, options={"dropout_p": 0.1, "dropout_seed": torch.tensor(3)}
    ),
    Attention("lsh", FP32, length=64, chunk=16, head_size=16, options={"allow_duplicate_attention": False}),
)


def _atomic(backend: str) -> list[Attention]:
    """Return the check of sums whose order is left open, where they can be had."""
    if not deterministic_options(backend):
        return []
    return [replace(ATTENTIONS[1], options={"deterministic": False})]


def _long(context: Context) -> dict[str, float]:
    """Compare one head among many, in a sequence so long that offsets pass 2**31, with that head alone."""
    plan = context.plan
    case = context.case(plan.far, plan.head_sizes[0], rounds=plan.rounds[-1])
    buckets = case.buckets(case.rotations())
    positions = case.positions(buckets)
    query, _, v, grad = case.tensors
    out = case.attend(positions, buckets)
    found = [out.detach(), *torch.autograd.grad(out, (query, v), grad)]
    found = [x[:, :, -1:].clone() for x in found]
    del out
    context.device.free()
    own = [x.detach()[:, :, -1:].contiguous() for x in case.tensors]
    alone = replace(case, heads=1)
    alone.__dict__["tensors"] = (*(x.requires_grad_() for x in own[:3]), own[3])
    out = alone.attend(positions[:, -1:].contiguous(), buckets[:, -1:].contiguous())
    expected = [out.detach(), *torch.autograd.grad(out, alone.inputs_of("lsh"), own[3])]
    names = ("output", "gradient of qk", "gradient of v")
    return {n: _hold(n, relative_error(x, y), 1e-3) for n, x, y in zip(names, found, expected, strict=True)}


def _hash(context: Context, dtype: torch.dtype) -> dict[str, float]:
    device, length = context.device, 4096 if context.plan.measures else 64
    (x,) = _randn((1, length, 2, 64), device, 1)
    x, factors = x.to(dtype), [16, 16]
    rotations = functional.draw_rotations(torch.tensor(1), 2, 64, 2, factors, dtype, device.torch)
    mask = torch.arange(length, device=device.torch)[None] < length - 5
    found = functional.hash_vectors(x, rotations, factors, mask, backend=context.backend)
    expected = functional.hash_vectors(x.double(), rotations.double(), factors, mask, backend="reference")
    if found.dtype != expected.dtype:
        raise Red(f"buckets are {found.dtype}, not {expected.dtype}")
    # The definition rounds projections to the dtype of the vectors, which moves some vectors itself.
    plain = functional.hash_vectors(x, rotations, factors, mask, backend="reference")
    moved, allowed = ((buckets != expected).double().mean().item() for buckets in (found, plain))
    return {
        "moved": _hold("buckets", moved, max(FLIPS, 2 * allowed)),
        "masked": _hold("masked", _worst(found[..., -5:] - 256), 0.0),
    }


def _rotations(context: Context) -> dict[str, float]:
    """Check that rotations are normal numbers, the same ones for the same seed."""
    device = context.device.torch
    first, again, other = (
        functional.draw_rotations(torch.tensor(seed, device=device), 8, 64, 8, [64, 64], FP32, device)
        for seed in (1, 1, 2)
    )
    if not torch.equal(first, again):
        raise Red("the same seed drew other numbers")
    moments = {
        "mean": first.mean().item(),
        "deviation": first.std().item() - 1,
        "fourth": first.pow(4).mean().item() - 3,
    }
    correlation = (first * other).mean().item()
    return {name: _hold(name, abs(value), 0.1) for name, value in {**moments, "correlation": correlation}.items()}


def _worst(x: Tensor) -> float:
    return x.double().abs().max().item()


def _sort(context: Context, dtype: torch.dtype, count: int) -> dict[str, float]:
    length = 20_000 if context.plan.measures else 100
    generator = torch.Generator().manual_seed(2)
    shape = (2, 2, 2, length)
    buckets = torch.randint(count, shape, generator=generator).to(context.device.torch, dtype)
    found = functional.sort_positions(buckets, backend=context.backend)
    expected = functional.sort_positions(buckets, backend="reference")
    return {"positions": _hold("positions", _worst(found.long() - expected), 0.0)}


def _dropout(context: Context) -> dict[str, float]:
    (x,) = _randn((33, 65), context.device, 1)
    x, seed = x.float(), torch.tensor(9)
    found = functional.dropout(x, 0.3, seed, backend=context.backend)
    expected = functional.dropout(x, 0.3, seed, backend="reference")
    other = _worst((found == 0).float() - (expected == 0).float())
    return {"kept": _hold("kept", other, 0.0), "values": _hold("values", relative_error(found, expected), 1e-6)}


def _cross_entropy(context: Context) -> dict[str, float]:
    function = functional.cross_entropy_sum
    more = {"backend": context.backend} if "backend" in inspect.signature(function).parameters else {}
    (logits,) = _randn((2, 100, 320), context.device, 1)
    labels = torch.arange(200, device=context.device.torch).view(2, 100).clone()
    labels[0, :7] = functional.IGNORE_INDEX
    x = logits.float().requires_grad_()
    loss = function(x, labels, **more)
    loss.backward()
    y = logits.clone().requires_grad_()
    true = F.cross_entropy(y.flatten(0, 1), labels.flatten(), ignore_index=functional.IGNORE_INDEX, reduction="sum")
    true.backward()
    assert x.grad is not None
    assert y.grad is not None
    return {
        "loss": _hold("loss", relative_error(loss, true), 1e-5),
        "gradient": _hold("gradient", relative_error(x.grad, y.grad), 1e-5),
    }


# --- whole models -----------------------------------------------------------------------------------------------------


def _model(context: Context, seed: int, **changes: Any) -> Any:
    """Return a small model in fp32, with dropout in its defaults."""
    small = {"hidden_size": 64, "feed_forward_size": 64, "axial_pos_embds_dim": (16, 48), "axial_pos_shape": (16, 32)}
    small |= {"attn_layers": ["local", "lsh"] * (2 if context.plan.measures else 1), "num_buckets": [4, 4]}
    if not context.plan.measures:
        small |= {"attention_head_size": 16, "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16}
    torch.manual_seed(seed)
    made = {**NOVEL, **small, "num_hashes": 2, "hash_seed": seed, **changes}
    model: Any = ReformerModelWithLMHead(ReformerConfig(**made)).to(context.device.torch)
    model.set_backend(context.backend)
    return model


def _ids(context: Context, length: int, seed: int, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(320, (batch, length), generator=generator).to(context.device.torch)


def _gradient(context: Context, model: Any, seed: int, autocast: bool = False) -> Tensor:
    """Return all gradients of one training step in one vector."""
    ids = _ids(context, 500 if context.plan.measures else 40, seed)
    torch.manual_seed(seed)
    with torch.autocast(context.device.torch.type, BF16, enabled=autocast):
        loss = model.train()(ids, labels=ids, return_logits=False).loss
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


def _one_of_seeds(what: str, bound: float, error_of: Callable[[int], float]) -> dict[str, float]:
    errors: dict[str, float] = {}
    for seed in SEEDS:
        errors[f"{what}, seed {seed}"] = error_of(seed)
        if errors[f"{what}, seed {seed}"] <= bound:
            return errors
    raise Red(f"{what}: errors {', '.join(f'{error:.3g}' for error in errors.values())} > {bound:.3g}")


def _reversible(context: Context, autocast: bool) -> dict[str, float]:
    models = [_model(context, 0, reversible=reversible) for reversible in (True, False)]
    reversible, plain = (_gradient(context, model, 0, autocast) for model in models)
    return {"gradient": _hold("gradient", relative_error(reversible, plain), AUTOCAST if autocast else REVERSIBLE)}


def _against_reference(context: Context) -> dict[str, float]:
    def error_of(seed: int) -> float:
        model = _model(context, seed)
        found = _gradient(context, model, seed)
        model.set_backend("reference")
        return relative_error(found, _gradient(context, model, seed))

    return _one_of_seeds("gradient", MODEL, error_of)


def _decode(context: Context) -> dict[str, float]:
    """Compare cached steps with forwards without a cache: for one LSH layer above a local one they are equal."""
    first, last = (100, 150) if context.plan.measures else (20, 23)

    def error_of(seed: int) -> float:
        model = _model(context, seed, attn_layers=["local", "lsh"]).eval()
        ids = _ids(context, last, seed)
        with torch.no_grad():
            cache = model(ids[:, :first], use_cache=True).past_buckets_states
            worst = 0.0
            for end in range(first + 1, last + 1):
                cached = model(ids[:, end - 1 : end], past_buckets_states=cache).logits[:, -1]
                whole = model(ids[:, :end], use_cache=False).logits[:, -1]
                worst = max(worst, relative_error(cached, whole))
        return worst

    return _one_of_seeds("logits", STEPS, error_of)


# --- all --------------------------------------------------------------------------------------------------------------


def checks(context: Context) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """Yield names and checks."""
    whole = context.plan.measures
    yield "rotations", lambda: _rotations(context)
    yield "hash, bf16", lambda: _hash(context, BF16)
    yield "hash, fp32", lambda: _hash(context, FP32)
    yield "sort, int16", lambda: _sort(context, torch.int16, 257)
    yield "sort, int32", lambda: _sort(context, torch.int32, 2**15 + 1)
    yield "dropout", lambda: _dropout(context)
    yield "cross-entropy", lambda: _cross_entropy(context)
    for each in ATTENTIONS[:9] if whole else TOYS:
        yield each.name, lambda each=each: each.check(context.device, context.backend)
    yield "one head of many, long", lambda: _long(context)
    yield "reversible against plain gradients, fp32", lambda: _reversible(context, False)
    yield "model against reference, fp32", lambda: _against_reference(context)
    yield "cached steps", lambda: _decode(context)
    yield "reversible against plain gradients, autocast", lambda: _reversible(context, True)
    for each in (*_atomic(context.backend), *ATTENTIONS[9:]) if whole else ():
        yield each.name, lambda each=each: each.check(context.device, context.backend)


def suite(context: Context) -> Row:
    """Run all checks. A check that time does not allow is named; it is not red."""
    rows = context.rows
    for name, check in checks(context):
        row: Row = {"check": name}
        if context.share.out():
            row["not_run"] = OVER
        else:
            try:
                row["errors"] = check()
            except Exception as error:
                row["red"] = str(error) if isinstance(error, Red) else failure(error)
        rows.append(row)
        verdict = f"RED, {row['red']}" if "red" in row else row.get("not_run") or "ok"
        context.say(f"parity, {name}: {verdict}")
        context.device.free()
    return {"rows": rows, "red": [row["check"] for row in rows if "red" in row]}
