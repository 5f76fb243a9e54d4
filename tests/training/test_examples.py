import csv
import json
from pathlib import Path

import numpy as np
import pytest

from flash_reformer.training.settings import AnswerSettings, ClassificationSettings
from flash_reformer.training.tasks import TASKS
from flash_reformer.training.tasks.answers import QuestionAnswering, load_questions, read_questions
from flash_reformer.training.tasks.classify import SequenceClassification
from flash_reformer.training.tasks.examples import set_aside
from flash_reformer.training.vocabulary import Vocabulary

LABELLED = [{"text": f"text number {number}", "label": ["no", "yes"][number % 2]} for number in range(10)]
CONTEXT = "The Nile flows north. It is long. Many people live along the Nile."


@pytest.fixture(autouse=True)
def _offline(offline_datasets):
    """No dataset is fetched, none is kept."""


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def classification(path: str, **settings) -> SequenceClassification:
    return SequenceClassification(ClassificationSettings(dataset=path, **settings), Vocabulary.of_bytes())


def answers(path: str, **settings) -> QuestionAnswering:
    if "held_out" not in settings:
        # Questions about one text are never on both sides, and most here are about one: judge on a copy.
        settings["validation"] = str(Path(path).with_stem("copy"))
        Path(settings["validation"]).write_text(Path(path).read_text())
    return QuestionAnswering(AnswerSettings(dataset=path, **settings), Vocabulary.of_bytes())


def squad(*questions: tuple[str, list[tuple[str, int]]]) -> dict:
    qas = [
        {"id": str(place), "question": question, "answers": [{"text": t, "answer_start": s} for t, s in found]}
        for place, (question, found) in enumerate(questions)
    ]
    return {"version": "1.1", "data": [{"title": "Nile", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}


def question(text: str = "Which river?", answer: str = "Nile", start: int = 4, context: str = CONTEXT) -> dict:
    return {"question": text, "context": context, "answers": {"text": [answer], "answer_start": [start]}}


def test_classes_are_those_of_the_training_examples_in_order(tmp_path):
    task = classification(jsonl(tmp_path / "a.jsonl", LABELLED), held_out=0.2)
    assert task.classes == ["no", "yes"]
    assert len(task.train) == 8
    assert len(task.held_out) == 2
    row = task.train[0]
    assert bytes(row["input_ids"].numpy().astype(np.uint8) - 2).decode() == LABELLED[0]["text"]
    assert row["labels"] == 0
    fields = task.dictated_fields()
    assert fields["id2label"] == {0: "no", 1: "yes"}
    assert fields["vocab_size"] == 258


def test_csv_with_numbers_and_other_columns(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["body", "stars"], *([f"text {number}, quoted", number % 3] for number in range(9))])
    task = classification(str(tmp_path / "a.csv"), text_column="body", label_column="stars")
    assert task.classes == [0, 1, 2]
    assert task.dictated_fields()["id2label"] == {0: "0", 1: "1", 2: "2"}


def test_named_classes_of_a_saved_dataset(tmp_path, offline_datasets):
    features = offline_datasets.Features(
        text=offline_datasets.Value("string"), label=offline_datasets.ClassLabel(names=["bad", "good"])
    )
    rows = {"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 0]}
    offline_datasets.DatasetDict(
        train=offline_datasets.Dataset.from_dict(rows, features=features),
        test=offline_datasets.Dataset.from_dict({"text": ["e"], "label": [1]}, features=features),
    ).save_to_disk(tmp_path / "saved")
    task = classification(str(tmp_path / "saved"), validation_split="test")
    assert task.classes == ["bad", "good"]
    assert [row["labels"].item() for row in task.held_out] == [1]
    assert len(task.train) == 4


def test_batches_are_padded_on_the_right_and_masked(tmp_path):
    rows = [{"text": "ab", "label": 0}, {"text": "abcd", "label": 1}, {"text": "abcd", "label": 0}]
    task = classification(jsonl(tmp_path / "a.jsonl", rows), validation=jsonl(tmp_path / "b.jsonl", rows))
    batch = task.collate([task.train[0], task.train[1]])
    assert batch["input_ids"].tolist() == [[99, 100, 0, 0], [99, 100, 101, 102]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [0, 1]
    assert "attention_mask" not in task.collate([task.train[1], task.train[2]])


def test_long_texts_are_cut_and_said_so(tmp_path):
    rows = [{"text": "a" * (10 + number), "label": number % 2} for number in range(10)]
    with pytest.warns(UserWarning, match=r"4 of 9 training texts are longer than seq_len 15"):
        task = classification(jsonl(tmp_path / "a.jsonl", rows), seq_len=15, held_out=0.1)
    assert max(len(ids) for ids in task.train.ids) == 15


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"body": "a", "label": 1}], {}, "--text-column 'text' is no column of .*; it has body, label"),
        ([{"text": "a", "class": 1}], {}, "--label-column 'label' is no column of .*; it has text, class"),
        ([{"text": 3, "label": 1}], {}, "--text-column 'text' must hold text; row 0 of .* holds int"),
        ([{"text": "a", "label": 0}, {"text": " \n", "label": 1}], {}, "holds no text in row 1 of"),
        ([{"text": "a", "label": 1.5}] * 2, {}, "must hold whole numbers or names; row 0 of .* holds float"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": None}], {}, "'label' holds no label in row 1 of"),
        ([{"text": "a", "label": True}] * 2, {}, "must hold whole numbers or names; row 0 of .* holds bool"),
        ([{"text": "a", "label": [1]}] * 2, {}, "must hold whole numbers or names; row 0 of .* holds list"),
        (
            [{"text": "a", "label": 1}, {"text": "b", "label": 1}],
            {},
            r"two classes or more; the training examples have \[1\]",
        ),
        ([{"text": "a", "label": 1}] * 3, {}, r"1 different text\(s\): too few"),
    ],
)
def test_tables_that_do_not_fit_are_refused(rows, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        classification(jsonl(tmp_path / "a.jsonl", rows), **settings)


def test_a_label_that_was_never_trained_on_is_out_of_range(tmp_path):
    judged = jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": "maybe"}])
    with pytest.raises(ValueError, match=r"label 'maybe' of a held-out example is no class .*: no, yes"):
        classification(jsonl(tmp_path / "a.jsonl", LABELLED), validation=judged)


def test_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ValueError, match=r"--dataset .*nowhere.csv .*no such file"):
        classification(str(tmp_path / "nowhere.csv"))
    with pytest.raises(ValueError, match=r"--validation .*nowhere.csv .*no such file"):
        classification(jsonl(tmp_path / "a.jsonl", LABELLED), validation=str(tmp_path / "nowhere.csv"))
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"--dataset .*empty.jsonl"):
        classification(str(tmp_path / "empty.jsonl"))


def test_what_is_set_aside_is_random_fixed_and_disjoint():
    train, judged = set_aside(list(range(100)), 0.1, 0, str)
    assert len(judged) == 10
    assert sorted(train + judged) == list(range(100))
    assert judged == set_aside(list(range(100)), 0.1, 0, str)[1] != set_aside(list(range(100)), 0.1, 1, str)[1]
    assert max(judged) - min(judged) > 40
    assert [len(part) for part in set_aside([1, 2], 0.9, 0, str)] == [1, 1]


def test_one_text_is_never_on_both_sides():
    examples = [(number % 10, number) for number in range(100)]
    train, judged = set_aside(examples, 0.2, 0, lambda example: str(example[0]))
    assert len(judged) == 20
    assert not {text for text, _ in train} & {text for text, _ in judged}


def test_splits_are_files_and_no_file_is_another_split(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, count in (("train", 20), ("test", 6)):
        jsonl(folder / f"{name}.jsonl", [{"text": f"{name} {n}", "label": n % 2} for n in range(count)])
    task = classification(str(folder), validation_split="test")
    assert (len(task.train), len(task.held_out)) == (20, 6)
    with pytest.raises(ValueError, match="its files are the splits test, train"):
        classification(str(folder), validation_split="validation")
    with pytest.raises(ValueError, match="a file is all 'train'"):
        classification(str(folder / "train.jsonl"), validation_split="test")
    with pytest.raises(ValueError, match="is what is trained on: nothing would be judged"):
        classification(str(folder / "train.jsonl"), validation=str(folder / "train.jsonl"))
    (tmp_path / "a.json").write_text(json.dumps(squad(("Which river?", [("Nile", 4)]))))
    with pytest.raises(ValueError, match="a file is all 'train'"):
        load_questions(str(tmp_path / "a.json"), "dev")


def test_impossible_questions_have_no_answer(tmp_path):
    content = squad(("Who?", [("Nile", 4)]))
    content["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"] = True
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(content))
    assert read_questions(load_questions(str(tmp_path / "a.json"), "train"), "a")[0].answers == ()


def test_answers_may_be_as_long_as_the_longest_trained_on(tmp_path):
    rows = [question(), question("Where?", CONTEXT[4:20], 4)]
    task = answers(jsonl(tmp_path / "a.jsonl", rows))
    assert task.max_answer_tokens == 16 == task.dictated_fields()["answer_lengths"]["max_answer_len"]
    with pytest.raises(ValueError, match=r"max_answer_tokens must be at least 16, .*; got 15"):
        answers(jsonl(tmp_path / "a.jsonl", rows), max_answer_tokens=15)


# --- questions --------------------------------------------------------------------------------------------------------


def test_squad_files_and_tables_hold_the_same_questions(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(squad(("Which river?", [("Nile", 4)]), ("Who?", []))))
    nested = read_questions(load_questions(str(tmp_path / "a.json"), "train"), "a")
    rows = [question(), {"question": "Who?", "context": CONTEXT, "answers": {"text": [], "answer_start": []}}]
    flat = read_questions(load_questions(jsonl(tmp_path / "b.jsonl", rows), "train"), "b")
    for a, b in zip(nested, flat, strict=True):
        assert (a.question, a.context, a.answers, a.starts) == (b.question, b.context, b.answers, b.starts)
    assert nested[0].answers == ("Nile",)
    assert nested[1].answers == ()


def test_windows_point_at_the_answer_in_the_text(tmp_path):
    wanted = "along the Nile"
    rows = [question("Where?", wanted, CONTEXT.index(wanted)), question()] * 2
    task = answers(jsonl(tmp_path / "a.jsonl", rows), seq_len=40, doc_stride=12)
    pieces = [piece for piece in task.train.pieces if piece.span != (0, 0)]
    assert {len(piece.ids) for piece in task.train.pieces} <= set(range(1, 41))
    assert len(task.train.pieces) > len(pieces) >= 2
    for piece in pieces:
        first, last = piece.span
        text = bytes(piece.ids[first : last + 1].astype(np.uint8) - 2).decode()
        assert text in ("Nile", wanted)
        assert piece.in_context[first : last + 1].all()
        assert CONTEXT[piece.offsets[first, 0] : piece.offsets[last, 1]] == text


def test_an_answer_that_a_window_cuts_is_not_in_it(tmp_path):
    rows = [question("Where?", CONTEXT[20:45], 20)] * 2
    task = answers(jsonl(tmp_path / "a.jsonl", rows), seq_len=30, doc_stride=4)
    assert all(piece.span == (0, 0) for piece in task.train.pieces)


def test_logits_that_point_at_the_answers_are_judged_right(tmp_path):
    rows = [question(), question("Where?", "north", CONTEXT.index("north"))] * 3
    task = answers(jsonl(tmp_path / "a.jsonl", rows), seq_len=48, doc_stride=16)
    longest = max(len(piece.ids) for piece in task.held_out.pieces)
    logits = np.full((2, len(task.held_out), longest), -9.0, dtype=np.float32)
    for number, piece in enumerate(task.held_out.pieces):
        for side in (0, 1):
            logits[side, number, piece.span[side]] = 9.0
    assert task.judge(tuple(logits), None) == {"exact_match": 1.0, "f1": 1.0}
    wrong = task.judge(tuple(np.zeros_like(logits)), None)
    assert wrong["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "Who?", "context": CONTEXT}, "must have the columns question, context and answers"),
        (question(text=" "), "question must be a text that is not empty"),
        (question(context=""), "context must be a text that is not empty"),
        (question(start=5), "answer 'Nile' does not stand at answer_start 5 of .*: there is 'ile '"),
        (question(answer=""), "answer '' does not stand"),
        (question(start=10_000), "does not stand at answer_start 10000"),
        ({**question(), "answers": {"text": ["Nile"], "answer_start": [4, 5]}}, "as many texts as starts"),
        ({**question(), "answers": "Nile"}, "answers must hold text and answer_start"),
        ({**question(), "answers": {"text": "Nile", "answer_start": 4}}, "answers must hold lists"),
        (question(start="4"), "an answer must be a text with a whole number"),
        (question(start=-62), "an answer must be a text with a whole number"),
        (question(answer=" ", start=3), "answer ' ' does not stand"),
    ],
)
def test_questions_that_do_not_fit_are_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        answers(jsonl(tmp_path / "a.jsonl", [row, row]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [{"title": "x"}]}', "is not SQuAD-style: data must hold paragraphs"),
        ('{"data": [1]}', "is not SQuAD-style"),
        ('{"data": [{"paragraphs": [{"qas": [{"question": "x"}]}]}]}', "is not SQuAD-style"),
        ('{"data": ', "is no JSON"),
        ('{"data": []}', "no example to train on"),
        ('{"data": {"paragraphs": []}}', "data must be a list, got dict"),
        ('{"data": null}', "data must be a list, got NoneType"),
    ],
)
def test_squad_files_that_are_none_are_refused(content, message, tmp_path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        answers(str(tmp_path / "a.json"))


def test_windows_need_room(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [question()] * 3)
    with pytest.raises(ValueError, match=r"seq_len 20 leaves 8 tokens beside the question .*doc_stride 8"):
        answers(path, seq_len=20, doc_stride=8)


@pytest.mark.parametrize("name", ["classify", "qa"])
def test_examples_are_asked_for(name):
    with pytest.raises(ValueError, match="no examples to train on: give --dataset"):
        TASKS[name].settings_class(output="x", max_steps=1).check_complete()
    with pytest.raises(ValueError, match="--held-out and --validation contradict"):
        TASKS[name].settings_class(output="x", max_steps=1, dataset="a", validation="b", held_out=0.3).check_complete()
