"""What the four tasks' models share: how a loss is averaged, and what an output is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.outputs import ReformerModelOutput


def mean_loss(total: Tensor, count: Tensor | int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Divide a summed loss; a batch in which nothing counts has loss 0."""
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else count)


def finish(output: ModelOutput, return_dict: bool | None, config: ReformerConfig) -> Any:
    """Return an output as the caller wants it: with names, or as a tuple."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def extras(outputs: ReformerModelOutput) -> dict[str, Any]:
    """Return what every output passes on from the stack."""
    return {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
