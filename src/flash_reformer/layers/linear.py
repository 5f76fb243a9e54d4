"""Linear layers and dropout as ``torch.nn`` has them, done by the backend of the model that they are in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flash_reformer import functional
from flash_reformer.seeds import draw_seed, is_capturing

#: Below so many numbers a mask of our own costs more than it saves.
_SMALL = 2**14


class Linear(nn.Linear):
    """``nn.Linear``, faster on a CPU."""

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``."""
        return functional.linear(x, self.weight, self.bias, backend=self.backend)


class Dropout(nn.Dropout):
    """``nn.Dropout`` whose mask, where there are kernels, is a function of one number from the default generator."""

    backend = "auto"

    def forward(self, x: Tensor) -> Tensor:
        """Zero entries with probability ``p`` in training and scale up the others."""
        if not self.training or self.p == 0.0:
            return x
        # On a GPU a mask of our own is what lets graphs be captured, so it is taken whatever the size.
        pays = x.device.type == "cuda" or (x.device.type == "cpu" and x.numel() >= _SMALL)
        if self.inplace or not pays or not x.is_floating_point():
            return super().forward(x)
        return functional.dropout(x, self.p, draw_seed(x.device), backend=self.backend)


def check_capture(root: nn.Module, device: torch.device) -> None:
    """Raise ``RuntimeError`` where a graph is captured of a layer that will be run again and draws by other means."""
    if not is_capturing(device):
        return
    for name, module in root.named_modules():
        random = isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0.0
        if random and not (isinstance(module, Dropout) and not module.inplace):
            raise RuntimeError(
                f"a CUDA graph cannot capture the reversible training of {name} ({type(module).__name__}): the state "
                "of its generator cannot be kept for the recomputation; set its p to 0, or use reversible=False"
            )


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
