from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flash_reformer import ReformerTokenizer, ReformerTokenizerFast
from flash_reformer.cli import app
from tests.tokenization.corpus import ordinary


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["tokenizer", *map(str, arguments)])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(ordinary(200, seed=51)), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_vocabulary_from_the_command_line(text: Path, tmp_path: Path, kind: str) -> None:
    output = tmp_path / "out"
    options = ["--vocab-size", 420, "--type", kind, "--mask-token", "[MASK]", "--symbol", "<q>", "--output", output]
    result = run(text, *options)
    assert result.exit_code == 0, result.stderr
    said = result.stdout.splitlines()
    assert said[0].startswith(f"420 entries ({kind}), special tokens ")
    assert "[MASK] 3" in said[0]
    assert said[1:] == [f"saved in {output}"]
    slow, fast = ReformerTokenizer.from_pretrained(output), ReformerTokenizerFast.from_pretrained(output)
    sample = "the [MASK] fox <q>"
    assert slow(sample).input_ids == fast(sample).input_ids
    assert fast.convert_tokens_to_ids(["<pad>", "<unk>", "</s>", "[MASK]", "<q>"]) == [0, 1, 2, 3, 4]
    assert (fast._tokenizer.sp.kind, len(slow), len(fast)) == (kind, 420, 420)


def test_mistakes_are_one_line(text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    cases = {
        "there is no file": [tmp_path / "nothing.txt", "--output", output],
        "model_type must be one of bpe, unigram, got 'wordpiece'": [text, "--type", "wordpiece", "--output", output],
        "it gives at most": [text, "--vocab-size", 5000, "--type", "unigram", "--output", output],
        "raise it, or lower character_coverage": [text, "--vocab-size", 20, "--output", output],
    }
    for message, arguments in cases.items():
        result = run(*arguments)
        assert result.exit_code == 1
        assert result.stdout == ""
        (line,) = result.stderr.strip().splitlines()
        assert message in line
        assert not output.exists()


def test_nothing_is_overwritten_unasked(text: Path, tmp_path: Path) -> None:
    for size, more, code in ((400, [], 0), (410, [], 1), (420, ["--overwrite"], 0)):
        result = run(text, "--vocab-size", size, "--output", tmp_path / "out", *more)
        assert result.exit_code == code
        if code:
            assert "already holds a tokenizer" in result.stderr
    assert len(ReformerTokenizerFast.from_pretrained(tmp_path / "out")) == 420
