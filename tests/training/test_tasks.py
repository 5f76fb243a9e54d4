import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, pipeline

import flash_reformer  # noqa: F401  (registers the pipelines)
from benchmarks.recipes import fact_questions, marked_texts
from flash_reformer.tokenization.training import train_vocabulary
from flash_reformer.training import resume, train
from flash_reformer.training.tasks import TASKS
from tests.training.runs import Interrupt

TINY = {
    "attn_layers": ["local", "lsh"],
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 16,
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 16,
    "hidden_dropout_prob": 0.1,
}
QUICK = {"max_steps": 6, "batch_size": 2, "cpu": True, "seq_len": 64, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What each task learns from: settings by task."""
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"line {number} of a text that repeats itself\n" for number in range(200))
    (folder / "text.txt").write_text(text)

    def jsonl(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder / name)

    return {
        "clm": {"text": (str(folder / "text.txt"),), "eval_sequences": 2, "sample_tokens": 5},
        "mlm": {"text": (str(folder / "text.txt"),), "eval_sequences": 2},
        "classify": {"dataset": jsonl("texts.jsonl", marked_texts(24, 50, 0)), "held_out": 0.25},
        "qa": {"dataset": jsonl("facts.jsonl", fact_questions(12, 20, 0, facts=2)[0]), "doc_stride": 16},
    }


def weights(folder: Path, task: str) -> dict[str, torch.Tensor]:
    return TASKS[task].model_class.from_pretrained(folder).state_dict()


# Labelled examples are read by `datasets`, which is not there beside the oldest transformers.
@pytest.mark.parametrize(
    "task", [pytest.param(task, marks=pytest.mark.floor) for task in ("clm", "mlm")] + ["classify", "qa"]
)
def test_a_run_leaves_a_folder_that_a_pipeline_loads(task, data, tmp_path):
    asked = {**QUICK, **data[task], "output": str(tmp_path / "run"), "tensorboard": task in ("classify", "qa")}
    result = train(task, asked, TINY)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    measure = TASKS[task].measure
    assert metrics["task"] == task
    assert f"held_out_{measure.key}" in metrics
    assert metrics["steps"] == 6
    assert all(path.exists() for path in result.paths.values())
    if asked["tensorboard"]:
        assert any((tmp_path / "run" / "tensorboard").iterdir())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert type(tokenizer).__name__ == "ReformerByteTokenizer"
    assert tokenizer.model_max_length == 64
    run = str(tmp_path / "run")
    if task == "clm":
        made = pipeline("text-generation", model=run)("line", max_new_tokens=3, do_sample=False)
        assert made[0]["generated_text"].startswith("line")
    elif task == "mlm":
        (found, *_) = pipeline("fill-mask", model=run)(f"line {tokenizer.mask_token} of", top_k=2)
        assert 0 < found["score"] <= 1
    elif task == "classify":
        found = pipeline("text-classification", model=run)("some [a] text")
        assert found[0]["label"] in ("north", "east", "south", "west")
    else:
        context = "one two three four. " * 10
        found = pipeline("extractive-question-answering", model=run)(question="what has x", context=context)
        assert context[found["start"] : found["end"]] == found["answer"]


@pytest.mark.parametrize(("task", "accumulation"), [("mlm", 1), ("mlm", 2), ("classify", 1), ("qa", 2)])
def test_a_resumed_run_ends_like_an_undisturbed_one_bit_for_bit(task, accumulation, data, tmp_path):
    asked = {**QUICK, **data[task], "max_steps": 12, "save_interval": 4, "gradient_accumulation": accumulation}
    whole = train(task, {**asked, "output": str(tmp_path / "whole")}, TINY)
    with pytest.raises(KeyboardInterrupt):
        train(task, {**asked, "output": str(tmp_path / "broken")}, TINY, callbacks=[Interrupt(11)])
    torch.manual_seed(12345)
    resumed = resume({"output": str(tmp_path / "broken")})
    a, b = weights(tmp_path / "whole", task), weights(tmp_path / "broken", task)
    assert all(torch.equal(a[name], b[name]) for name in a)
    key = f"held_out_{TASKS[task].measure.key}"
    assert resumed.metrics[key] == whole.metrics[key]
    with pytest.raises(ValueError, match=f"belongs to a run of {task}, not of clm"):
        resume({"output": str(tmp_path / "broken"), "max_steps": 20}, task="clm")


def test_the_best_weights_are_kept_and_early_stopping_ends_a_run(data, tmp_path):
    # A learning rate that ruins the model: what comes after the first evaluations is worse.
    asked = {**QUICK, **data["clm"], "max_steps": 40, "eval_interval": 2, "learning_rate": 3.0, "warmup_steps": 8}
    result = train("clm", {**asked, "output": str(tmp_path / "a"), "keep": "best", "early_stopping": 3}, TINY)
    judged = {entry["step"]: entry["eval_loss"] for entry in result.metrics["history"] if "eval_loss" in entry}
    judged.pop(0)  # before training
    best = min(judged, key=judged.get)
    assert result.metrics["kept_step"] == best < result.metrics["steps"] < 40
    assert result.metrics["held_out_loss"] == judged[best] < judged[result.metrics["steps"]]
    kept, checkpoint = weights(tmp_path / "a", "clm"), weights(tmp_path / "a" / f"checkpoint-{best}", "clm")
    assert all(torch.equal(kept[name], checkpoint[name]) for name in kept)
    last = train("clm", {**asked, "output": str(tmp_path / "b"), "max_steps": 12}, TINY)
    assert last.metrics["kept_step"] == 12


def test_epochs_bound_a_run(data, tmp_path):
    asked = {**QUICK, **data["classify"], "max_steps": None, "max_epochs": 1.5, "output": str(tmp_path / "run")}
    # 18 texts in batches of 2.
    assert train("classify", asked, TINY).metrics["steps"] == 14


def test_examples_have_an_end_of_their_own_and_text_has_none(data):
    assert TASKS["classify"].settings_class.with_end({})["max_steps"] > 0
    assert "max_steps" not in TASKS["classify"].settings_class.with_end({"max_minutes": 1.0})
    assert "max_steps" not in TASKS["clm"].settings_class.with_end({})


def test_a_trained_vocabulary_goes_into_the_run_and_on_to_the_next(data, tmp_path):
    train_vocabulary([Path(data["clm"]["text"][0])], tmp_path / "vocabulary", vocab_size=40, model_type="unigram")
    asked = {**QUICK, "tokenizer": str(tmp_path / "vocabulary")}
    first = train("clm", {**asked, **data["clm"], "output": str(tmp_path / "a")}, TINY)
    assert first.task.vocabulary.size == 40
    assert first.metrics["held_out_bits_per_byte"] > 0
    assert (tmp_path / "a" / "spiece.model").read_bytes() == (tmp_path / "vocabulary" / "spiece.model").read_bytes()
    second = train("clm", {**QUICK, **data["clm"], "output": str(tmp_path / "b"), "init_from": str(tmp_path / "a")})
    assert second.task.vocabulary.size == 40
    key = "held_out_bits_per_byte"
    assert second.metrics[f"{key}_at_start"] == first.metrics[key]
    with pytest.raises(ValueError, match=r"tokenizer bytes has ids up to 257, but init_from .* vocab_size of 40"):
        train(
            "clm",
            {
                **QUICK,
                **data["clm"],
                "output": str(tmp_path / "c"),
                "init_from": str(tmp_path / "a"),
                "tokenizer": "bytes",
            },
        )
    assert not (tmp_path / "c").exists()


def test_a_classifier_goes_on_from_another_with_as_many_classes(data, tmp_path):
    asked = {**QUICK, **data["classify"]}
    first = train("classify", {**asked, "output": str(tmp_path / "a"), "keep": "last"}, TINY)
    again = {**asked, "output": str(tmp_path / "b"), "init_from": str(tmp_path / "a")}
    second = train("classify", again)
    assert second.metrics["held_out_accuracy_at_start"] == first.metrics["held_out_accuracy"]
    rows = [{"text": f"text {number}", "label": number % 3} for number in range(9)]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"data has 3 classes, but init_from .* has a head of 4"):
        train("classify", {**again, "dataset": str(tmp_path / "three.jsonl"), "output": str(tmp_path / "c")})


def test_a_language_model_becomes_any_other_model(data, tmp_path):
    train("clm", {**QUICK, **data["clm"], "output": str(tmp_path / "clm")}, TINY)
    rows = [{"text": f"text {number}", "label": number % 3} for number in range(12)]
    (tmp_path / "three.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {**QUICK, "init_from": str(tmp_path / "clm")}
    three = {**start, "dataset": str(tmp_path / "three.jsonl"), "output": str(tmp_path / "classify")}
    config = train("classify", three).task.model_class.from_pretrained(tmp_path / "classify").config
    assert (config.num_labels, config.classifier_pooling, config.is_decoder) == (3, "max", True)
    masked = train("mlm", {**start, **data["mlm"], "output": str(tmp_path / "mlm")})
    config = masked.task.model_class.from_pretrained(tmp_path / "mlm").config
    assert (config.vocab_size, config.is_decoder) == (259, False)
    train("qa", {**start, **data["qa"], "output": str(tmp_path / "qa")})
    old = weights(tmp_path / "clm", "clm")["reformer.embeddings.word_embeddings.weight"]
    for task in ("classify", "mlm", "qa"):
        new = weights(tmp_path / task, task)["reformer.embeddings.word_embeddings.weight"]
        # A few steps away from where they came from, far closer than from fresh weights.
        assert (new[:258] - old).norm() < 0.9 * old.norm()


def test_another_tokenizer_than_the_models_is_refused(data, tmp_path):
    train("clm", {**QUICK, **data["clm"], "output": str(tmp_path / "clm")}, TINY)
    train_vocabulary([Path(data["clm"]["text"][0])], tmp_path / "vocabulary", vocab_size=40)
    asked = {**QUICK, **data["clm"], "init_from": str(tmp_path / "clm"), "tokenizer": str(tmp_path / "vocabulary")}
    with pytest.raises(ValueError, match=r"has 40 ids, but init_from .* has a vocab_size of 258"):
        train("clm", {**asked, "output": str(tmp_path / "run")})
    assert not (tmp_path / "run").exists()


def test_an_early_stop_leaves_a_checkpoint(data, tmp_path):
    asked = {**QUICK, **data["clm"], "max_steps": 30, "eval_interval": 2, "learning_rate": 1e-12, "warmup_steps": 0}
    result = train("clm", {**asked, "early_stopping": 1, "output": str(tmp_path / "run")}, TINY)
    assert result.metrics["steps"] < 30
    assert result.paths["checkpoint"].name == f"checkpoint-{result.metrics['steps']}"


def test_a_run_that_diverges_says_so(data, tmp_path):
    asked = {**QUICK, **data["clm"], "learning_rate": 1e30, "max_grad_norm": 1e30, "log_interval": 1}
    with pytest.raises(ValueError, match=r"the loss is nan at step \d: training has diverged; learning_rate 1e\+30"):
        train("clm", {**asked, "max_steps": 8, "output": str(tmp_path / "run")}, TINY)


def test_overwriting_removes_what_runs_leave_and_nothing_else(data, tmp_path):
    asked = {**QUICK, **data["clm"], "output": str(tmp_path / "run"), "tensorboard": True}
    train("clm", asked, TINY)
    (tmp_path / "run" / "checkpoint-old").mkdir()
    # Older than any checkpoint, so that whoever removes the oldest folders would take it.
    os.utime(tmp_path / "run" / "checkpoint-old", (0, 0))
    (tmp_path / "run" / "checkpoint-notes.txt").touch()
    train("clm", {**asked, "tensorboard": False, "max_steps": 2}, TINY, overwrite=True)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"checkpoint-old", "checkpoint-notes.txt", "checkpoint-2"} <= left
    assert not {"checkpoint-6", "tensorboard"} & left


def test_the_pipeline_answers_as_evaluations_do(data, tmp_path):
    rows = fact_questions(6, 20, 0, facts=2)[0]
    for row in rows:
        # Longer than what question answering pipelines take by default.
        row["question"] = "if anybody knew about it at all, would they please be so kind as to say: " + row["question"]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {**QUICK, "seq_len": 256, "doc_stride": 16, "max_steps": 60, "keep": "last"}
    asked |= {"dataset": str(tmp_path / "long.jsonl"), "validation": str(tmp_path / "judged.jsonl")}
    fields = {**TINY, "hidden_dropout_prob": 0.0, "hash_seed": 0}
    result = train("qa", {**asked, "output": str(tmp_path / "run")}, fields)
    answer = pipeline("extractive-question-answering", model=str(tmp_path / "run"))
    found = [answer(question=row["question"], context=row["context"])["answer"] for row in rows]
    right = [text == row["answers"]["text"][0] for text, row in zip(found, rows, strict=True)]
    assert sum(right) / len(right) == pytest.approx(result.metrics["held_out_exact_match"], abs=1e-6)
    config = result.task.model_class.from_pretrained(tmp_path / "run").config
    assert config.answer_lengths["max_question_len"] > 64


def test_a_classifier_cuts_long_texts_when_asked(data, tmp_path):
    train("classify", {**QUICK, **data["classify"], "output": str(tmp_path / "run")}, TINY)
    classify = pipeline("text-classification", model=str(tmp_path / "run"))
    assert classify("word " * 100, truncation=True)[0]["label"] in ("north", "east", "south", "west")


def test_masks_differ_from_step_to_step_and_evaluations_do_not(data, tmp_path):
    result = train("mlm", {**QUICK, **data["mlm"], "output": str(tmp_path / "run")}, TINY)
    task = result.task
    batch = task.collate([task.train[0], task.train[1]])
    first, second = (task.model_inputs(batch)["labels"] for _ in range(2))
    assert not torch.equal(first, second)
    held_out = task.collate([task.held_out[0]])
    assert task.model_inputs(held_out) is held_out


@pytest.mark.parametrize(
    ("task", "asked", "fields", "message"),
    [
        ("translate", {}, {}, "task must be one of clm, mlm, classify, qa, got 'translate'"),
        ("mlm", {"mask_unit": "line"}, {}, "mask_unit must be one of word, token"),
        ("mlm", {"mask_probability": 1.0}, {}, "mask_probability must be strictly between 0 and 1"),
        ("mlm", {}, {"is_decoder": True}, "is_decoder must be False"),
        ("clm", {"keep": "all"}, {}, "keep must be one of last, best"),
        ("clm", {"early_stopping": 0}, {}, "early_stopping must be at least 1"),
        ("clm", {"max_epochs": 0}, {}, "max_epochs must be a positive number"),
        ("clm", {"tokenizer": "/nowhere/at/all"}, {}, "tokenizer /nowhere/at/all cannot be loaded"),
        ("classify", {"init_from": "/nowhere"}, {"hidden_size": 8}, "init_from brings its own model"),
        ("classify", {}, {"classifier_pooling": "sum"}, "classifier_pooling must be None or one of"),
        ("clm", {"seed": 2**32}, {}, r"seed must be in 0..2\*\*32 - 1"),
        ("qa", {"doc_stride": -1}, {}, "doc_stride must be at least 0"),
        ("qa", {"seq_len": 100}, {"axial_pos_shape": [8, 8]}, "seq_len must be at most 64"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(task, asked, fields, message, data, tmp_path):
    given = {**QUICK, **data.get(task, {}), "output": str(tmp_path / "run"), **asked}
    with pytest.raises(ValueError, match=message):
        train(task, given, fields)
    assert not (tmp_path / "run").exists()


def test_white_space_alone_has_no_word_to_mask(tmp_path):
    (tmp_path / "white.txt").write_text(" \n" * 500)
    with pytest.raises(ValueError, match="there is no word to mask"):
        train("mlm", {**QUICK, "text": (str(tmp_path / "white.txt"),), "output": str(tmp_path / "run")}, TINY)
