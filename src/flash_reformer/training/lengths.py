"""Position tables that grow with the sequences of a run, and where a stream of blocks stands when it is saved."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from flash_reformer.training.settings import TextSettings
from flash_reformer.training.stream_blocks import BlockStream


def fitting_shape(shape: Sequence[int], length: int) -> tuple[int, ...]:
    """Return ``axial_pos_shape`` with a first axis that just holds ``length`` positions.

    >>> fitting_shape((256, 256), 4096)
    (16, 256)
    """
    return (math.ceil(length / math.prod(shape[1:])), *shape[1:])


def grow_positions(model: Any, length: int, seed: int, optimizer: Any | None = None) -> None:
    """Give a model positions for ``length`` tokens where it has fewer; old positions stay bit for bit.

    New rows are drawn like those of a new model, from ``seed`` and ``length`` alone: torch's default generators are
    left as they were. An optimizer goes on with the old rows' state, and with zeros for the new ones.

    Args:
        model: any Reformer of this package, unwrapped.
        length: positions that it must have at least.
        seed: of the new rows.
        optimizer: what trains the model.
    """
    config = model.config
    if config.max_length_of_positions >= length:
        return
    size = fitting_shape(config.axial_pos_shape, length) if config.axial_pos_embds else length
    module = model.get_position_embeddings()
    old = list(module.parameters())
    device = old[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed + length) % 2**63)
        model.resize_position_embeddings(size)
    if optimizer is not None:
        for before, after in zip(old, module.parameters(), strict=True):
            if before is not after:
                _hand_over(optimizer, before, after)


def _hand_over(optimizer: Any, before: nn.Parameter, after: nn.Parameter) -> None:
    for group in optimizer.param_groups:
        group["params"] = [after if each is before else each for each in group["params"]]
    kept = optimizer.state.pop(before, None)
    if kept is not None:
        optimizer.state[after] = {name: _grown(value, before, after) for name, value in kept.items()}


def _grown(value: Any, before: Tensor, after: Tensor) -> Any:
    """Return a moment ``[*before.shape]`` with zeros for what is new in ``[*after.shape]``; other values stay."""
    if not isinstance(value, Tensor) or value.shape != before.shape:
        return value
    grown = value.new_zeros(after.shape)
    grown[tuple(slice(size) for size in value.shape)] = value
    return grown


class GrowingPositions(TrainerCallback):
    """Grows the position tables before the first step whose sequences outgrow them."""

    def __init__(self, settings: TextSettings, tokenizer: Any) -> None:
        self.settings = settings
        self.tokenizer = tokenizer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make room for the step's sequences."""
        model = kwargs["model"]
        grow_positions(
            model, self.settings.length_at(state.global_step), self.settings.seed, kwargs["optimizer"].optimizer
        )
        self.tokenizer.model_max_length = model.config.max_length_of_positions


class StreamPosition(TrainerCallback, ExportableState):
    """Writes into every checkpoint where the stream of blocks stands."""

    def __init__(self, stream: BlockStream) -> None:
        self.stream = stream
        self._step = 0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step, and say how many passes over the data are done."""
        self._step = state.global_step
        state.epoch = float(self.stream.epoch)

    def state(self) -> dict[str, Any]:
        """Return what goes into ``trainer_state.json``."""
        return {"args": {}, "attributes": {"step": self._step, "position": self.stream.position(self._step)}}

    def restore(self, state: TrainerState) -> None:
        """Let the stream go on from where it stood in a checkpoint."""
        saved: Any = state.stateful_callbacks
        found = (saved or {}).get(type(self).__name__, {}).get("attributes", {})
        if found.get("step") != state.global_step:
            raise ValueError("the checkpoint does not say where its stream of text stands: it is damaged")
        self.stream.start_at(state.global_step, found["position"])
        self._step = state.global_step
