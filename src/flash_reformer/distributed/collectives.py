"""Collective operations that gradients pass through.

Their gradients are honest ones: what a rank gets back is the derivative of the sum of all ranks' losses by what it
gave. So if every rank computes a loss, the mean over ranks of a parameter's gradients is the gradient of the losses'
mean, whatever each rank has computed by itself, and whatever together. Engines of data parallelism take that mean.

All tensors travel as bytes, so that any dtype may. Letters: P ranks, X anything.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def _wide(x: Tensor) -> Tensor:
    """Return ``x`` in a dtype in which a few numbers can be added."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def trade(x_PX: Tensor, group: ProcessGroup) -> Tensor:
    """Give ``x[p]`` to rank p; return what each rank has given, ``[P, ...]``."""
    x_PX = x_PX.contiguous()
    out_PX = torch.empty_like(x_PX)
    dist.all_to_all_single(_bytes(out_PX), _bytes(x_PX), group=group)
    return out_PX


def gather(x_X: Tensor, group: ProcessGroup) -> Tensor:
    """Return every rank's ``x``, ``[P, ...]``."""
    out_PX = x_X.new_empty(group.size(), *x_X.shape)
    dist.all_gather([_bytes(out_X) for out_X in out_PX], _bytes(x_X.contiguous()), group=group)
    return out_PX


def add(x_X: Tensor, group: ProcessGroup) -> Tensor:
    """Return the sum of all ranks' ``x``."""
    total_X = _wide(x_X).clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total_X, group=group)
    return total_X.to(x_X.dtype)


def mean(x_X: Tensor, group: ProcessGroup) -> Tensor:
    """Return the mean of all ranks' ``x``."""
    # Divided first, so that half precision cannot overflow where the mean does not.
    return add(_wide(x_X) / group.size(), group).to(x_X.dtype)


class Trade(torch.autograd.Function):
    """:func:`trade`, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return trade(x_PX, group)

    @staticmethod
    def backward(ctx: Any, d_PX: Tensor) -> tuple[Tensor, None]:
        return Trade.apply(d_PX, ctx.group), None


class Gather(torch.autograd.Function):
    """:func:`gather`; a rank gets back the sum of what ranks have done with its part."""

    @staticmethod
    def forward(ctx: Any, x_X: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(x_X, group)

    @staticmethod
    def backward(ctx: Any, d_PX: Tensor) -> tuple[Tensor, None]:
        return _wide(Trade.apply(d_PX, ctx.group)).sum(dim=0).to(d_PX.dtype), None


class Add(torch.autograd.Function):
    """:func:`add`, which is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x_X: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return add(x_X, group)

    @staticmethod
    def backward(ctx: Any, d_X: Tensor) -> tuple[Tensor, None]:
        return Add.apply(d_X, ctx.group), None


class Mine(torch.autograd.Function):
    """This rank's part ``x[rank]`` of ``[P, ...]`` that all ranks have alike; going back, the mean over ranks."""

    @staticmethod
    def forward(ctx: Any, x_PX: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x_PX[group.rank()].clone()

    @staticmethod
    def backward(ctx: Any, d_X: Tensor) -> tuple[Tensor, None]:
        return Gather.apply(d_X, ctx.group) / ctx.group.size(), None
