"""How much memory a process or its GPU takes: at the moment, and at most so far. None where the system does not say."""

import sys
from pathlib import Path

import torch


def peak_memory() -> int | None:
    """Return the highest memory use so far in bytes: of the GPU where one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    return peak_of_process()


def current_memory() -> int | None:
    """Return the memory in use at the moment in bytes: of the GPU where one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.memory_allocated())
    return memory_of_process()


def peak_of_process() -> int | None:
    """Return the highest resident memory of this process in bytes."""
    # Not getrusage first, whose peak on Linux starts at that of the process that started this one.
    return _read_status("VmHWM:") or _peak_by_resource()


def memory_of_process() -> int | None:
    """Return the resident memory of this process at the moment, in bytes; known on Linux."""
    return _read_status("VmRSS:")


def _read_status(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)


def _peak_by_resource() -> int | None:
    try:
        import resource
    except ImportError:  # not there on Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
