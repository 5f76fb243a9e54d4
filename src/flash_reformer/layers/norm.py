"""Layer normalisation between an fp32 residual stream and layers of any dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` that takes a wider input than its weights and returns their dtype.

    Residual streams stay fp32 in half-precision models; the norm is where a branch enters its compute dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., E]`` over the last dimension, in the wider dtype of input and weights."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)
