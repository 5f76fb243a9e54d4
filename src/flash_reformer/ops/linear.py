"""A linear map. Letters: X any leading shape, I inputs, O outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_XI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``x W^T + b``, ``[X, O]``."""
    if torch.compiler.is_exporting() and x_XI.dim() == 3:
        # torch merges the leading dimensions, which an exporter cannot prove to be possible for every length.
        weight_BIO = weight_OI.mT.expand(x_XI.shape[0], -1, -1)
        return torch.bmm(x_XI, weight_BIO) if bias_O is None else torch.baddbmm(bias_O, x_XI, weight_BIO)
    return F.linear(x_XI, weight_OI, bias_O)
