"""Processes of a run that share sequences: neighbours, as many as ``sequence_parallel`` says, get the same rows."""

from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import gather, recursively_apply
from torch import nn

from flash_reformer.training import ranks
from flash_reformer.training.settings import TrainingSettings


def check_sharing(settings: TrainingSettings, heads: int) -> None:
    """Refuse a number of ranks to share a sequence that the run's processes, or the model's heads, do not allow."""
    shared = settings.sequence_parallel
    processes = ranks.world_size()
    if processes % shared:
        raise ValueError(
            f"sequence_parallel must divide the number of processes, {processes}; got {shared}: start as many with "
            "torchrun --nproc-per-node"
        )
    if heads % shared:
        raise ValueError(f"sequence_parallel must divide the model's num_attention_heads, {heads}; got {shared}")


def replicas(settings: TrainingSettings) -> int:
    """Return how many batches the ranks of a run read at a time: one each, or one for those that share sequences."""
    return ranks.world_size() // settings.sequence_parallel


def share_sequences(model: nn.Module, shared: int) -> Any:
    """Spread a model's sequences over every ``shared`` processes; return this one's group. A collective call of all.

    The Trainer's engines average gradients over all processes, so nothing else has to.
    """
    if shared == 1:
        return None
    from torch.distributed.device_mesh import init_device_mesh

    from flash_reformer.distributed import parallelize_sequence

    processes = torch.distributed.get_world_size()
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (processes // shared, shared), mesh_dim_names=("data", "sequence"))
    parallelize_sequence(model, mesh["sequence"], reduce_gradients=False)
    return mesh["sequence"].get_group()


def as_drawn_by_first(inputs: dict[str, Any], group: Any) -> dict[str, Any]:
    """Return what the first process of a group has drawn of rows that all of it share. A collective call of them."""
    if group is None:
        return inputs
    drawn = {name: x.contiguous() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    for x in drawn.values():
        if isinstance(x, torch.Tensor):
            torch.distributed.broadcast(x, group=group, group_src=0)
    return drawn


def stop_sharing(model: nn.Module, shared: int) -> None:
    """Let every process have the whole model, after training."""
    if shared > 1:
        from flash_reformer.distributed import unparallelize_sequence

        unparallelize_sequence(model)


def share_rows(loader: Any, shared: int) -> Any:
    """Give processes that share sequences the same rows of a loader that ``accelerate`` has prepared."""
    if shared == 1:
        return loader
    rows = getattr(loader, "batch_sampler", None)
    if not isinstance(rows, BatchSamplerShard):
        raise ValueError("sequence_parallel needs data whose rows have numbers; this is a stream")
    rows.num_processes //= shared
    rows.process_index //= shared
    return loader


def gather_rows(data: Any, shared: int, gradient_state: Any) -> Any:
    """Gather results of an evaluation batch from all processes, those of shared rows once, and of no row twice."""

    def once(x: torch.Tensor) -> torch.Tensor:
        # One part of each process, in order; those of one row are neighbours.
        parts = x.unflatten(0, (-1, shared, x.shape[0] // torch.distributed.get_world_size()))
        x = parts[:, 0].flatten(0, 1)
        # The last batch is filled up so that every process has one.
        cut = gradient_state.end_of_dataloader and gradient_state.remainder > 0
        return x[: gradient_state.remainder] if cut else x

    return recursively_apply(once, gather(data))
