"""``flash-reformer convert`` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import flash_reformer as fr
from flash_reformer.cli import app
from tests.models.builders import build
from tests.models.trax_writer import UNTOLD, around, trax_weights, write


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(UNTOLD))
    return write(tmp_path / "model.pkl.gz", around(trax_weights(build(num_hashes=2)))), config


def test_a_checkpoint_becomes_a_folder(files, tmp_path):
    checkpoint, config = files
    result = run(checkpoint, "--config", config, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    model = build(num_hashes=2)
    assert f"{model.num_parameters():,} parameters (local, lsh) written to" in result.stdout
    loaded = fr.ReformerModelWithLMHead.from_pretrained(tmp_path / "out")
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_mistakes_are_one_line(files, tmp_path):
    checkpoint, config = files
    nothing, broken, listed, short = (tmp_path / name for name in ("nothing", "broken", "listed", "short"))
    broken.write_text("{")
    listed.write_text("[]")
    short.write_text("{}")
    output = ("--output", tmp_path / "out")
    for arguments, message in (
        ((nothing, "--config", config), "No such file"),
        ((config, "--config", config), "truncated or no pickle"),
        ((checkpoint, "--config", nothing), "there is no such file"),
        ((checkpoint, "--config", broken), "is no JSON"),
        ((checkpoint, "--config", listed), "must hold a JSON object"),
        ((checkpoint, "--config", short), "config must say hidden_act, local_attn_chunk_length"),
        ((checkpoint, "--config", config, "--max-gib", 1e-6), "max_bytes"),
        ((checkpoint, "--config", config, "--max-gib", 0), "--max-gib must be above 0"),
    ):
        result = run(*arguments, *output)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert message in result.stderr
        assert not (tmp_path / "out").exists()
