"""Memory of large tensors on a CPU, apart from the heap: of huge pages, and used again.

Fetching fresh memory page by page costs more than most of what is done with it: 3 ms and more for 16 MiB, where a copy
takes 1. So memory of results is kept, up to a limit. And what a block leaves behind (streams, their gradients) would
lie among its large temporaries on the heap: the holes between do not quite fit the next block's temporaries, and the
heap grows by some streams in every layer though live memory does not.
"""

from __future__ import annotations

import functools
import math
import mmap
import threading
import weakref
from pathlib import Path

import torch
from torch import Tensor

#: Smaller tensors do not pay for the care.
_SMALL = 2**20
_HUGE_PAGE = 2**21


@functools.cache
def _has_huge_pages() -> bool:
    """Whether this system gives huge pages to who asks (Linux, unless it is set never to)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        setting = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text("ascii")
    except OSError:
        return False
    return "[never]" not in setting


def _map(size: int) -> tuple[mmap.mmap, int]:
    """Return fresh memory of zeros and at which offset it begins."""
    if not _has_huge_pages():
        return mmap.mmap(-1, size), 0
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    # Only a huge page that begins where it should is one; what lies before is never touched, so it does not exist.
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return memory, -address % _HUGE_PAGE


class _Pool(threading.local):
    """A thread's memory that no tensor holds at the moment, to be used again for tensors of the same size."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._free: list[tuple[int, mmap.mmap, int]] = []

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        place = next((i for i, (free_size, _, _) in enumerate(self._free) if free_size == size), None)
        entry = (size, *_map(size)) if place is None else self._free.pop(place)
        _, memory, offset = entry
        # The tensor's storage holds the view; when both are gone, the memory is free again.
        view = memoryview(memory)
        weakref.finalize(view, _give_back, self._free, self._limit, entry).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count, offset=offset).view(shape)

    def release(self) -> None:
        """Give free memory back to the system."""
        self._free.clear()


def _give_back(free: list[tuple[int, mmap.mmap, int]], limit: float, entry: tuple[int, mmap.mmap, int]) -> None:
    """Keep memory for its thread, from whichever thread the tensor went, unless that would be too much."""
    if entry[0] + sum(size for size, _, _ in free) <= limit:
        free.append(entry)


#: What results of operations may keep while nobody holds them, and what the streams of a running chain may.
_results, _streams = _Pool(2**27), _Pool(math.inf)


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the CPU for a large result."""
    if math.prod(shape) * dtype.itemsize < _SMALL:
        return torch.empty(shape, dtype=dtype)
    return _results.take(shape, dtype)


def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return zeros on the CPU for a large result."""
    return empty(shape, dtype).zero_()


def lasting_like(x: Tensor) -> Tensor:
    """Return an uninitialised, contiguous tensor like ``x`` for what outlives a block of a chain."""
    if x.device.type != "cpu" or type(x) is not Tensor or x.numel() * x.element_size() < _SMALL:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return _streams.take(tuple(x.shape), x.dtype)


def release() -> None:
    """Give back what the streams of this thread's chains have kept."""
    _streams.release()
