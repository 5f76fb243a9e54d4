"""The device: what a GPU does and what stands in for it in a rehearsal.

The stand-in has the same methods, so that all other code is the same in both; ``replaced`` says what it replaced.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from benchmarks.facts import version_of

Run = Callable[[], object]
GB = 1e9


class Gpu:
    """The first CUDA device."""

    replaced: dict[str, str] = {}
    exact = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    #: Bytes of the tensor whose copy is timed, and of the one that is written between timed calls to empty the cache.
    _COPY, _FLUSH = 4 * 2**30, 2**28

    def __init__(self) -> None:
        self.torch = torch.device("cuda", 0)
        torch.cuda.set_device(self.torch)
        torch.cuda.init()
        self.total_bytes = torch.cuda.get_device_properties(self.torch).total_memory
        self._flush: Any = None

    def facts(self) -> dict[str, Any]:
        """Return what the GPU is."""
        properties = torch.cuda.get_device_properties(self.torch)
        return {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / GB, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": version_of("triton"),
        }

    def sync(self) -> None:
        """Wait for the device."""
        torch.cuda.synchronize()

    def times(self, run: Run, count: int, cold: bool = True) -> list[float]:
        """Return the seconds of ``count`` calls, from events; if ``cold``, each with an empty cache."""
        if cold and self._flush is None:
            self._flush = torch.empty(self._FLUSH, dtype=torch.int8, device=self.torch)
        pairs = []
        for _ in range(count):
            if cold:
                self._flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            pairs.append((start, end))
        self.sync()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def replay(self, run: Run) -> Run:
        """Capture a call in a CUDA graph and return its replay."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph, kept = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph):
            kept.append(run())

        def replay() -> object:
            graph.replay()
            return kept

        return replay

    def copy_speed(self) -> float:
        """Return bytes read and written per second by a copy of a large tensor."""
        size = min(self._COPY, self.total_bytes // 8)
        source = torch.empty(size, dtype=torch.int8, device=self.torch).zero_()
        target = torch.empty_like(source)
        self.times(lambda: target.copy_(source), 3)
        return 2 * size / sorted(self.times(lambda: target.copy_(source), 11))[5]

    def reset_peak(self) -> None:
        """Begin to count peaks of memory anew."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> dict[str, float | None]:
        """Return the peaks of memory in GB (1e9): allocated by tensors, and reserved by the allocator."""
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return {"allocated_gb": allocated / GB, "reserved_gb": reserved / GB}

    def free(self) -> None:
        """Give back what nothing refers to."""
        self._flush = None
        gc.collect()
        torch.cuda.empty_cache()

    @contextmanager
    def cap(self, gigabytes: float | None) -> Iterator[None]:
        """Let the allocator have so many GB (1e9) only; None is the whole card."""
        self.free()
        share = 1.0 if gigabytes is None else min(1.0, gigabytes * GB / self.total_bytes)
        torch.cuda.set_per_process_memory_fraction(share)
        try:
            yield
        finally:
            self.free()
            torch.cuda.set_per_process_memory_fraction(1.0)

    def admit(self, tokens: int) -> None:
        """Do nothing: memory decides what a sequence of so many tokens needs."""

    def compile(self, function: Any) -> Any:
        """Compile with torch."""
        return torch.compile(function, dynamic=False)


class StandIn:
    """A CPU in place of the GPU, for rehearsals."""

    replaced = {
        "kernels": "run in triton's interpreter",
        "events": "time.perf_counter",
        "empty cache between calls": "nothing",
        "CUDA graph": "a plain call",
        "peak memory": "None",
        "memory cap": "a limit of tokens, to which the stand-in answers out of memory",
        "SDPA backends flash and cudnn": "the math backend, twice",
        "FlexAttention": "not compiled, forward only: it has no backward on a CPU",
    }
    exact = {"flash": SDPBackend.MATH, "cudnn": SDPBackend.MATH}
    #: What the stand-in for memory holds: tokens per GB, and GB of the whole "card".
    _TOKENS_PER_GB, _CARD = 64, 4

    def __init__(self) -> None:
        self.torch = torch.device("cpu")
        self.total_bytes = int(self._CARD * GB)
        self._cap = float(self._CARD)

    def facts(self) -> dict[str, Any]:
        """Return that there is no GPU."""
        return {"gpu": None, "triton": version_of("triton")}

    def sync(self) -> None:
        """Do nothing."""

    def times(self, run: Run, count: int, cold: bool = True) -> list[float]:
        """Return the seconds of ``count`` calls."""
        found = []
        for _ in range(count):
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
        return found

    def replay(self, run: Run) -> Run:
        """Return the call itself."""
        run()
        return run

    def copy_speed(self) -> float:
        """Return bytes per second of a small copy."""
        source = torch.zeros(2**20, dtype=torch.int8)
        return 2 * 2**20 / min(self.times(lambda: source.clone(), 3))

    def reset_peak(self) -> None:
        """Do nothing."""

    def peak(self) -> dict[str, float | None]:
        """Return that no peak is known."""
        return {"allocated_gb": None, "reserved_gb": None}

    def free(self) -> None:
        """Collect garbage."""
        gc.collect()

    @contextmanager
    def cap(self, gigabytes: float | None) -> Iterator[None]:
        """Limit tokens."""
        self._cap = float(self._CARD) if gigabytes is None else min(float(self._CARD), gigabytes)
        try:
            yield
        finally:
            self._cap = float(self._CARD)

    def admit(self, tokens: int) -> None:
        """Be out of memory for more tokens than the cap's."""
        if tokens > self._cap * self._TOKENS_PER_GB:
            raise torch.OutOfMemoryError(f"rehearsed: {tokens} tokens do not fit {self._cap:g} GB")

    def compile(self, function: Any) -> Any:
        """Leave it as it is."""
        return function


Device = Gpu | StandIn
