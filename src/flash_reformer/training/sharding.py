"""FSDP by the Trainer: what is a unit, and what accelerate must be told."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy

from flash_reformer.training.settings import TrainingSettings

# What the Trainer calls the folder of a checkpoint that holds the shards of the weights.
SHARDS = "pytorch_model_fsdp_0"


def fsdp_config(settings: TrainingSettings) -> dict[str, Any] | None:
    """Return how the Trainer is to shard: a reversible layer is a unit, and checkpoints hold shards."""
    if settings.parallel != "fsdp":
        return None
    return {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["ReformerLayer"],
        "cpu_offload": settings.cpu_offload,
        "state_dict_type": "SHARDED_STATE_DICT",
    }


def use_fsdp(accelerator: Accelerator, plugin_args: Mapping[str, Any]) -> None:
    """Switch FSDP on where accelerate does not: it takes the plugin on GPUs and their like, and on CPUs drops it."""
    plugin = FullyShardedDataParallelPlugin(**plugin_args)
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    if plugin_args.get("cpu_offload"):
        # There is no device to copy to from pinned memory.
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)
    accelerator.state.fsdp_plugin = plugin
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP


def leave_head_to_root(accelerator: Accelerator) -> None:
    """Let the head of a language model be of the root's unit, which is whole from a forward to its backward.

    accelerate makes a unit of every output layer. The loss runs the head's parameters in pieces, and again in the
    backward, outside of any module's forward: a unit of its own would not be gathered for it.
    """
    prepare: Any = accelerator.prepare

    def prepared(*parts: Any, **options: Any) -> Any:
        with _without_output_layers(parts):
            return prepare(*parts, **options)

    accelerator.prepare = prepared


@contextmanager
def views_between_layers() -> Iterator[None]:
    """Hold back FSDP's warning that a layer returns views: nobody writes over what passes between layers with hooks."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
        yield


@contextmanager
def _without_output_layers(parts: tuple[Any, ...]) -> Iterator[None]:
    models: list[Any] = [part for part in parts if isinstance(part, nn.Module)]
    for model in models:
        model.get_output_embeddings = lambda: None
    try:
        yield
    finally:
        for model in models:
            del model.get_output_embeddings


def has_shards(checkpoint: str) -> bool:
    """Say whether a checkpoint holds shards in place of a model."""
    return (Path(checkpoint) / SHARDS).is_dir()
