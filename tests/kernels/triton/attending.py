"""What the tests of the attention kernels share: one comparison with the definition, watched while the kernels run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import pytest
import torch
from hypothesis import Phase
from torch import Tensor

from flash_reformer.kernels.triton import _launch, _run
from flash_reformer.ops import attention, chunking, dense, hashing, randomness, sorting
from tests.kernels.cpu.tools import HALF, Call, assert_shaped, error, results
from tests.kernels.triton.spying import entered, spoiled

#: Failing examples are not simplified: each takes seconds.
PHASES = (Phase.explicit, Phase.generate)
if not _launch.INTERPRETED:
    pytest.skip("these tests are for triton's interpreter", allow_module_level=True)

FORWARD = {"attend_kernel"}
BACKWARD = {"delta_kernel", "attend_backward_kernel"}


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise AssertionError("a kernel called the definition")


@contextmanager
def watched(kernels: set[str]) -> Iterator[None]:
    """Meanwhile exactly these kernels must run, perhaps with a merge; empty memory is spoiled, definitions refuse."""
    with ExitStack() as stack:
        for module in (attention, chunking, dense, hashing, randomness, sorting):
            for name, it in list(vars(module).items()):
                if inspect.isfunction(it):
                    stack.enter_context(mock.patch.object(module, name, _refuse))
        stack.enter_context(spoiled())
        names = stack.enter_context(entered())
        yield
    assert set(names) - {"merge_kernel"} == kernels, f"{names} ran"


@contextmanager
def before_hopper() -> Iterator[None]:
    """The choices for devices before Hopper: other tiles."""
    with mock.patch.object(_run, "is_hopper", return_value=False):
        yield


def outcome(kernel: Call, inputs: dict[str, Tensor], gaps: bool = False) -> dict[str, Tensor]:
    """As ``results``, of a kernel that is watched."""
    with watched(FORWARD | BACKWARD):
        return results(kernel, inputs, gaps)


def values(kernel: Call, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a kernel that is watched."""
    with watched(FORWARD), torch.no_grad():
        return kernel(**inputs)


def assert_parity(
    kernel: Call, definition: Call, exact_inputs: dict[str, Tensor], dtype: torch.dtype, gaps: bool = False
) -> None:
    """Values and gradients are not much further from the fp64 definition than the definition in ``dtype`` is.

    Values at most twice as far, gradients three times, all on the same numbers. The largest error of few numbers is a
    matter of luck, so two roundings are let pass in any case, eight in fp32. There they are multiplied by the inputs:
    scores may be sums that cancel, and their gradients differences of equal numbers.
    """
    inputs = {name: x.to(dtype) for name, x in exact_inputs.items()}
    truth = results(definition, {name: x.double() for name, x in inputs.items()})
    plain, actual = results(definition, inputs), outcome(kernel, inputs, gaps)
    assert_shaped(actual, plain)
    largest = max(1.0, *(x.abs().amax().item() for x in inputs.values()))
    for name, value in truth.items():
        ours, theirs = error(actual[name], value, name), error(plain[name], value, name)
        half = dtype in HALF and name != "lse"
        roundings = 2 * torch.finfo(dtype).eps if half else 8 * torch.finfo(torch.float32).eps
        if name == "lse" or (not half and name != "out"):
            roundings *= largest
        limit = (3 if name.startswith("d_") else 2) * theirs + roundings
        assert ours <= limit, f"{name} in {dtype}: error {ours:.3g}, the definition's {theirs:.3g}"
