"""Starting ranks as processes, cheaply: imports are done once, by a server that the ranks are forked from."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

#: What takes seconds to import. None of it starts a thread, which a fork would lose.
IMPORTED = [
    "flash_reformer.distributed",
    "flash_reformer.training.recipes",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "transformers.trainer",
]


def start_ranks(work: Callable[..., None], ranks: int, *args: Any) -> None:
    """Run ``work(rank, *args)`` in so many processes and wait; what one raises is raised here."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(IMPORTED)
    mp.start_processes(work, args=args, nprocs=ranks, start_method=method)
