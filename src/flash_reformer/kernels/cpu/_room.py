"""The buffers that slabs are worked on in: a few megabytes per thread, kept from call to call."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

#: Larger buffers (chunks far beyond the usual) are given back after the call.
_LARGEST_KEPT = 2**23


class Room:
    """Named buffers of one dtype. A name's contents last until it is asked for again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor of this shape."""
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            # Inference mode would mark it for good, and every later call outside of it would fail.
            with torch.inference_mode(False):
                flat = torch.empty(size, dtype=self.dtype)
            if size * self.dtype.itemsize <= _LARGEST_KEPT:
                self._flat[name] = flat
        return flat[:size].view(shape)


class _Rooms(threading.local):
    def __init__(self) -> None:
        self.by_dtype: dict[torch.dtype, Room] = {}


_rooms = _Rooms()


def room_for(dtype: torch.dtype) -> Room:
    """Return this thread's room: threads share nothing, and calls of one thread follow each other."""
    return _rooms.by_dtype.setdefault(dtype, Room(dtype))
