"""The processes of a run: which one this is, and how they act as one.

A launcher (`torchrun`, `accelerate launch`, Ray) starts a process per device and numbers them in the environment.
Rank 0 is the main one: it alone writes files and speaks.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState

Result = TypeVar("Result")

# Ways to shard a model that accelerate's own configuration may ask for, unknown to our settings.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of its own",
}

# How launchers say how many processes there are; only torch's own kind is understood here.
_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


class ElsewhereError(RuntimeError):
    """Another rank has failed, and says why; this one only stops with it."""


def is_joined() -> bool:
    """Say whether the ranks of this run can talk to each other by now."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if is_joined() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes in the run; launchers say it before any of them has joined the others."""
    return dist.get_world_size() if is_joined() else int(os.environ.get("WORLD_SIZE", "1"))


def is_launched() -> bool:
    """Say whether a launcher started this process as one of a run's ranks, were it the only one."""
    return is_joined() or "LOCAL_RANK" in os.environ


def is_main() -> bool:
    """Say whether this is the process that writes files and speaks."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank has come here."""
    if is_joined():
        dist.barrier()


@contextmanager
def joined(on_gpu: bool) -> Iterator[None]:
    """Let the ranks of this run talk to each other: by nccl on GPUs, else by gloo.

    Whoever has already set up ``torch.distributed`` keeps it as it is. Raises ``ValueError`` where a launcher has set
    up something that cannot work.
    """
    if is_joined() or not is_launched():
        yield
        return
    place = int(os.environ["LOCAL_RANK"])
    if on_gpu and place >= torch.cuda.device_count():
        raise ValueError(
            f"rank {rank()} is number {place} on its machine, which has {torch.cuda.device_count()} GPU(s): launch as "
            "many processes as there are GPUs, or train with --cpu"
        )
    # As the Trainer would do it, and will find it done. Shards that are kept in main memory meet there, by gloo.
    PartialState(cpu=not on_gpu, backend="cuda:nccl,cpu:gloo" if on_gpu else "gloo", **_meeting_place())
    yield
    # Only after success: a rank that failed must not wait here for the others.
    dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def _meeting_place() -> dict[str, Any]:
    """Return where ranks meet that torchrun has started again: not where the dead ones have left their addresses.

    torchrun may keep one store for all lives of its ranks, and then a rank that is quick calls the dead. Agents of
    several machines need not count lives alike, so there the store stays as it is.
    """
    life, machines = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("GROUP_WORLD_SIZE", "1")
    if life == "0" or machines != "1" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    # Lazily: builds of torch without distributed lack them. torch does not say that they are for everybody, but they
    # are documented so.
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return {"store": PrefixStore(f"life-{life}", store), "rank": rank(), "world_size": world_size()}


def check_launcher() -> None:
    """Raise ``ValueError`` for a launcher that numbers no ranks, or asks for what the settings know nothing of."""
    environment = os.environ
    if not is_launched():
        sizes = [name for name in _SIZES if int(environment.get(name) or "1") > 1]
        if sizes:
            raise ValueError(f"{sizes[0]} is {environment[sizes[0]]}, but LOCAL_RANK is not set: start with torchrun")
        if "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment:
            raise ValueError(
                "accelerate launch was asked for several processes and started one, as it does on CPUs without MPI: "
                "start with torchrun, or give accelerate launch --multi_gpu (which starts them on CPUs, too)"
            )
    for name, engine in _ENGINES.items():
        if os.environ.get(name, "false").lower() == "true":
            raise ValueError(
                f"accelerate's configuration asks for {engine} ({name} is set): configure accelerate for plain "
                "processes (--multi_gpu) and choose with --parallel ddp or --parallel fsdp"
            )


@contextmanager
def own_environment() -> Iterator[None]:
    """Take back what accelerate writes into the environment, from which the next run would read it."""
    before = {name: os.environ.get(name) for name in _ENGINES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def together() -> Iterator[None]:
    """Do something on every rank; if it fails on one, it fails on all.

    The first rank that failed raises its own error, every other one :class:`ElsewhereError`.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        if not is_joined():
            raise
        own = error
    if not is_joined():
        return
    said: list[str | None] = [None] * world_size()
    dist.all_gather_object(said, None if own is None else f"{type(own).__name__}: {own}")
    first = next((number for number, line in enumerate(said) if line is not None), None)
    if first is None:
        return
    if first == rank() and own is not None:
        raise own
    raise ElsewhereError(f"rank {first} has failed: {said[first]}") from own


def on_main(work: Callable[[], Result]) -> Result:
    """Do something on rank 0 while the others wait, and return its result (which must be picklable) on all."""
    result: list[Any] = [None]
    with together():
        if is_main():
            result[0] = work()
    return from_main(result[0])


def from_main(value: Result) -> Result:
    """Return rank 0's value on every rank."""
    if not is_joined():
        return value
    held: list[Any] = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
