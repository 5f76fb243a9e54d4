"""Linear layers and dropout as ``torch.nn`` has them, done by the backend of the model that they are in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_reformer import functional

#: Below so many numbers a mask of our own costs more than it saves.
_SMALL = 2**14


class Linear(nn.Linear):
    """``nn.Linear``, faster on a CPU."""

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return functional.linear(x, self.weight, self.bias, backend=self.backend)


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose mask, on a CPU, is a function of one number drawn from the default generator."""

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Zero entries with probability ``p`` in training and scale up the others."""
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu" or x.numel() < _SMALL or self.inplace or not x.is_floating_point():
            return super().forward(x)
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu")
        return functional.dropout(x, self.p, seed, backend=self.backend)


def set_backend(root: nn.Module, backend: str) -> None:
    """Choose the backend of all linear layers and dropouts in ``root``.

    For ``"reference"`` linear layers are exactly ``nn.Linear``, which is what ``torch.ao.quantization`` looks for.
    """
    for module in root.modules():
        if isinstance(module, (Linear, Dropout)):
            module.backend = backend
        if type(module) is Linear and backend == "reference":
            module.__class__ = nn.Linear  # type: ignore[assignment]
        elif type(module) is nn.Linear and backend != "reference":
            module.__class__ = Linear
            module.backend = backend  # type: ignore[assignment]
