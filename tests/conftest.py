"""What every test stands on: no network, and tests marked ``gpu`` only where there is one."""

from __future__ import annotations

import os

# Read by huggingface_hub and datasets at import: a test that asks the hub fails at once and says so.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import settings

# Read by triton when it is imported, which nothing above does: without a device kernels run in triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The same examples on every run, on every machine; no deadline, since a busy machine is no wrong result.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=25, database=None)
settings.load_profile("deterministic")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
