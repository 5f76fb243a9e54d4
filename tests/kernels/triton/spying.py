"""What tests in triton's interpreter look at: which kernels run, and memory that nobody wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import interpreter

#: What the kernels take.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def entered() -> Iterator[list[str]]:
    """The names of the kernels that the interpreter runs meanwhile, one for every launch."""
    names: list[str] = []
    run = interpreter.GridExecutor.__call__

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", recorded):
        yield names


def _spoiling(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def spoiled_memory(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x.fill_(True if x.dtype == torch.bool else torch.iinfo(x.dtype).max)

    return spoiled_memory


@contextmanager
def spoiled() -> Iterator[None]:
    """Empty tensors that are made meanwhile are full of what shows if nobody writes to it."""
    with ExitStack() as stack:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, _spoiling(getattr(owner, name))))
        yield
