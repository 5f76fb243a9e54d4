"""SentencePiece models, each trained once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tokenization.corpus import train_model


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    trained: dict[str, Path] = {}

    def get(name: str) -> str:
        if name not in trained:
            trained[name] = train_model(folder, name)
        return str(trained[name])

    return get
