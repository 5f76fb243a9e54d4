"""What a number needs beside it to mean anything: versions and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch
import transformers


def cpu_model() -> str:
    """Return the name of the processor, as Linux knows it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def version_of(package: str) -> str:
    """Return the version of an optional package, or that it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, object]:
    """Return versions and machine."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "reformer-pytorch": version_of("reformer-pytorch"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
    }
