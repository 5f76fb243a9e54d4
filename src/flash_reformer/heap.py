"""The C heap between reversible blocks: keeps a process as flat in depth as its tensors are.

What a block leaves behind (streams, gradients) lies among its large temporaries, so the holes between do not quite fit
the next block's, and the heap grows by some streams in every layer though live memory does not. Giving free pages back
costs page faults later, so it is done only once there is clearly more than one block's temporaries.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from typing import Any

from torch import Tensor

#: How many tensors' worth of free heap is left alone; a block's own temporaries come to about half of it.
_FREE_TENSORS = 32
#: Below so many bytes a tensor's holes are not worth the page faults.
_SMALL = 2**20
#: Only each so-manieth block looks: page faults after every block would cost a third of a small model's time.
_EVERY = 4
_calls = itertools.count()


class _HeapFacts(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "keepcost")
    ]


@functools.cache
def _glibc() -> Any:
    """Return glibc, or None where the process runs on another C library (or one older than 2.33)."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallinfo2.restype = _HeapFacts
    except (OSError, TypeError, AttributeError):
        return None
    return libc if hasattr(libc, "malloc_trim") else None


def tidy_heap(x: Tensor) -> None:
    """Give free memory back to the system once it is worth many tensors like ``x`` (CPU, glibc; else nothing)."""
    size = x.numel() * x.element_size()
    if x.device.type != "cpu" or size < _SMALL or next(_calls) % _EVERY or (libc := _glibc()) is None:
        return
    if libc.mallinfo2().free > _FREE_TENSORS * size:
        libc.malloc_trim(0)
