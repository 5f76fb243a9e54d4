"""Additions that lose nothing, fused: bit for bit those of plain operations."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from flash_reformer import functional, residual
from flash_reformer.kernels.triton._residual import add_streams
from tests.kernels.triton.spying import DTYPES, entered
from tests.models.test_triton import assert_close, build, ids_of, step
from tests.ops.tools import randn


@pytest.mark.floor
@pytest.mark.parametrize("negated", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (2, 33, 65)], ids=str)
def test_equal_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype, negated: bool) -> None:
    x, low = randn(*shape, seed=1, dtype=torch.float32), 1e-8 * randn(*shape, seed=2, dtype=torch.float32)
    value = (100 * randn(*shape, seed=3, dtype=torch.float32)).to(dtype)
    expected = residual.add_in_pieces(x, low, value, negated=negated)
    result, lost = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    add_streams(x, low, value, negated, result, lost)
    assert torch.equal(result, expected[0])
    assert torch.equal(lost, expected[1])
    assert lost.count_nonzero() > 0 or x.numel() == 1, "something was lost"
    # In place, and from a low part of one number.
    zero = torch.zeros(()).expand(shape)
    expected = residual.add_in_pieces(x, zero, value, negated=negated)
    add_streams(x, zero, value, negated, x, low)
    assert torch.equal(x, expected[0])
    assert torch.equal(low, expected[1])


def test_a_whole_step() -> None:
    model = build(hidden_dropout_prob=0.0, num_hashes=1)
    expected = step(model, ids_of(32, 1))
    with mock.patch.object(functional, "stream_addition", return_value=add_streams), entered() as names:
        actual = step(model, ids_of(32, 1))
    assert names.count("_add_kernel") == 8, "two per layer forward, two backward"
    assert_close(actual, expected, 0.0)


def test_only_asked_for() -> None:
    """Never behind the back of who asked for the definitions, nor for what it does not take."""
    x = torch.zeros(2, 3, 4)
    assert functional.stream_addition(x) is None, "on a CPU pieces are faster"
    gpu = mock.Mock(spec=torch.Tensor, dtype=torch.float32, device=torch.device("cuda:0"))
    with mock.patch.object(functional, "type", side_effect=lambda _: torch.Tensor, create=True):
        assert functional.stream_addition(gpu, "reference") is None
        with mock.patch.object(functional, "_unsuited_device", return_value=None):
            assert functional.stream_addition(gpu) is add_streams
            gpu.dtype = torch.bfloat16
            assert functional.stream_addition(gpu) is None
