"""A step's attention: the kernel against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flash_reformer.kernels.triton import decoding as kernels
from flash_reformer.ops import decoding as ops
from tests.kernels.cpu.tools import head_mask_of
from tests.kernels.triton.spying import DTYPES, entered, spoiled
from tests.ops.tools import generator, randn

SIZES = [(1, 1, 1, 2, 16), (2, 3, 2, 65, 64), (3, 1, 2, 130, 5), (1, 2, 1, 64, 128)]


def arguments(B: int, M: int, H: int, X: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """Rows stand in storage in another order; it has room for one more, and NaN where nobody may look."""
    Y, U = B + 1, 7
    storage = randn(Y, H, U, 2 * D, seed=2, dtype=torch.float32).to(dtype)
    storage[:, :, -1] = torch.nan
    rows = torch.arange(B).flip(0) + 1
    lanes = (rows.unsqueeze(-1) * H + torch.arange(H)) * U
    visible = torch.rand(B, H, M, X, generator=generator(3)) < 0.5
    visible[..., -1] = False
    visible[0, 0, 0] = False
    return {
        "query_BMHD": randn(B, M, H, D, seed=1, dtype=torch.float32).to(dtype),
        "keys_values_YHUX": storage,
        "lanes_BH": lanes,
        "positions_BHMX": torch.randint(U - 1, (B, H, M, X), generator=generator(4)),
        "visible_BHMX": visible,
    }


def widened(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if x.is_floating_point() else x for name, x in given.items()}


@pytest.mark.parametrize("heads", [False, True], ids=["all heads", "head mask"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernel_is_the_definition(sizes: tuple[int, ...], dtype: torch.dtype, heads: bool) -> None:
    given = arguments(*sizes, dtype)
    mask: Tensor | None = head_mask_of(sizes[2], torch.float64) if heads else None
    truth = ops.attend_at(**widened(given), head_mask_H=mask)
    plain = ops.attend_at(**given, head_mask_H=mask)
    with entered() as names, spoiled():
        actual = kernels.attend_at(**given, head_mask_H=mask)
    assert names == ["_attend_at_kernel"]
    assert actual.dtype == dtype
    limit = 2 * (plain.double() - truth).abs().max() + 2 * torch.finfo(dtype).eps
    assert (actual.double() - truth).abs().max() <= limit


@pytest.mark.floor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_query_that_sees_nothing_else_returns_its_value(dtype: torch.dtype) -> None:
    given = arguments(2, 2, 1, 70, 24, dtype)
    given["visible_BHMX"] = torch.zeros_like(given["visible_BHMX"])
    found = given["keys_values_YHUX"].flatten(0, 2)[given["positions_BHMX"] + given["lanes_BH"][:, :, None, None]]
    own = found[..., -1, 24:].transpose(1, 2)
    assert torch.equal(kernels.attend_at(**given), own)


def test_what_is_not_visible_is_not_counted() -> None:
    given = arguments(1, 2, 2, 65, 16, torch.float32)
    before = kernels.attend_at(**given)
    hidden = ~given["visible_BHMX"]
    hidden[..., -1] = False
    given["positions_BHMX"] = torch.where(hidden, (given["positions_BHMX"] + 1) % 6, given["positions_BHMX"])
    assert torch.equal(kernels.attend_at(**given), before)


def test_the_operator_is_what_torch_asks_for() -> None:
    torch.library.opcheck(
        torch.ops.flash_reformer.triton_attend_at.default, tuple(arguments(2, 2, 2, 9, 5, torch.float32).values())
    )
