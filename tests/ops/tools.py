"""What the tests of this room share: inputs of odd sizes, masks, comparison, and a check of purity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops import definitions

B, H, D = 2, 3, 5
HALF = [torch.float16, torch.bfloat16]
DTYPES = [*HALF, torch.float32, torch.float64]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
#: One factor per head; a negative one, so that no absolute value passes.
HEAD_MASK = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
MASKS = ["none", "left", "right", "scattered", "whole row"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def layout_of(T: int, R: int, seed: int, num_buckets: int = 3) -> tuple[Tensor, Tensor]:
    """Random buckets ``[B, H, R, T]`` and the order they sort into."""
    buckets = torch.randint(num_buckets, (B, H, R, T), generator=generator(seed))
    return definitions.sort_positions(buckets), buckets


def make_mask(kind: str, T: int) -> Tensor | None:
    """A mask ``[B, T]``, True at real tokens; every kind but "none" differs between the rows of the batch."""
    if kind == "none":
        return None
    mask = torch.ones(B, T, dtype=torch.bool)
    if kind == "left":
        mask[1, : T // 3 + 1] = False
    elif kind == "right":
        mask[0, -(T // 2) :] = False
        mask[1, -1] = False
    elif kind == "scattered":
        mask = torch.rand(B, T, generator=generator(T)) < 0.6
        mask[:, 0], mask[0, T // 2], mask[1, 1] = True, False, False
    else:
        assert kind == "whole row"
        mask[1] = False
    return mask


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error, absolute below 1 and relative above."""
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).abs() / expected.abs().clamp(min=1)).max().item()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "value") -> None:
    """Equal shapes, finite, close; and the expectation is no constant, so that no constant can pass."""
    assert actual.shape == expected.shape, f"{name}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    assert expected.numel() == 1 or expected.unique().numel() > 1, f"{name}: a constant proves nothing"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{name}: error {error:.3g} > {tolerance:.3g}"


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor], seed: int = 99) -> dict[str, Tensor]:
    """The gradient by every input, by name, of one fixed random functional of all the outputs."""
    loss = torch.zeros((), dtype=outputs[0].dtype)
    for number, output in enumerate(outputs):
        loss = loss + (output * randn(*output.shape, seed=seed + number, dtype=output.dtype)).sum()
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), retain_graph=True), strict=True))


def assert_agrees(
    call: Callable[..., tuple[Tensor, Tensor]],
    expected: tuple[Tensor, Tensor],
    exact: dict[str, Tensor],
    *,
    through_lse: bool = True,
    note: str = "",
) -> None:
    """``call(*inputs)`` gives output, lse and, by name, every gradient of the fp64 definition, in fp64 and fp32.

    Not ``through_lse`` where a row without keys has an lse of -1e9, which would drown the rest of an fp32 loss.
    """
    used = 2 if through_lse else 1
    wanted = gradients(expected[:used], exact)
    for dtype, tolerance in TOLERANCE.items():
        inputs = {name: x.detach().to(dtype).requires_grad_() for name, x in exact.items()}
        actual = call(*inputs.values())
        assert [x.dtype for x in actual] == [dtype, dtype]
        for name, ours, theirs in zip(("out", "lse"), actual, expected, strict=True):
            assert_close(ours, theirs, tolerance, f"{name} in {dtype} {note}")
        for name, grad in gradients(actual[:used], inputs).items():
            assert_close(grad, wanted[name], tolerance, f"gradient of {name} in {dtype} {note}")


@contextmanager
def untouched(**tensors: Tensor) -> Iterator[None]:
    """Fail if the block writes to one of the tensors or moves the default generator."""
    before = {name: (tensor.detach().clone(), tensor._version) for name, tensor in tensors.items()}
    state = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), state), "the default generator moved"
    for name, (copy, version) in before.items():
        assert torch.equal(tensors[name].detach(), copy), f"{name} changed"
        assert tensors[name]._version == version, f"{name} was written to"


class IntegerArithmetic(TorchDispatchMode):
    """Record the result dtype of every integer sum and product, by operation."""

    NAMES = ("add", "sub", "mul", "remainder", "div", "floor_divide")

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name.rstrip("_") in self.NAMES and isinstance(result, Tensor) and not result.is_floating_point():
            self.results.append((name, result.dtype))
        return result


def assert_wide_integers(call: Callable[[], object]) -> None:
    """Every integer sum and product in ``call`` is made in 64 bits, so no size that fits a machine overflows."""
    with IntegerArithmetic() as recorded:
        call()
    assert recorded.results, "no integer arithmetic seen: the check would prove nothing"
    narrow = [entry for entry in recorded.results if entry[1] != torch.int64]
    assert not narrow, f"narrow integer arithmetic: {narrow}"
