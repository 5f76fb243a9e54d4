"""Memory of large tensors on a CPU, apart from the heap: of huge pages, and used again.

Fetching fresh memory page by page costs more than most of what is done with it: in trials 3 ms and more for 16 MiB,
where a copy takes 1. So memory of results is kept, up to a limit. And what a block leaves behind (streams, their
gradients) would lie among its large temporaries on the heap: the holes between do not quite fit the next block's
temporaries, and the heap grows by some streams in every layer though live memory does not.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import threading
import weakref
from dataclasses import dataclass
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
    if not hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size), 0
    # Private: a forked process must not write into its parent's tensors.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if size < _HUGE_PAGE or not _has_huge_pages():
        return mmap.mmap(-1, size, flags=flags), 0
    memory = mmap.mmap(-1, size + _HUGE_PAGE, flags=flags)
    # A huge page begins at a multiple of its size. What lies before is never touched, so it does not exist; what is
    # left at the end gets ordinary pages, so that no tensor takes more than it asked for.
    offset = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    memory.madvise(mmap.MADV_HUGEPAGE, offset, size // _HUGE_PAGE * _HUGE_PAGE)
    return memory, offset


class _Pool(threading.local):
    """A thread's memory that no tensor holds at the moment, to be used again for tensors of the same size."""

    def __init__(self, limit: float) -> None:
        self._kept = _Kept([], limit)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an uninitialised tensor."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        entry = self._kept.find(size) or (size, *_map(size))
        _, memory, offset = entry
        # The tensor's storage holds the view; when both are gone, the memory is free again.
        view = memoryview(memory)
        weakref.finalize(view, self._kept.give_back, entry).atexit = False
        return torch.frombuffer(view, dtype=dtype, count=count, offset=offset).view(shape)

    @property
    def is_keeping(self) -> bool:
        """Whether what comes back is kept."""
        return self._kept.limit > 0

    def keep_at_most(self, limit: float) -> None:
        """Keep no more than so many bytes from now on."""
        self._kept.limit = limit
        self._kept.shrink()


@dataclass
class _Kept:
    """Free memory, the oldest first: size, memory, offset. It comes back from whichever thread a tensor went to."""

    free: list[tuple[int, mmap.mmap, int]]
    limit: float

    def find(self, size: int) -> tuple[int, mmap.mmap, int] | None:
        """Take memory of this size out; None if there is none. Another thread may give back or drop some meanwhile."""
        for entry in list(self.free):
            if entry[0] == size:
                with contextlib.suppress(ValueError):
                    self.free.remove(entry)
                    return entry
        return None

    def give_back(self, entry: tuple[int, mmap.mmap, int]) -> None:
        self.free.append(entry)
        self.shrink()

    def shrink(self) -> None:
        """Give the oldest back to the system until the rest is within the limit."""
        while sum(size for size, _, _ in list(self.free)) > self.limit:
            with contextlib.suppress(IndexError):
                self.free.pop(0)


#: What results of operations may keep while nobody holds them. Streams keep all they need while a chain is walked.
RESULTS_KEPT = 2**26
_results, _streams = _Pool(RESULTS_KEPT), _Pool(0)


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
    return lasting(tuple(x.shape), x)


def lasting(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return an uninitialised tensor of another shape than ``like`` in such memory."""
    if like.device.type != "cpu" or type(like) is not Tensor or math.prod(shape) * like.element_size() < _SMALL:
        return like.new_empty(shape)
    return (_streams if _streams.is_keeping else _results).take(tuple(shape), like.dtype)


def begin_walk() -> None:
    """From now on keep what this thread's streams leave, for the blocks that follow."""
    _streams.keep_at_most(math.inf)


def end_walk() -> None:
    """Give back what they have left, and what they will."""
    _streams.keep_at_most(0)


def keep_results(limit: float) -> None:
    """Keep no more than so many bytes of freed results on this thread from now on."""
    _results.keep_at_most(limit)


def kept_results() -> int:
    """Return how many bytes of freed results this thread keeps at the moment."""
    return sum(size for size, _, _ in list(_results._kept.free))
