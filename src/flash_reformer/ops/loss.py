"""Losses, computed in at least fp32. Letters: V classes, X any leading shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: The label that takes no part in a loss.
IGNORE_INDEX = -100


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy_sum(logits_XV: Tensor, labels_X: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return the summed cross-entropy (nats) of labels that are not ``ignore_index``.

    >>> cross_entropy_sum(torch.zeros(3, 2), torch.tensor([0, 1, -100])).item()  # 2 ln 2
    1.3862943649291992
    """
    return F.cross_entropy(
        _wide(logits_XV).flatten(0, -2), labels_X.flatten().long(), ignore_index=ignore_index, reduction="sum"
    )


def binary_cross_entropy_sum(logits_X: Tensor, targets_X: Tensor) -> Tensor:
    """Return the summed binary cross-entropy (nats) of independent labels in ``[0, 1]``."""
    return F.binary_cross_entropy_with_logits(_wide(logits_X), targets_X.to(_wide(logits_X).dtype), reduction="sum")


def squared_error_sum(predictions_X: Tensor, targets_X: Tensor) -> Tensor:
    """Return the summed squared error."""
    return F.mse_loss(_wide(predictions_X), targets_X.to(_wide(predictions_X).dtype), reduction="sum")
