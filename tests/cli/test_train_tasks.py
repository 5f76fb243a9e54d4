import json
from pathlib import Path

import pytest

from benchmarks.recipes import fact_questions, marked_texts
from flash_reformer.training.tasks import TASKS
from tests.cli.test_cli import complaint, one_thread, run

__all__ = ["one_thread"]

SIZES = (
    "--layers local,lsh --hidden-size 16 --num-heads 2 --head-size 8 --feed-forward-size 16 "
    "--local-chunk-length 4 --lsh-chunk-length 16 --seq-len 64 --cpu --max-steps 3 --batch-size 2"
).split()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    texts, facts = marked_texts(12, 50, 0), fact_questions(8, 20, 0, facts=2)[0]
    for name, rows in (("texts.jsonl", texts), ("facts.jsonl", facts)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "book.txt").write_text("".join(f"line {number} of a text\n" for number in range(200)))
    return {path.name.split(".")[0]: path for path in folder.iterdir()}


def test_a_classifier_from_one_command(data, tmp_path):
    result = run("train", "classify", "--dataset", data["texts"], "--output", tmp_path / "run", *SIZES, "--tensorboard")
    assert result.exit_code == 0, result.stderr
    assert "held-out accuracy" in result.stdout
    assert result.stderr == ""
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert sorted(config["label2id"]) == ["east", "north", "south", "west"]
    assert config["classifier_pooling"] == "max"
    assert any((tmp_path / "run" / "tensorboard").iterdir())


def test_answers_from_one_command(data, tmp_path):
    arguments = ["--dataset", data["facts"], "--output", tmp_path / "run", "--doc-stride", 8]
    result = run("train", "qa", *arguments, *SIZES)
    assert result.exit_code == 0, result.stderr
    assert "held-out exact match" in result.stdout
    again = run("train", "qa", "--output", tmp_path / "run", "--resume", "--max-steps", 4)
    assert again.exit_code == 0, again.stderr
    assert "4 steps" in again.stdout


def test_words_and_a_vocabulary_from_two_commands(data, tmp_path):
    made = run("tokenizer", data["book"], "--vocab-size", 30, "--output", tmp_path / "vocabulary")
    assert made.exit_code == 0, made.stderr
    arguments = ["--text", data["book"], "--output", tmp_path / "run", "--tokenizer", tmp_path / "vocabulary"]
    result = run("train", "mlm", *arguments, *SIZES, "--eval-sequences", 2)
    assert result.exit_code == 0, result.stderr
    assert "held-out accuracy on masked tokens" in result.stdout
    assert json.loads((tmp_path / "run" / "config.json").read_text())["vocab_size"] == 31


def test_a_language_model_with_a_vocabulary_writes_text(data, tmp_path):
    run("tokenizer", data["book"], "--vocab-size", 30, "--output", tmp_path / "vocabulary")
    arguments = ["--text", data["book"], "--output", tmp_path / "run", "--tokenizer", tmp_path / "vocabulary"]
    result = run("train", "clm", *arguments, *SIZES, "--eval-sequences", 2, "--sample-tokens", 3)
    assert result.exit_code == 0, result.stderr
    written = run("generate", tmp_path / "run", "--prompt", "line 1 of", "--max-new-tokens", 8, "--greedy")
    assert written.exit_code == 0, written.stderr
    assert written.stdout.startswith("line 1 of")


def test_streamed_text_of_growing_length_from_one_command(data, tmp_path):
    sizes = [each for each in SIZES if each not in ("--seq-len", "64")]
    schedules = ["--seq-len-schedule", "0:16,0.5:48", "--num-hashes-schedule", "0:1,2:2", "--eval-num-hashes", 3]
    arguments = ["--text", data["book"], "--output", tmp_path / "run", "--streaming", "--grow-positions", *schedules]
    result = run("train", *arguments, *sizes, "--sample-tokens", 0, "--eval-sequences", 1)
    assert result.exit_code == 0, result.stderr
    # Three steps of two sequences of 48, or as many shorter ones as have that many tokens.
    assert "3 steps, 288 tokens" in result.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["num_hashes"] == 3
    assert config["axial_pos_shape"] == [6, 8]


def test_help_lists_the_tasks():
    result = run("train", "--help")
    assert result.exit_code == 0
    assert all(f" {task} " in result.stdout for task in TASKS)


def test_a_task_that_is_none_is_named():
    result = run("train", "clasify", "--dataset", "x")
    assert result.exit_code == 2
    assert "No such command 'clasify'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["classify"], "no examples to train on: give --dataset"),
        (["classify", "x.jsonl"], "unexpected argument 'x.jsonl': name examples after --dataset"),
        (["classify", "--dataset", "nowhere.jsonl"], "--dataset nowhere.jsonl (split 'train') cannot be read"),
        (["classify", "--dataset", "texts", "--label-column", "stars"], "--label-column 'stars' is no column of"),
        (["classify", "--dataset", "texts", "--classifier-pooling", "sum"], "classifier_pooling must be"),
        (["classify", "--dataset", "texts", "--preset", "demo"], "preset must be one of none for classify"),
        (["classify", "--dataset", "texts", "--tokenizer", "/nowhere"], "tokenizer /nowhere cannot be loaded"),
        (["classify", "--dataset", "texts", "--init-from", "/nowhere"], "init_from /nowhere"),
        (["clm", "--text", "book", "--max-steps", 1, "--layers", "local", "--num-hashes", 2], "no 'lsh' layer"),
        (["mlm", "--text", "book", "--layers", "lsh", "--local-chunk-length", 4], "no 'local' layer"),
        (["clm", "--resume"], "there is no checkpoint in"),
        (["classify", "--dataset", "facts"], "--text-column 'text' is no column of"),
        (["qa", "--dataset", "texts"], "must have the columns question, context and answers"),
        (["qa", "--dataset", "facts", "--doc-stride", 5000], "doc_stride 5000"),
        (["mlm", "--text", "nowhere.txt"], "there is no such file"),
        (["mlm", "--text", "book", "--mask-unit", "line"], "mask_unit must be one of word, token, got 'line'"),
        (["mlm", "--resume"], "there is no checkpoint in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_and_nothing_is_written(arguments, said, data, tmp_path):
    arguments = [data.get(each, each) if isinstance(each, str) else each for each in arguments]
    assert said in complaint("train", *arguments, "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()
