"""Memory of tensors that outlive a block, apart from the heap and used again by the next block (CPU).

What a block leaves behind (streams, their gradients) would lie among its large temporaries on the heap. The holes
between do not quite fit the next block's temporaries, and the heap grows by some streams in every layer though live
memory does not. Kept apart, the heap is empty again after every block, and no page is fetched twice.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import torch
from torch import Tensor

#: Smaller tensors do not pay for the care.
_SMALL = 2**20


class _Pool(threading.local):
    """This thread's memory that no tensor holds at the moment."""

    def __init__(self) -> None:
        self.free: list[mmap.mmap] = []


_pool = _Pool()


def lasting_like(x: Tensor) -> Tensor:
    """Return an uninitialised, contiguous tensor of the shape, dtype and device of ``x``."""
    size = x.numel() * x.element_size()
    if x.device.type != "cpu" or type(x) is not Tensor or size < _SMALL:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    free = _pool.free
    memory = next((memory for memory in free if len(memory) == size), None)
    if memory is None:
        memory = mmap.mmap(-1, size)
    else:
        free.remove(memory)
    # The tensor's storage holds the view; when both are gone, the memory is free again.
    view = memoryview(memory)
    weakref.finalize(view, free.append, memory).atexit = False
    return torch.frombuffer(view, dtype=x.dtype).view(x.shape)


def release() -> None:
    """Give this thread's free memory back to the system."""
    _pool.free.clear()
