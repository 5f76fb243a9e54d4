from pathlib import Path

import pytest
import torch


@pytest.fixture
def offline_datasets(tmp_path, monkeypatch):
    """The package `datasets` with a cache of its own."""
    import datasets  # not installed beside the oldest transformers, where tests that need it do not run

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return datasets


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small only lose time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {index} of a text that repeats itself\n" for index in range(120)))
    return str(path)
