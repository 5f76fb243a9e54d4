"""What the four tasks' models share: how a loss is averaged, and what an output is made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.utils.generic import ModelOutput

from flash_reformer.layers.exchange import ALONE, Exchange
from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.models.outputs import ReformerModelOutput


def mean_loss(total: Tensor, count: Tensor | int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """Divide a summed loss; a batch in which nothing counts has loss 0."""
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / (count.clamp(min=1) if isinstance(count, Tensor) else count)


def exchange_of(model: Any, outputs: ReformerModelOutput, given: Tensor | None, num_hashes: int | None) -> Exchange:
    """Return where the positions are of what ``model`` has just made of a batch, asked to ``keep_shards``."""
    if outputs.past_buckets_states is not None:
        return ALONE
    assert given is not None, "the model has checked that something is given"
    return model.ranks.exchange(model.padded_length(given.shape[1], num_hashes))


def put_together(x_BLX: Tensor, exchange: Exchange, given: Tensor | None) -> Tensor:
    """Return all positions of a batch, ``[B, T, ...]``, of what ranks have made of theirs."""
    assert given is not None, "the model has checked that something is given"
    return exchange.whole(x_BLX)[:, : given.shape[1]] if exchange.shares else x_BLX


def finish(output: ModelOutput, return_dict: bool | None, config: ReformerConfig) -> Any:
    """Return an output as the caller wants it: with names, or as a tuple."""
    return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def extras(outputs: ReformerModelOutput) -> dict[str, Any]:
    """Return what every output passes on from the stack."""
    return {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
