"""Sequence parallelism for a model that is there already: the ranks of a group share every sequence."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from flash_reformer.distributed.collectives import mean
from flash_reformer.distributed.exchange import SequenceExchange
from flash_reformer.layers.exchange import BY_ITSELF, Ranks, SharesSequences

#: Any odd number: what is at another place counts otherwise.
_ODD = 0x9E3779B1


class SequenceRanks(Ranks):
    """The ranks of a group. Copies of a model share it; a model that is unpickled is by itself."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._hooks: dict[nn.Parameter, Any] = {}

    def __deepcopy__(self, memo: Any) -> SequenceRanks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _by_itself, ()

    def exchange(self, length: int) -> SequenceExchange:
        return SequenceExchange(self.group, length)

    def check_same(self, given: Tensor, **facts: int) -> None:
        # On a GPU the comparison would have to be waited for.
        if given.device.type != "cpu" or torch.compiler.is_compiling():
            return
        facts = {"rows": given.shape[0], "tokens": given.shape[1], **facts, "gradients": torch.is_grad_enabled()}
        facts["content"] = _checksum(given)
        mine_X = torch.tensor(list(facts.values()), dtype=torch.int64)
        # The largest number and the smallest, which is the largest among the negative ones (~x is -x-1).
        both_2X = torch.stack([mine_X, ~mine_X])
        dist.all_reduce(both_2X, op=dist.ReduceOp.MAX, group=self.group)
        if torch.equal(both_2X[0], ~both_2X[1]):
            return
        different = [name for name, high, low in zip(facts, both_2X[0], ~both_2X[1], strict=True) if high != low]
        raise ValueError(
            "ranks that share sequences must pass the same batch, and ask the same of it; they differ in "
            f"{', '.join(different)}"
        )

    def watch(self, module: nn.Module, *_: object) -> None:
        """Let the gradients of a module's parameters be averaged over ranks as they arrive, before they are added."""
        if not torch.is_grad_enabled():
            return
        # What ``fully_shard`` gives to the modules that it is called on.
        if any(hasattr(each, "_get_fsdp_state") for each in module.modules()):
            raise RuntimeError(
                "the model is sharded (fully_shard), so its gradients cannot be averaged here: shard over all ranks, "
                "which averages over them, and call parallelize_sequence(..., reduce_gradients=False)"
            )
        for parameter in module.parameters():
            if parameter.requires_grad and parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_hook(functools.partial(mean, group=self.group))

    def release(self, module: nn.Module) -> None:
        """Undo what :meth:`watch` has done to a module."""
        for parameter in module.parameters():
            if parameter in self._hooks:
                self._hooks.pop(parameter).remove()


def _by_itself() -> Ranks:
    return BY_ITSELF


def _checksum(x: Tensor) -> int:
    if x.is_floating_point():
        return int(x.detach().sum(dtype=torch.float64).view(torch.int64))
    flat = x.flatten().long()
    return int((flat * torch.arange(1, 2 * len(flat), 2) * _ODD).sum())


def parallelize_sequence(
    model: nn.Module, ranks: DeviceMesh | ProcessGroup | None = None, *, reduce_gradients: bool = True
) -> None:
    """Spread the positions of every sequence over the ranks of a group, in place. A collective call.

    Each of P ranks holds ``T / P`` positions of a sequence; for attention ranks trade positions for heads, so each
    attends with ``num_attention_heads / P`` heads over the whole sequence. Activations, buckets and gradients of
    activations take 1/P of the memory; weights, their gradients and the optimizer's state are whole on every rank.

    **Every rank passes the same whole batch**, and gets what one process would get, to rounding: the loss, logits and
    hidden states at the caller's length. Gathering logits and hidden states takes memory for the whole sequence on
    every rank, so long sequences are trained with ``return_logits=False``. With dropout, ranks draw masks other than
    one process would, and none alike for different positions. Seeds are those that the group's first rank draws.

    After a backward, every rank has the gradients of the mean of the ranks' losses, which is the loss that each has.

    Args:
        model: a Reformer, a model with a head, or a module with one in it, the same on every rank. Weights become
            those of the group's first rank. Call it before wrapping the model for data parallelism.
        ranks: a device mesh of one dimension, ``mesh["sequence"]`` of a larger one, or a process group; all ranks by
            default.
        reduce_gradients: average gradients over the group, in hooks of parameters. False leaves that to an engine
            that averages over *all* ranks, those of the group included: ``DistributedDataParallel`` or FSDP2 over the
            whole world. DDP over ``mesh["data"]`` alone needs the hooks.

    Raises:
        ValueError: if ranks do not divide the heads, models differ between ranks, this rank is not among ``ranks``, the
            mesh has several dimensions, or the model is spread over ranks already.
        TypeError: for a module without a Reformer, and for what is no group.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    if not isinstance(reduce_gradients, bool):
        raise TypeError(f"reduce_gradients must be True or False; got {reduce_gradients!r}")
    group = _group_of(ranks)
    reformers = _reformers(model)
    if not reformers:
        raise TypeError(f"model must be a Reformer, or contain one; got {type(model).__name__}")
    for reformer in reformers:
        heads = reformer.config.num_attention_heads
        if reformer.ranks is not BY_ITSELF:
            raise ValueError("model is spread over ranks already: call unparallelize_sequence first")
        if heads % group.size():
            raise ValueError(f"num_attention_heads must be divisible by the {group.size()} ranks; got {heads}")
    _make_equal(model, group)
    shared = SequenceRanks(group)
    for reformer in reformers:
        reformer.ranks = shared
    if reduce_gradients:
        # At every forward, since parameters may be added, replaced or unfrozen.
        model.register_forward_pre_hook(shared.watch)


def unparallelize_sequence(model: nn.Module) -> None:
    """Undo :func:`parallelize_sequence`: the model is one process's again. Not a collective call.

    Raises:
        ValueError: if it is not spread over ranks.
    """
    shared = {reformer.ranks for reformer in _reformers(model)} - {BY_ITSELF}
    if not shared:
        raise ValueError("model is not spread over ranks")
    for reformer in _reformers(model):
        reformer.ranks = BY_ITSELF
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) in shared:
                del module._forward_pre_hooks[key]
    for each in shared:
        each.release(model)


def _reformers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, SharesSequences)]


def _group_of(ranks: object) -> ProcessGroup:
    if ranks is not None and not isinstance(ranks, DeviceMesh | ProcessGroup):
        raise TypeError(f"ranks must be a DeviceMesh, a ProcessGroup or None; got {type(ranks).__name__}")
    if not dist.is_initialized():
        raise ValueError("ranks cannot be found: call torch.distributed.init_process_group first, or run torchrun")
    if isinstance(ranks, DeviceMesh):
        if ranks.ndim != 1:
            raise ValueError(
                f"ranks must be a mesh of one dimension; got {ranks.ndim} ({ranks.mesh_dim_names}): "
                "pick one, as in mesh['sequence']"
            )
        ranks = ranks.get_group()
    group = dist.group.WORLD if ranks is None else ranks
    if not isinstance(group, ProcessGroup) or dist.get_rank(group) < 0:
        raise ValueError(f"ranks must contain this rank, {dist.get_rank()}; they do not")
    return group


@torch.no_grad()
def _make_equal(model: nn.Module, group: ProcessGroup) -> None:
    """Give all ranks the weights of the first; raise ``ValueError`` where models differ in more than their numbers."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    facts = [(name, tuple(x.shape), str(x.dtype), x.requires_grad) for name, x in tensors.items()]
    of_ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(of_ranks, facts, group=group)
    for rank, others in enumerate(of_ranks):
        if others != of_ranks[0]:
            first = next((a for a, b in zip(others, of_ranks[0], strict=False) if a != b), "the number of weights")
            raise ValueError(f"model differs between ranks 0 and {rank} of the group, first in {first}")
    for x in tensors.values():
        if not hasattr(x, "device_mesh") and x.device.type != "meta":
            dist.broadcast(x.detach(), group=group, group_src=0)
