"""Watching that losses and gradients stay finite, without making a GPU wait."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# So many steps in a row may a gradient scaler leave out: it halves its scale each time, from 2**16.
SKIPPED_AT_MOST = 30


class DivergedError(ValueError):
    """A loss or a gradient is not finite.

    Attributes:
        in_time: whether the weights are still those before the step.
    """

    def __init__(self, message: str, *, in_time: bool) -> None:
        super().__init__(message)
        self.in_time = in_time


Complaint = Callable[[list[float], bool], DivergedError]


class FiniteWatch:
    """Raises where a number is not finite: at once on a CPU; on CUDA one step later, when it has arrived anyway."""

    def __init__(self) -> None:
        self._awaited: tuple[Tensor, Any, Complaint] | None = None

    def check(self, values: Tensor, complaint: Complaint) -> None:
        """Look at ``values`` ``[n]``; ``complaint`` makes the error of them and of whether it comes in time."""
        if values.device.type != "cuda":
            self._look(values, complaint, in_time=True)
            return
        self.settle()
        arrived = torch.cuda.Event()
        held = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        held.copy_(values, non_blocking=True)
        arrived.record()
        self._awaited = (held, arrived, complaint)

    def settle(self) -> None:
        """Look at what is still on its way."""
        if self._awaited is None:
            return
        held, arrived, complaint = self._awaited
        self._awaited = None
        arrived.synchronize()
        self._look(held, complaint, in_time=False)

    @staticmethod
    def _look(values: Tensor, complaint: Complaint, *, in_time: bool) -> None:
        numbers = [float(value) for value in values.tolist()]
        if not all(map(math.isfinite, numbers)):
            raise complaint(numbers, in_time)


def rows_of_batches(loader: Any, epoch: int, first: int, count: int) -> list[int] | None:
    """Return which rows of the data set this rank's batches ``first .. first + count`` of an epoch hold.

    None where the loader has no order to look up, as with streams.
    """
    batches = getattr(loader, "batch_sampler", None)
    if batches is None:
        return None
    parts: tuple[Any, ...] = (
        loader,
        batches,
        getattr(batches, "batch_sampler", None),
        getattr(batches, "sampler", None),
    )
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    return [int(row) for batch in itertools.islice(iter(batches), first, first + count) for row in batch]
