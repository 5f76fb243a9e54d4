"""A linear map as a convolution with windows of one. Letters: X any leading shape, N rows, I inputs, O outputs.

The same product, but done by oneDNN, which uses all of AVX-512 on every processor that has it; the BLAS behind fp32
matrix products uses half of it on AMD's (in trials 490 against 205 GFLOP/s on two cores). Where results are large, rows
go in pieces, small enough for the heap to give the same memory again and again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_reformer import buffers

#: Numbers of the wider side of one piece.
_PIECE = 2**21
#: Bytes of a side beyond which glibc never gives the same memory twice.
_LARGE = 2**25


def _image(x_NI: Tensor) -> Tensor:
    """Return rows as one image, a pixel per row, channels last: exactly their memory, seen otherwise."""
    return x_NI.view(1, 1, *x_NI.shape).permute(0, 3, 1, 2)


def _rows_of(image_1O1N: Tensor) -> Tensor:
    return image_1O1N.permute(0, 2, 3, 1).flatten(0, 2)


def _rows_per_piece(weight_OI: Tensor) -> int:
    return max(1, _PIECE // max(weight_OI.shape))


@torch.library.custom_op("flash_reformer::cpu_linear", mutates_args=())
def _linear(x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    O, I = weight_OI.shape  # noqa: E741
    x_NI, window_OI11 = x_XI.reshape(-1, I), weight_OI.reshape(O, I, 1, 1)
    out_NO = buffers.empty((x_NI.shape[0], O), x_NI.dtype)
    size = _rows_per_piece(weight_OI)
    for piece_NI, out_piece_NO in zip(x_NI.split(size), out_NO.split(size), strict=True):
        out_piece_NO.copy_(_rows_of(F.conv2d(_image(piece_NI), window_OI11, bias_O)))
    return out_NO.view(*x_XI.shape[:-1], O)


@_linear.register_fake
def _(x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return x_XI.new_empty((*x_XI.shape[:-1], weight_OI.shape[0]))


@torch.library.custom_op("flash_reformer::cpu_linear_backward", mutates_args=())
def _linear_backward(
    d_out_XO: Tensor, x_XI: Tensor, weight_OI: Tensor, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    O, I = weight_OI.shape  # noqa: E741
    x_NI, d_out_NO = x_XI.reshape(-1, I), d_out_XO.reshape(-1, O)
    window_OI11 = weight_OI.reshape(O, I, 1, 1)
    # What is not asked for has no elements.
    d_x_NI = buffers.empty((x_NI.shape[0] if for_x else 0, I), x_NI.dtype)
    d_weight_OI = torch.zeros((O, I) if for_weight else (0,), dtype=weight_OI.dtype)
    d_bias_O = torch.zeros(O if for_bias else 0, dtype=weight_OI.dtype)
    size = _rows_per_piece(weight_OI)
    for start in range(0, x_NI.shape[0], size):
        piece_NI, d_piece_NO = x_NI[start : start + size], d_out_NO[start : start + size]
        d_x, d_window, _ = torch.ops.aten.convolution_backward(
            _image(d_piece_NO), _image(piece_NI), window_OI11, None, *_PLAIN, [for_x, for_weight, False]
        )
        if for_x:
            d_x_NI[start : start + size] = _rows_of(d_x)
        if for_weight:
            d_weight_OI += d_window.reshape(O, I)
        if for_bias:
            d_bias_O += d_piece_NO.sum(0)
    return d_x_NI.view(x_XI.shape) if for_x else d_x_NI, d_weight_OI, d_bias_O


#: Stride, padding, dilation, transposed, output padding, groups.
_PLAIN = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)


@_linear_backward.register_fake
def _(
    d_out_XO: Tensor, x_XI: Tensor, weight_OI: Tensor, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    O, I = weight_OI.shape  # noqa: E741
    return (
        x_XI.new_empty(x_XI.shape if for_x else (0, I)),
        weight_OI.new_empty((O, I) if for_weight else (0,)),
        weight_OI.new_empty(O if for_bias else 0),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_XI, weight_OI, _ = inputs
    ctx.save_for_backward(x_XI, weight_OI)


def _gradients(ctx: Any, d_out_XO: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad
    gradients = _linear_backward(d_out_XO, *ctx.saved_tensors, *wanted)
    return tuple(gradient if want else None for gradient, want in zip(gradients, wanted, strict=True))


_linear.register_autograd(_gradients, setup_context=_remember)


def linear(x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b``, ``[X, O]``."""
    O, I = weight_OI.shape  # noqa: E741
    rows = x_XI.numel() // I
    if rows * max(I, O) * x_XI.element_size() > _LARGE:
        return _linear(x_XI, weight_OI, bias_O)
    out_1O1N = F.conv2d(_image(x_XI.reshape(rows, I)), weight_OI.view(O, I, 1, 1), bias_O)
    return _rows_of(out_1O1N).view(*x_XI.shape[:-1], O)
