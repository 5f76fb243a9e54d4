"""Indices beyond 2^31: the last programs of launches over tensors of many gigabytes, of which little is ever touched.

16 rows of 2^21 positions, 9 heads of size 128 and 8 rounds: one sequence has more than 2^31 entries, all have 2^35, the
outputs of all rounds 2^38, and there are more than 2^31 slots. The host's code plans every launch; of each only the
last programs run.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from flash_reformer.ops import attention as ops
from tests.kernels.cpu.tools import error, results
from tests.ops.tools import generator, randn

pytest.importorskip("triton")

from triton.runtime import interpreter

from flash_reformer.kernels.triton import _run
from tests.kernels.triton import attending  # noqa: F401  without the interpreter it skips this file

B, T, H, D, R, C = 16, 2**21, 9, 128, 8, 16
#: The last two chunks' positions are all that holds anything but zeros; in the last head of the last row.
NEAR = slice(T - 2 * C, T)
PLACE = (B - 1, NEAR, H - 1)
HALF = torch.float16
#: Linux's MAP_NORESERVE, which Python names from 3.13 on.
NO_RESERVE = 0x4000


def lazy(*shape: Any, dtype: torch.dtype, **_: Any) -> Tensor:
    """Memory that exists only where it is touched; there it is zero."""
    size = torch.Size(shape[0] if isinstance(shape[0], tuple) else shape)
    memory = mmap.mmap(-1, max(1, size.numel()) * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype)[: size.numel()].view(size)


def _place(builder: Any, program: int, *_: int) -> None:
    builder.grid_idx = (program, 0, 0)


def _run_last(
    kernel: Any, programs: int, *args: Any, like: Tensor, num_warps: int, num_stages: int = 2, **rest: Any
) -> None:
    """Run two programs, of the last tiles, or one, of the last rows; of launches by round, those of the last one."""
    assert rest.get("WIDE", True)
    if not (rest.get("LAST_V", True) or rest["ATOMIC"]):
        return
    assert programs >= B * H * T // 64
    builder = interpreter.interpreter_builder
    for program in (programs - 2, programs - 1) if "WIDE" in rest else (programs - 1,):
        place = mock.patch.object(builder, "set_grid_idx", partial(_place, builder, program))
        # What no program has computed before is 0, also where it divides.
        with place, np.errstate(invalid="ignore"):
            kernel[(1,)](*args, **rest)


@contextmanager
def last_programs() -> Iterator[None]:
    with ExitStack() as stack:
        # The interpreter writes storages back to where they are already, which would touch all of them.
        stack.enter_context(mock.patch.object(interpreter.GridExecutor, "_restore_args_dev"))
        stack.enter_context(mock.patch.object(_run, "launch", _run_last))
        stack.enter_context(mock.patch.object(_run, "_chunk_of", _chunk_of))
        for name in ("empty", "zeros"):
            stack.enter_context(mock.patch.object(torch, name, lazy))
        stack.enter_context(mock.patch.object(torch, "empty_like", lambda x: lazy(*x.shape, dtype=x.dtype)))
        stack.enter_context(mock.patch.object(torch.Tensor, "to", _as_it_is))
        yield


def _as_it_is(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums in another dtype stay sums, for the same reason."""
    assert x.shape == (B, T, H, D)
    return x


def _chunk_of(order: Tensor, chunk_length: int) -> Tensor:
    """The chunks of the last round's last positions: the others are not looked at."""
    chunks = lazy(*order.shape, dtype=torch.int32)
    slots = torch.arange(R * T - 2 * C, R * T)
    chunks[B - 1, H - 1, R - 1].index_copy_(0, order[B - 1, H - 1, R - 1, NEAR], (slots // C).int())
    return chunks


def run(
    rows: dict[str, Tensor], rules: _run.Rules, facts: dict[str, Tensor | None], deterministic: bool
) -> dict[str, Tensor]:
    """What attention makes of tensors that hold these rows, ``[2 * C, D]``: its rows there."""
    far = {name: lazy(B, T, H, D, dtype=HALF) for name in rows}
    for name, x in far.items():
        x[PLACE] = rows[name]
    given = _run.Facts(far["query"], far.get("key"), far["v"], **facts, dropout_seed=None)
    with last_programs():
        out, lse, top, total = _run.attend(given, rules)
        # The first rows meet the last chunk, and no program has seen them.
        total[B - 1, H - 1, :C] = 1.0
        d_q, d_k, d_v = _run.attend_backward(far["d_out"], out, top, total, given, rules, deterministic)
    found = {"out": out[PLACE], "lse": lse[B - 1, H - 1, -1, NEAR], "d_query": d_q[PLACE], "d_v": d_v[PLACE]}
    return found if given.key_BTHD is None else {**found, "d_key": d_k[PLACE]}


def draw(*names: str) -> dict[str, Tensor]:
    return {name: randn(2 * C, D, seed=number, dtype=HALF) for number, name in enumerate(names)}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0.1
        assert error(found[name], value.reshape(found[name].shape), name) < 4e-3, name


def gradients(call: Any, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The definition's results in fp64, for the random gradient that ``results`` takes."""
    return results(call, {name: x.double()[None, :, None] for name, x in rows.items() if name != "d_out"})


@pytest.mark.parametrize("deterministic", [True, False])
def test_lsh_attention(deterministic: bool) -> None:
    """The last ring's last round, within buckets: elsewhere all tokens are in another one."""
    rows = {**draw("query", "v"), "d_out": randn(1, 2 * C, 1, D, seed=99, dtype=torch.float32)[0, :, 0].to(HALF)}
    near = torch.randperm(2 * C, generator=generator(1))
    order, buckets = lazy(B, H, R, T, dtype=torch.int64), lazy(B, H, R, T, dtype=torch.int16)
    order[B - 1, H - 1, R - 1, NEAR] = near + NEAR.start
    # In the other rounds nobody meets anybody.
    buckets[B - 1, H - 1, :, NEAR] = torch.arange(1, 2 * C + 1, dtype=torch.int16)
    buckets[B - 1, H - 1, R - 1, NEAR] = 1
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[B - 1, T - 3] = False
    rules = _run.Rules(C, 1, 0, False, True, True, False, False, D**-0.5, 0.0)
    facts = {"sorted_positions_BHRT": order, "buckets_BHRT": buckets, "mask_BT": mask}

    def definition(query: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        plain = {"chunk_length": C, "mask_BT": mask[B - 1 :, NEAR], "wrap_around": False}
        return ops.lsh_attention(query, v, near[None, None, None], **plain)

    check(run(rows, rules, facts, deterministic), gradients(definition, rows))


def test_local_attention() -> None:
    """The last chunks of the last ring; before them are zeros."""
    rows = {**draw("query", "key", "v"), "d_out": randn(1, 2 * C, 1, D, seed=99, dtype=torch.float32)[0, :, 0].to(HALF)}
    rules = _run.Rules(C, 1, 0, True, False, True, True, True, D**-0.5, 0.0)
    facts = dict.fromkeys(("sorted_positions_BHRT", "buckets_BHRT", "mask_BT"))

    def definition(query: Tensor, key: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        padded = (torch.cat([torch.zeros_like(x[:, :C]), x], 1) for x in (query, key, v))
        out, lse = ops.local_attention(*padded, chunk_length=C, causal=True)
        return out[:, C:], lse[..., C:]

    check(run(rows, rules, facts, True), gradients(definition, rows))
