import json

import pytest
from typer.testing import CliRunner

from flash_reformer.cli import app
from tests.training.test_evaluation import trained as trained


def run(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_one_command_compares_contexts(trained):
    book = trained.parent / "book.txt"
    result = run(trained, book, "--tail", 0.01, "--context", "16,full", "--stride", 8, "--json", "--num-hashes", 2)
    assert result.exit_code == 1  # 1 % of the book is more than the positions
    assert "context 'full' would be" in result.stderr
    result = run(trained, book, "--tail", 0.005, "--context", "16,full", "--stride", 8, "--json", "--num-hashes", 2)
    assert result.exit_code == 0, result.stderr
    short, full = json.loads(result.stdout)
    assert (short["context"], short["stride"], full["windows"]) == (16, 8, 1)
    assert short["bytes"] == full["bytes"] == round(0.005 * book.stat().st_size)
    assert full["context"] == full["tokens"] + 1
    assert short["num_hashes"] == 2
    of_run = run(trained, "--held-out-of", trained, "--context", 32)
    assert of_run.exit_code == 0, of_run.stderr
    assert "context 32: " in of_run.stdout
    assert "bits per byte" in of_run.stdout
    assert len(of_run.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no text to evaluate on"),
        (["book.txt", "--held-out-of", "run"], "contradict each other"),
        (["--held-out-of", "run", "--tail", 0.1], "--held-out-of and --tail contradict each other"),
        (["--held-out-of", "nowhere"], "nowhere is no run"),
        (["nowhere.txt"], "TEXT nowhere.txt: there is no such file"),
        (["book.txt", "--context", "x"], "--context must be numbers of tokens or 'full'"),
        (["book.txt", "--tail", 2], "tail must lie strictly between 0 and 1, got 2.0"),
    ],
)
def test_the_command_says_what_is_wrong(trained, arguments, said, monkeypatch):
    monkeypatch.chdir(trained.parent)
    result = run(trained, *arguments)
    assert result.exit_code == 1
    assert said in result.stderr
    assert result.stdout == ""
