"""Which implementation runs: kernels on a CPU unless asked otherwise, and never anything else behind one's back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from flash_reformer import functional
from flash_reformer.kernels.cpu import attention, hashing, linear, randomness, sorting
from flash_reformer.ops import attention as ops_attention
from flash_reformer.ops import hashing as ops_hashing
from flash_reformer.ops import linear as ops_linear
from flash_reformer.ops import randomness as ops_randomness
from flash_reformer.ops import sorting as ops_sorting
from tests.kernels.cpu.tools import layout_of, seed, window
from tests.ops.tools import randn


class Route(NamedTuple):
    """A function of ``functional``, the modules of its kernel and of its definition, and a call of it."""

    name: str
    kernels: Any
    ops: Any
    call: Callable[..., Any]


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*shape, seed=1, dtype=dtype)


def routes(dtype: torch.dtype = torch.float32) -> dict[str, Route]:
    """Every function that has a kernel; all take the backend."""
    order, buckets = layout_of(1, 2, 2, 6)
    x, vectors = drawn(1, 6, 2, 4, dtype=dtype), drawn(1, 6, 2, 4, dtype=dtype)
    wide, weight = drawn(512, 128), drawn(128, 128)
    rotations = drawn(2, 4, 2, 3, dtype=dtype)
    listed = [
        Route("hash_vectors", hashing, ops_hashing, lambda b: functional.hash_vectors(vectors, rotations, [6], **b)),
        Route("sort_positions", sorting, ops_sorting, lambda b: functional.sort_positions(buckets, **b)),
        Route(
            "lsh_attention",
            attention,
            ops_attention,
            lambda b: functional.lsh_attention(x, x, order, **window(3, 1, 0), **b),
        ),
        Route(
            "local_attention",
            attention,
            ops_attention,
            lambda b: functional.local_attention(x, x, x, **window(3, 1, 0), **b),
        ),
        Route("exact_attention", attention, ops_attention, lambda b: functional.exact_attention(x, x, x, **b)),
        Route("dropout", randomness, ops_randomness, lambda b: functional.dropout(x, 0.5, seed(1), **b)),
        Route("linear", linear, ops_linear, lambda b: functional.linear(wide, weight, **b)),
    ]
    return {route.name: route for route in listed}


NAMES = list(routes())


def entered(route: Route, backend: dict[str, str]) -> tuple[int, int]:
    """How often the kernel and the definition run."""
    with (
        mock.patch.object(route.kernels, route.name, wraps=getattr(route.kernels, route.name)) as kernel,
        mock.patch.object(route.ops, route.name, wraps=getattr(route.ops, route.name)) as definition,
    ):
        route.call(backend)
    return kernel.call_count, definition.call_count


def test_every_kernel_has_a_route() -> None:
    """A public function of a kernel module that ``functional`` offers is one of those below."""
    for module in (attention, hashing, linear, randomness, sorting):
        public = {name for name, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__}
        offered = {name for name in public if not name.startswith("_") and hasattr(functional, name)}
        assert offered
        assert offered <= set(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", [{}, {"backend": "auto"}, {"backend": "cpu"}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_run_on_a_cpu(name: str, backend: dict[str, str], dtype: torch.dtype) -> None:
    assert entered(routes(dtype)[name], backend) == (1, 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_definition_runs_where_it_is_asked_for(name: str) -> None:
    assert entered(routes()[name], {"backend": "reference"}) == (0, 1)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_backend_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        routes()[name].call({"backend": "cuda"})


@pytest.mark.parametrize("strange", ["meta", "complex64", "float8_e4m3fn", "int64"])
@pytest.mark.parametrize("name", NAMES)
def test_a_backend_that_cannot_run_raises(name: str, strange: str) -> None:
    """Asked for by name, it says so; ``auto`` leaves such tensors to the definition."""
    bad = {
        "meta": lambda *shape: torch.empty(*shape, device="meta"),
        "complex64": lambda *shape: torch.zeros(*shape, dtype=torch.complex64),
        "float8_e4m3fn": lambda *shape: torch.zeros(*shape).to(torch.float8_e4m3fn),
        "int64": lambda *shape: torch.zeros(*shape, dtype=torch.int64),
    }[strange]
    x, backend = bad(1, 6, 2, 4), {"backend": "cpu"}
    order, _ = layout_of(1, 2, 2, 6)
    calls = {
        "hash_vectors": lambda: functional.hash_vectors(x, bad(2, 4, 2, 3), [6], **backend),
        "sort_positions": lambda: functional.sort_positions(x, **backend),
        "lsh_attention": lambda: functional.lsh_attention(x, x, order, **window(3, 1, 0), **backend),
        "local_attention": lambda: functional.local_attention(x, x, x, **window(3, 1, 0), **backend),
        "exact_attention": lambda: functional.exact_attention(x, x, x, **backend),
        "dropout": lambda: functional.dropout(x, 0.5, seed(1), **backend),
        "linear": lambda: functional.linear(bad(512, 128), bad(128, 128), **backend),
    }
    with pytest.raises(ValueError, match="backend='cpu'"):
        calls[name]()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8], ids=str)
def test_other_integers_are_sorted_by_the_definition(dtype: torch.dtype) -> None:
    buckets = layout_of(1, 2, 2, 6)[1].to(dtype)
    assert torch.equal(functional.sort_positions(buckets), ops_sorting.sort_positions(buckets))


def test_other_devices_get_the_definition() -> None:
    x = torch.empty(1, 6, 2, 4, device="meta")
    assert functional.backend_for(x) == "reference"
    out, _ = functional.exact_attention(x, x, x)
    assert out.device.type == "meta"


@pytest.mark.parametrize("backend", [{}, {"backend": "cpu"}], ids=str)
def test_linear_maps_that_convolutions_do_not_suit_are_torchs_own(backend: dict[str, str]) -> None:
    """Few multiplications, other dtypes, autocast: the one exception, and it is stated."""

    def runs(x: Tensor, weight: Tensor) -> tuple[int, int]:
        route = Route("linear", linear, ops_linear, lambda b: functional.linear(x, weight, **b))
        return entered(route, backend)

    wide, weight = drawn(512, 128), drawn(128, 128)
    assert runs(wide, weight) == (1, 0)
    assert runs(wide.view(2, 256, 128), torch.nn.Parameter(weight)) == (1, 0)
    assert runs(wide[1:], weight) == (0, 1)
    assert runs(wide.double(), weight.double()) == (0, 1)
    assert runs(wide.bfloat16(), weight.bfloat16()) == (0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert runs(wide, weight) == (0, 1)


def test_results_do_not_depend_on_what_ran() -> None:
    for route in routes(torch.float64).values():
        ours, theirs = (route.call({"backend": backend}) for backend in ("cpu", "reference"))
        pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
        for one, other in pairs:
            assert (one.double() - other.double()).abs().max() < (1e-4 if route.name == "linear" else 1e-12)
