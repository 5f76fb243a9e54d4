import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from flash_reformer.cli import app
from flash_reformer.cli.options import given_model_fields, given_settings, model_parameters, settings_parameters
from flash_reformer.cli.progress import describe
from flash_reformer.training.progress import Progress
from flash_reformer.training.tasks import TASKS

SIZES = (
    "--layers local,lsh --hidden-size 16 --num-heads 2 --head-size 8 --feed-forward-size 16 "
    "--local-chunk-length 16 --lsh-chunk-length 16 --axial-norm-std 0.02 --seq-len 64"
).split()
QUICK = ["--cpu", "--max-steps", "4", "--eval-sequences", "2", "--sample-tokens", "3", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def complaint(*arguments: object) -> str:
    """Run a command that must fail; return the one line that it says."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / name for name in ("a.txt", "b.txt")]
    for path in paths:
        path.write_text("".join(f"line {index} of {path.name}\n" for index in range(120)))
    return paths


@pytest.fixture(scope="module")
def trained(texts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    result = run("train", "--text", *texts, "--output", output, *SIZES, *QUICK)
    assert result.exit_code == 0, result.stderr
    said = re.sub(r"\s+", " ", result.stdout)
    assert "held-out bits per byte" in said
    assert "4 steps, 512 tokens" in said
    for name in ("metrics.json", "loss_curve.png", "loss_curve.svg", "sample.txt", "checkpoint-4"):
        assert str(output / name) in result.stdout
        assert (output / name).exists()
    return output


def test_every_file_after_text_is_read(trained, texts):
    assert json.loads((trained / "run.json").read_text())["text"] == [str(path) for path in texts]


def test_a_run_resumes_and_can_be_made_longer(trained, tmp_path):
    assert "already at the end" in complaint("train", "--output", trained, "--resume")
    result = run("train", "--resume-from", trained / "checkpoint-4", "--output", tmp_path / "b", "--max-steps", 5)
    assert result.exit_code == 0, result.stderr
    assert "5 steps" in result.stdout
    assert (tmp_path / "b" / "model.safetensors").is_file()


def test_a_config_file_sets_sizes_and_flags_come_on_top(trained, texts, tmp_path):
    config = trained / "config.json"
    output = tmp_path / "run"
    flags = ["--hidden-size", 24, "--axial-pos-dims", "8,16", "--layers", "lsh"]
    fields = {**json.loads(config.read_text()), "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    result = run(
        "train",
        "--text",
        texts[0],
        "--output",
        output,
        "--config",
        tmp_path / "config.json",
        *flags,
        *QUICK,
        "--seq-len",
        64,
    )
    assert result.exit_code == 0, result.stderr
    made = json.loads((output / "config.json").read_text())
    assert (made["hidden_size"], made["attn_layers"], made["lsh_attn_chunk_length"]) == (24, ["lsh"], 16)


def test_generate_repeats_itself_by_seed(trained):
    first, again, other = (
        run("generate", trained, "--prompt", "line", "--max-new-tokens", 12, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first.exit_code == 0, first.stderr
    assert first.stdout.startswith("line")
    assert first.stdout == again.stdout != other.stdout
    # How fast it went is not part of the text.
    assert re.search(r"5 tokens read in [0-9.]+ s, \d+ written in [0-9.]+ s", first.stderr)
    assert "tokens read" not in first.stdout


def test_generate_takes_its_prompt_from_a_file_and_every_sampling_option(trained, tmp_path):
    (tmp_path / "prompt").write_bytes(b"lin\xff")
    options = ["--temperature", 0.5, "--top-k", 3, "--top-p", 0.9, "--num-hashes", 2, "--max-new-tokens", 5]
    options += ["--prefill-chunk-size", 3]
    result = run("generate", trained, "--prompt-file", tmp_path / "prompt", *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("lin\N{REPLACEMENT CHARACTER}")
    assert run("generate", trained, "--greedy", "--max-new-tokens", 5).exit_code == 0


def test_generate_says_what_is_wrong(trained, tmp_path):
    assert "is no saved model" in complaint("generate", tmp_path)
    assert "contradict each other" in complaint("generate", trained, "--prompt", "a", "--prompt-file", "b")
    assert "there is no such file" in complaint("generate", trained, "--prompt-file", tmp_path / "nowhere")
    assert "temperature must be positive" in complaint("generate", trained, "--temperature", 0)
    assert "top_k" in complaint("generate", trained, "--greedy", "--top-k", 3)
    assert "positions" in complaint("generate", trained, "--max-new-tokens", 100)
    assert "is a folder" in complaint("generate", trained, "--prompt-file", tmp_path)
    assert "seed must lie" in complaint("generate", trained, "--seed", 2**70)
    assert "prefill_chunk_size" in complaint("generate", trained, "--prefill-chunk-size", 0)


def test_generate_ends_quietly_when_nobody_reads_on(trained):
    command = [sys.executable, "-c", "from flash_reformer.cli import app; app()", "generate", str(trained)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert "roken" not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--text", "a", "--dataset", "b", "--max-steps", 1], "--text and --dataset contradict each other"),
        (["--max-steps", 1], "no text to train on"),
        (["a.txt", "--max-steps", 1], "name text files after --text"),
        (["--text", "nowhere"], "no end is set"),
        (["--text", "nowhere", "--max-steps", 1], "nowhere: there is no such file"),
        (["--resume"], "there is no checkpoint in"),
        (["--resume", "--resume-from", "x"], "contradict each other"),
        (["--resume", "--init-from", "x"], "it contradicts --init-from"),
        (["--resume", "--hidden-size", 8, "--layers", "lsh"], "--layers, --hidden-size"),
        (["--resume", "--preset", "demo"], "it contradicts --preset"),
        (["--preset", "demo", "--init-from", "x"], "contradicts preset 'demo'"),
        (["--preset", "nonsense"], "preset must be one of demo for clm, got 'nonsense'"),
        (["--standard-library", "--max-steps", 0], "max_steps must be at least 1, got 0"),
        (["--standard-library", "--max-steps", 1, "--layers", "dense"], "attn_layers"),
        (["--standard-library", "--max-steps", 1, "--num-buckets", "x"], "num_buckets must be whole numbers"),
        (["--standard-library", "--max-steps", 1, "--num-buckets", "7"], "num_buckets"),
        (["--standard-library", "--max-steps", 1, "--config", "nowhere.json"], "there is no such file"),
    ],
)
def test_train_says_what_is_wrong_and_writes_nothing(arguments, said, tmp_path):
    assert said in complaint("train", "--output", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"hiden_size": 3}', "does not know: hiden_size"),
        ('{"model_type": "bert"}', "must be of model_type 'reformer'"),
        ('{"vocab_size": 300}', "vocab_size must be 258"),
    ],
)
def test_config_files_that_do_not_fit_are_refused(content, said, tmp_path):
    (tmp_path / "config.json").write_text(content)
    arguments = ["--standard-library", "--max-steps", 1, "--config", tmp_path / "config.json"]
    assert said in complaint("train", "--output", tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_debug_shows_where(tmp_path):
    result = run("train", "--output", tmp_path / "run", "--debug")
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_help_names_every_setting(task):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", task.name, "--help"])
    assert result.exit_code == 0
    for parameter in (*settings_parameters(task), *model_parameters(task)):
        assert "--" + parameter.name.replace("_", "-") in result.stdout, parameter.name


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_flags_not_given_set_nothing(task):
    nothing = {parameter.name: None for parameter in (*settings_parameters(task), *model_parameters(task))}
    assert given_settings(task, nothing) == {}
    assert given_model_fields(nothing) == {}
    assert given_settings(task, {**nothing, "seed": 0, "cpu": False}) == {"seed": 0, "cpu": False}


def test_progress_is_one_readable_line():
    now = Progress("step", 12, 0.5, 4096, 1234.5, 61.0, "accuracy", "loss", 3.14159, None, 2**30)
    said = "1,234 tokens/s · loss 3.142 · held-out accuracy – · 1:01 left · step 12 · 1.00 GiB"
    assert describe(now) == said
    now = replace(now, memory_now_bytes=2**29)
    assert describe(now).endswith("step 12 · 0.50 GiB, at most 1.00 GiB")
    assert describe(Progress("start")) == "0 tokens/s · – left · step 0 · –"
