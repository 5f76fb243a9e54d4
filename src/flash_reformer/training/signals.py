"""Being told to leave: SIGTERM lets a run finish its step, save and go."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from flash_reformer.training.ranks import is_joined


class Terminated(Exception):
    """A run was told to stop by SIGTERM, and did: what it had is in its last checkpoint."""


class StopRequest:
    """Whether this process, or any other rank, was told to stop."""

    def __init__(self) -> None:
        self.asked = False
        self._group: dist.ProcessGroup | None = None

    def agreed(self) -> bool:
        """Say whether any rank was asked; every rank must call this at the same point of its run."""
        if not is_joined() or dist.get_world_size() == 1:
            return self.asked
        if self._group is None:
            # Ranks on GPUs talk by gloo here: nobody's device is waited for.
            self._group = dist.new_group(backend="gloo")
        asked = torch.tensor(int(self.asked))
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        return bool(asked)


@contextmanager
def stop_on_sigterm() -> Iterator[StopRequest]:
    """Note a first SIGTERM; a second one does what it did before, which is to end the process at once.

    What was set is set again. Outside of the main thread, and where SIGTERM is ignored, nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGTERM"):
        yield request
        return
    before = signal.getsignal(signal.SIGTERM)
    if before in (signal.SIG_IGN, None):
        yield request
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, note)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
