"""Attention alone, from projections to outputs: ours, exact attention, and pieces and variants of ours.

Letters: B batch, T positions, H heads, D head size, R rounds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from benchmarks.gpu.device import Device, Run
from flash_reformer import functional

PASSES = ("forward", "training")


@dataclass(frozen=True)
class Case:
    """One attention at one size, a batch of one; causal, one chunk before."""

    device: Device
    backend: str
    length: int
    heads: int
    head_size: int
    chunk: int
    rounds: int = 1
    dtype: torch.dtype = torch.bfloat16
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> dict[str, int]:
        """What a floor depends on."""
        size = self.dtype.itemsize
        return {"length": self.length, "heads": self.heads, "head_size": self.head_size, "itemsize": size}

    @cached_property
    def tensors(self) -> tuple[Tensor, ...]:
        """Query (or the shared query-key), key, value and the output's gradient, ``[B, T, H, D]``."""
        generator = torch.Generator(self.device.torch).manual_seed(0)
        shape = (1, self.length, self.heads, self.head_size)
        options: dict[str, Any] = {"generator": generator, "device": self.device.torch, "dtype": self.dtype}
        query, key, value, grad = (torch.randn(shape, **options) for _ in range(4))
        return *(x.requires_grad_() for x in (query, key, value)), grad

    def like(self, **changes: Any) -> Case:
        """Return another case on the same tensors."""
        made = replace(self, **changes)
        made.__dict__["tensors"] = self.tensors
        return made

    @cached_property
    def factors(self) -> list[int]:
        """The bucket factors that this length gets by itself."""
        return functional.automatic_num_buckets(self.length, self.chunk, self.length)

    @cached_property
    def seed(self) -> Tensor:
        """The seed of the rotations, where they are drawn."""
        return torch.tensor(7, device=self.device.torch)

    def rotations(self) -> Tensor:
        """Draw rotations as a layer does, from a seed on the device."""
        seed, sizes = self.seed, (self.heads, self.head_size, self.rounds)
        return functional.draw_rotations(seed, *sizes, self.factors, self.dtype, self.device.torch)

    def buckets(self, rotations: Tensor) -> Tensor:
        """Hash."""
        return functional.hash_vectors(self.tensors[0], rotations, self.factors, backend=self.backend)

    def positions(self, buckets: Tensor) -> Tensor:
        """Sort."""
        return functional.sort_positions(buckets, backend=self.backend)

    def attend(self, positions: Tensor, buckets: Tensor) -> Tensor:
        """Attend to sorted chunks."""
        qk, _, v, _ = self.tensors
        own = {"chunk_length": self.chunk, "causal": True, **self.options}
        return functional.lsh_attention(qk, v, positions, buckets, **own, backend=self.backend)[0]

    def lsh(self) -> Tensor:
        """Do all of it."""
        buckets = self.buckets(self.rotations())
        return self.attend(self.positions(buckets), buckets)

    def local(self) -> Tensor:
        """Attend locally."""
        own = {"chunk_length": self.chunk, "causal": True, **self.options}
        return functional.local_attention(*self.tensors[:3], **own, backend=self.backend)[0]

    @property
    def grad(self) -> Tensor:
        """The gradient of the output."""
        return self.tensors[3]

    def inputs_of(self, kind: str) -> tuple[Tensor, ...]:
        """Return what a kind of attention has gradients for."""
        query, key, value, _ = self.tensors
        return (query, value) if kind == "lsh" else (query, key, value)

    def run(self, kind: str, passes: str) -> Run:
        """Return the call for ``"forward"``, ``"backward"`` or ``"training"``, which is both."""
        attend: Callable[[], Tensor] = self.lsh if kind == "lsh" else self.local
        return runner(attend, self.inputs_of(kind), self.grad, passes)

    def exact(self, name: str, passes: str) -> Run:
        """Return the call of exact causal attention by one of torch's fused backends, ``[B, H, T, D]``."""
        with torch.no_grad():
            given = [x.detach().transpose(1, 2).contiguous() for x in self.tensors]
        inputs, grad = [x.requires_grad_() for x in given[:3]], given[3]

        def attend() -> Tensor:
            with sdpa_kernel(self.device.exact[name]):
                return F.scaled_dot_product_attention(*inputs, is_causal=True)

        return runner(attend, tuple(inputs), grad, passes)


def runner(attend: Callable[[], Tensor], inputs: tuple[Tensor, ...], grad: Tensor, passes: str) -> Run:
    """Return the call of one pass."""
    if passes == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return attend()

        return forward
    if passes == "backward":
        out = attend()
        return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)
    return lambda: torch.autograd.grad(attend(), inputs, grad)


def takes(function: Any, name: str) -> bool:
    """Return whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters


def deterministic_options(backend: str) -> list[dict[str, Any]]:
    """Return the ways of summing over rounds that can be chosen; none where there is no choice."""
    known = takes(functional.lsh_attention, "deterministic")
    if backend == "triton" and not known:
        from flash_reformer.kernels.triton import attention as kernel

        known = takes(kernel.lsh_attention, "deterministic")
    return [{"deterministic": True}, {"deterministic": False}] if known else []
