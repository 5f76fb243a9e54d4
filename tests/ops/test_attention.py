"""Attention against its definition: values, log-sum-exps, probabilities, and every gradient by name."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_reformer.ops import attention
from tests.ops import definitions
from tests.ops.tools import (
    HALF,
    HEAD_MASK,
    MASKS,
    B,
    D,
    H,
    assert_agrees,
    assert_close,
    assert_wide_integers,
    gradients,
    layout_of,
    make_mask,
    randn,
    untouched,
)

#: T, chunk length, rounds, before, after: odd and prime sizes, and rings shorter than their window.
GEOMETRIES = [
    (21, 3, 1, 1, 0),
    (12, 4, 2, 1, 1),
    (14, 7, 5, 0, 0),
    (9, 3, 4, 0, 2),
    (15, 3, 3, 3, 1),
    (6, 3, 1, 3, 2),
    (7, 7, 2, 1, 0),
]
LOCAL_GEOMETRIES = [
    (29, 29, 1, 0),
    (21, 3, 1, 0),
    (28, 4, 1, 1),
    (21, 7, 0, 0),
    (15, 3, 2, 3),
    (6, 3, 3, 2),
    (7, 7, 1, 1),
]
OPTIONS = [
    {"wrap_around": wrap, "attend_across_buckets": across, "allow_duplicate_attention": duplicates}
    for wrap, across, duplicates in product((True, False), repeat=3)
]
LSH_CASES = [
    pytest.param(geometry, options, causal, MASKS[(n + m + causal) % len(MASKS)], id=f"{n}-{m}-{causal}")
    for (n, geometry), (m, options), causal in product(enumerate(GEOMETRIES), enumerate(OPTIONS), (False, True))
]


def window(C: int, before: int, after: int) -> dict[str, int]:
    return {"chunk_length": C, "num_chunks_before": before, "num_chunks_after": after}


def leaves(T: int, *names: str) -> dict[str, Tensor]:
    return {name: randn(B, T, H, D, seed=seed).requires_grad_() for seed, name in enumerate(names)}


def check_lsh(T: int, R: int, mask: Tensor | None, options: dict[str, Any]) -> None:
    order, buckets = layout_of(T, R, seed=T + R)
    exact = leaves(T, "qk", "v")
    out, lse, _ = definitions.lsh_attention(*exact.values(), order, buckets, mask, **options)
    assert_agrees(lambda qk, v: attention.lsh_attention(qk, v, order, buckets, mask, **options), (out, lse), exact)


@pytest.mark.parametrize(("geometry", "options", "causal", "kind"), LSH_CASES)
def test_lsh_attention_and_its_gradients(
    geometry: tuple[int, ...], options: dict[str, bool], causal: bool, kind: str
) -> None:
    T, C, R, before, after = geometry
    check_lsh(T, R, make_mask(kind, T), {**window(C, before, after), **options, "causal": causal})


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("ny"[x] for x in o.values()))
@pytest.mark.parametrize("kind", MASKS)
def test_lsh_attention_under_every_mask(kind: str, options: dict[str, bool], causal: bool) -> None:
    check_lsh(12, 3, make_mask(kind, 12), {**window(4, 1, 1), **options, "causal": causal})


def dropout_factors(seed: int, p: float, *shape: int) -> Tensor:
    """What dropout multiplies probabilities of this shape by, seen on ones."""
    return attention.scale_probs(torch.ones(shape, dtype=torch.float64), None, p, torch.tensor(seed))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("ny"[x] for x in o.values()))
def test_lsh_attention_with_dropout_and_head_mask(options: dict[str, bool]) -> None:
    """Dropout acts after the log-sum-exp: the merge weights are those without it."""
    T, C, R = 12, 4, 3
    options = {**window(C, 1, 1), **options, "causal": True}
    order, buckets = layout_of(T, R, seed=4)
    inputs = {**leaves(T, "qk", "v"), "head_mask": HEAD_MASK.clone().requires_grad_()}
    qk, v, head_mask = inputs.values()
    factors = dropout_factors(11, 0.3, B, H, R * T // C, C, 3 * C)
    mask = make_mask("right", T)
    out, lse, _ = definitions.lsh_attention(qk, v, order, buckets, mask, head_mask, factors, **options)
    actual = attention.lsh_attention(
        qk, v, order, buckets, mask, head_mask, **options, dropout_p=0.3, dropout_seed=torch.tensor(11)
    )
    assert_close(actual[0], out, 1e-10, "out")
    assert_close(actual[1], lse, 1e-10, "lse")
    expected = gradients((out, lse), inputs)
    for name, grad in gradients(actual, inputs).items():
        assert_close(grad, expected[name], 1e-10, f"gradient of {name}")
    plain = attention.lsh_attention(qk, v, order, buckets, mask, **options)
    assert torch.equal(plain[1], actual[1]), "dropout or the head mask changed the merge weights"
    assert (plain[0] - actual[0]).abs().max() > 0.1


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("ny"[x] for x in o.values()))
def test_the_backward_identity_holds(options: dict[str, bool], dropout: bool) -> None:
    """``P = exp(s - LSE); dS = P (m dO·v - delta)``, 0 where the score was set: nothing per round need be saved."""
    T, C, R = 9, 3, 3
    options = {**window(C, 1, 1), **options, "causal": True}
    order, buckets = layout_of(T, R, seed=4)
    inputs = leaves(T, "qk", "v")
    grad_out, mask, head_mask = randn(B, T, H, D, seed=5), make_mask("scattered", T), HEAD_MASK.clone()
    factors = dropout_factors(7, 0.2, B, H, R * T // C, C, 3 * C) if dropout else None
    out, _ = attention.lsh_attention(
        *inputs.values(),
        order,
        buckets,
        mask,
        head_mask if dropout else None,
        **options,
        dropout_p=0.2 if dropout else 0.0,
        dropout_seed=torch.tensor(7),
    )
    actual = torch.autograd.grad(out, list(inputs.values()), grad_out)
    with torch.no_grad():
        expected = definitions.lsh_backward(
            grad_out, *inputs.values(), order, buckets, mask, head_mask if dropout else None, factors, **options
        )
    for name, ours, theirs in zip(inputs, actual, expected, strict=True):
        assert_close(ours, theirs, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("wrap_around", [False, True])
@pytest.mark.parametrize(("n", "geometry"), list(enumerate(LOCAL_GEOMETRIES)))
def test_local_attention_and_its_gradients(n: int, geometry: tuple[int, ...], wrap_around: bool, causal: bool) -> None:
    T, C, before, after = geometry
    options = {**window(C, before, after), "wrap_around": wrap_around, "causal": causal}
    for kind in ("none", MASKS[1 + (n + causal) % 3], "whole row"):
        mask, exact = make_mask(kind, T), leaves(T, "query", "key", "v")
        out, lse, _ = definitions.local_attention(*exact.values(), mask, **options)
        assert_agrees(
            lambda *inputs, mask=mask: attention.local_attention(*inputs, mask, **options),
            (out, lse),
            exact,
            through_lse=kind == "none",
            note=f"under mask {kind}",
        )


@pytest.mark.parametrize("wrap_around", [False, True])
def test_local_attention_with_dropout_and_head_mask(wrap_around: bool) -> None:
    T, C = 15, 3
    options = {**window(C, 1, 1), "wrap_around": wrap_around}
    inputs = {**leaves(T, "query", "key", "v"), "head_mask": HEAD_MASK.clone().requires_grad_()}
    query, key, v, head_mask = inputs.values()
    mask, factors = make_mask("left", T), dropout_factors(5, 0.4, B, H, T // C, C, 3 * C)
    out, lse, _ = definitions.local_attention(query, key, v, mask, head_mask, factors, **options)
    actual = attention.local_attention(
        query, key, v, mask, head_mask, **options, dropout_p=0.4, dropout_seed=torch.tensor(5)
    )
    assert_close(actual[0], out, 1e-10, "out")
    assert_close(actual[1], lse, 1e-10, "lse")
    expected = gradients((out,), inputs)
    for name, grad in gradients(actual[:1], inputs).items():
        assert_close(grad, expected[name], 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_exact_attention_and_its_gradients(exclude_self: bool, causal: bool) -> None:
    T, options = 13, {"causal": causal, "exclude_self": exclude_self}
    for kind in MASKS:
        mask, exact = make_mask(kind, T), leaves(T, "query", "key", "v")
        out, lse, _ = definitions.plain_attention(*exact.values(), definitions.exact_rows(T), mask, **options)
        assert_agrees(
            lambda *inputs, mask=mask: attention.exact_attention(*inputs, mask, **options),
            (out, lse),
            exact,
            through_lse=kind == "none",
            note=f"under mask {kind}",
        )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_exact_shared_attention(kind: str, causal: bool) -> None:
    """What an LSH layer does at ``T <= C``: keys from the queries, and self only when nothing else is left."""
    qk, v, mask = randn(B, 7, H, D, seed=1), randn(B, 7, H, D, seed=2), make_mask(kind, 7)
    out, _ = attention.exact_attention(qk, attention.normalize_keys(qk), v, mask, causal=causal, exclude_self=True)
    assert_close(out, definitions.exact_shared_attention(qk, v, mask, causal=causal), 1e-10)
    if causal:
        assert torch.equal(out[:, 0], v[:, 0])


def test_exact_attention_with_dropout_and_head_mask() -> None:
    query, key, v = (randn(B, 11, H, D, seed=seed) for seed in range(3))
    head_mask, factors = HEAD_MASK.clone(), dropout_factors(5, 0.4, B, H, 11, 11)
    expected, _, _ = definitions.plain_attention(
        query, key, v, definitions.exact_rows(11), None, head_mask, factors.unsqueeze(2), causal=True
    )
    out, _ = attention.exact_attention(
        query, key, v, None, head_mask, causal=True, dropout_p=0.4, dropout_seed=torch.tensor(5)
    )
    assert_close(out, expected, 1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "".join("ny"[x] for x in o.values()))
def test_lsh_probabilities(options: dict[str, bool]) -> None:
    order, buckets = layout_of(12, 2, seed=3)
    qk, mask, layout = randn(B, 12, H, D, seed=1), make_mask("right", 12), {**window(4, 1, 1), **options}
    probs, lse = attention.lsh_probs(qk, order, buckets, mask, **layout)
    _, lse_BHRT, expected = definitions.lsh_attention(qk, qk, order, buckets, mask, **layout)
    assert_close(probs, expected, 1e-10)
    assert (probs.sum(-1) - 1).abs().max() < 1e-12
    assert_close(lse.flatten(2), lse_BHRT.gather(-1, order).flatten(2), 1e-10)


@pytest.mark.parametrize("wrap_around", [False, True])
def test_local_and_exact_probabilities(wrap_around: bool) -> None:
    query, key, mask = randn(B, 12, H, D, seed=1), randn(B, 12, H, D, seed=2), make_mask("whole row", 12)
    options = {**window(4, 1, 0), "wrap_around": wrap_around, "causal": True}
    probs, lse = attention.local_probs(query, key, mask, **options)
    _, lse_BHT, expected = definitions.local_attention(query, key, key, mask, **options)
    assert_close(probs, expected, 1e-10)
    assert_close(lse.flatten(2), lse_BHT, 1e-10)
    assert (probs[1, :, 1] == 1 / 8).all(), "a row without a single key averages its window"
    rows = definitions.exact_rows(12)
    probs, _ = attention.exact_probs(query, key, mask, causal=True, exclude_self=True)
    expected = definitions.plain_attention(query, key, key, rows, mask, causal=True, exclude_self=True)[2]
    assert_close(probs, expected.squeeze(2), 1e-10)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["default", "every option off"])
def test_gradcheck_lsh(options: dict[str, bool]) -> None:
    order, buckets = layout_of(4, 2, seed=3)
    qk, v = (randn(B, 4, H, 4, seed=seed)[:1, :, :1].requires_grad_() for seed in (1, 2))

    def call(qk: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layout = {**window(2, 1, 0), **options}
        return attention.lsh_attention(
            qk, v, order[:1, :1], buckets[:1, :1], **layout, causal=True, dropout_p=0.2, dropout_seed=torch.tensor(3)
        )

    assert torch.autograd.gradcheck(call, (qk, v))


def test_gradcheck_local_exact_and_keys() -> None:
    query, key, v = (randn(1, 4, 1, 4, seed=seed).requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(
        lambda *x: attention.local_attention(*x, **window(2, 1, 1), dropout_p=0.2, dropout_seed=torch.tensor(3)),
        (query, key, v),
    )
    assert torch.autograd.gradcheck(lambda *x: attention.exact_attention(*x, causal=True), (query, key, v))
    assert torch.autograd.gradcheck(attention.normalize_keys, query)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["default", "every option off"])
def test_half_precision_rounds_once_per_product(options: dict[str, bool], dtype: torch.dtype) -> None:
    """Against the fp64 definition on the same half-precision numbers; log-sum-exps are fp32."""
    order, buckets = layout_of(12, 4, seed=3)
    qk, v = randn(B, 12, H, D, seed=1, dtype=dtype), randn(B, 12, H, D, seed=2, dtype=dtype)
    layout = {**window(4, 1, 0), **options, "causal": True}
    out, lse = attention.lsh_attention(qk, v, order, buckets, **layout)
    expected, expected_lse, _ = definitions.lsh_attention(qk.double(), v.double(), order, buckets, **layout)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    unit = torch.finfo(dtype).eps
    assert_close(out, expected, 4 * unit)
    assert_close(lse, expected_lse, 4 * unit)


def test_nothing_is_written_and_no_generator_moves() -> None:
    order, buckets = layout_of(12, 2, seed=3)
    qk, v, head_mask = randn(B, 12, H, D, seed=1).requires_grad_(), randn(B, 12, H, D, seed=2), HEAD_MASK.clone()
    mask = make_mask("left", 12)
    assert mask is not None
    tensors = {"qk": qk, "v": v, "order": order, "buckets": buckets, "mask": mask, "head_mask": head_mask}
    dropout = {"dropout_p": 0.5, "dropout_seed": torch.tensor(3)}
    with untouched(**tensors):
        out, lse = attention.lsh_attention(*tensors.values(), **window(4, 1, 1), **OPTIONS[-1], **dropout)
        (out.sum() + lse.sum()).backward()
        attention.local_attention(qk, v, v, mask, head_mask, **window(4, 1, 1), **dropout)
        attention.exact_attention(qk, v, v, mask, head_mask, **dropout)
        attention.merge_rounds(randn(B, H, 3, 5, D, seed=1), randn(B, H, 3, 5, seed=2))


def test_integers_stay_wide() -> None:
    order, buckets = layout_of(12, 2, seed=3)
    qk = randn(B, 12, H, D, seed=1)
    narrow = buckets.to(torch.int16)
    assert_wide_integers(
        lambda: attention.lsh_attention(qk, qk, order, narrow, make_mask("left", 12), **window(4, 1, 1), **OPTIONS[-1])
    )
