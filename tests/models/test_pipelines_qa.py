"""Extractive question answering: the answer is a piece of the context, its score a probability, wherever it stands."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import pipeline
from transformers.modeling_outputs import QuestionAnsweringModelOutput

import flash_reformer as ours
from flash_reformer.models.answer_spans import Window, find_spans
from tests.models.pipeline_folders import BYTES, LIMIT, make, save

QUESTION = "Who sang?"
CONTEXT = "A tenor sang; the *old* baritone, né Schmidt, listened. " * 4
TASK = "extractive-question-answering"


class Finder(ours.ReformerForQuestionAnswering):
    """Finds what stands between ``<`` and ``>``, byte by byte, and nothing where a window lacks both."""

    seen: list[tuple[int, ...]]

    def forward(self, input_ids: Tensor, **_: Any) -> QuestionAnsweringModelOutput:
        self.seen.append(tuple(input_ids.shape))
        opens, closes = (input_ids == ord(mark) + 2 for mark in "<>")
        starts = 9.0 * opens.roll(1, dims=1).float()
        ends = 9.0 * closes.roll(-1, dims=1).float()
        starts[:, 0] = ends[:, 0] = 5.0
        return QuestionAnsweringModelOutput(start_logits=starts, end_logits=ends)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("answerer"), "ReformerForQuestionAnswering")


@pytest.fixture(scope="module")
def answerer(folder: str) -> Any:
    return pipeline(TASK, model=folder, device="cpu")


@pytest.fixture
def finder() -> Any:
    model = Finder(ours.ReformerConfig(**{**BYTES, "vocab_size": 258}))
    model.seen = []
    return ours.QuestionAnsweringPipeline(model=model, tokenizer=ours.ReformerByteTokenizer(), device="cpu")


@pytest.mark.floor
def test_the_task_is_registered_and_runs_on_a_folder(answerer):
    assert type(answerer) is ours.QuestionAnsweringPipeline
    assert type(answerer.model) is ours.ReformerForQuestionAnswering
    answer = answerer(question=QUESTION, context=CONTEXT)
    assert list(answer) == ["score", "start", "end", "answer"]
    assert type(answer["score"]) is float
    assert 0 < answer["score"] <= 1
    assert answer["answer"] == CONTEXT[answer["start"] : answer["end"]] != ""


def every_pair(model: Any, context: str, windows: list[tuple[int, int]], longest: int) -> dict[tuple[int, int], float]:
    """The definition, pair by pair: windows are byte ranges of an ASCII context behind the question."""
    question = [byte + 2 for byte in QUESTION.encode()]
    weights: dict[tuple[int, int], float] = {}
    total = 0.0
    for first, last in windows:
        ids = [*question, *(byte + 2 for byte in context[first:last].encode())]
        with torch.no_grad():
            out = model(torch.tensor([ids]))
        starts = out.start_logits[0, len(question) :].double().exp().tolist()
        ends = out.end_logits[0, len(question) :].double().exp().tolist()
        total += sum(starts) * sum(ends)
        for i, start in enumerate(starts):
            for j in range(i, min(i + longest, len(ends))):
                if not (context[first + i].isspace() or context[first + j].isspace()):
                    place = (first + i, first + j + 1)
                    weights[place] = weights.get(place, 0.0) + start * ends[j]
    return {place: weight / total for place, weight in weights.items()}


@pytest.mark.parametrize("several", [False, True])
def test_scores_are_those_of_the_definition(several, answerer):
    context = "A tenor sang; the old baritone, a Mr Schmidt, listened."
    windows = [(0, len(context))]
    options: dict[str, Any] = {}
    if several:
        # Windows of 20 bytes that share 7: the next begins 13 bytes on.
        options = {"max_seq_len": 20 + len(QUESTION), "doc_stride": 7}
        windows = [(first, min(first + 20, len(context))) for first in range(0, len(context) - 7, 13)]
    wanted = every_pair(answerer.model, context, windows, 6)
    best = sorted(wanted.items(), key=lambda item: -item[1])[:5]
    answers = answerer(question=QUESTION, context=context, top_k=5, max_answer_len=6, align_to_words=False, **options)
    assert [(answer["start"], answer["end"]) for answer in answers] == [place for place, _ in best]
    assert [answer["score"] for answer in answers] == pytest.approx([score for _, score in best], rel=1e-4)
    assert answers[0]["score"] > 1.05 * answers[-1]["score"]


def test_one_window_scores_as_softmax_of_starts_times_softmax_of_ends():
    generator = torch.Generator().manual_seed(0)
    starts, ends = torch.randn(2, 9, generator=generator)
    context = "abcdefg"
    offsets = torch.tensor([(0, 1), (1, 2), *((i, i + 1) for i in range(7))])
    window = Window(starts, ends, offsets, torch.arange(9) >= 2)
    (span,) = find_spans([window], context, top_k=1, max_answer_len=7, align_to_words=False, with_none=False)
    p, q = starts[2:].softmax(0), ends[2:].softmax(0)
    score, place = max((p[i].item() * q[j].item(), (i, j + 1)) for i in range(7) for j in range(i, 7))
    assert (span.start, span.end) == place
    assert span.score == pytest.approx(score, rel=1e-6)


@pytest.mark.parametrize("place", [0, 1, 57, 300, 1999, 2490])
def test_an_answer_is_found_anywhere_in_a_long_context(place, finder):
    filler = "né " * 900
    context = filler[:place] + "<ünder stone>" + filler[place:2500]
    answer = finder(question=QUESTION, context=context, max_answer_len=20)
    assert answer["answer"] == "ünder stone" == context[answer["start"] : answer["end"]]
    assert answer["start"] == place + 1
    assert answer["score"] > 0.8
    assert len(finder.model.seen) > 10
    assert max(length for _, length in finder.model.seen) == LIMIT


def test_no_answer_depends_on_the_batch(answerer, finder):
    questions = [QUESTION, "And the old one?", "né?"]
    contexts = [CONTEXT, CONTEXT[:31], CONTEXT * 3]
    for pipe in (answerer, finder):
        for side in ("left", "right"):
            pipe.tokenizer.padding_side = side
            one, three = (
                pipe(question=questions, context=contexts, top_k=3, max_seq_len=70, doc_stride=11, batch_size=size)
                for size in (1, 3)
            )
            assert [[{**a, "score": 0} for a in row] for row in one] == [
                [{**a, "score": 0} for a in row] for row in three
            ]
            for row, other in zip(one, three, strict=True):
                assert [a["score"] for a in row] == pytest.approx([a["score"] for a in other], rel=1e-4)
    assert max(rows for rows, _ in finder.model.seen) == 3


class Pairs(Dataset):
    def __init__(self, examples: list[dict[str, str]]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, str]:
        return self.examples[index]


def test_every_way_to_call_it_means_the_same(answerer):
    def example(question: str, context: str = CONTEXT) -> dict[str, str]:
        return {"question": question, "context": context}

    one = answerer(question=QUESTION, context=CONTEXT)
    other = answerer(question="And?", context=CONTEXT[5:])
    assert one != other
    for result in (
        answerer(example(QUESTION)),
        answerer([example(QUESTION)]),
        answerer(data=example(QUESTION)),
        answerer(X=[example(QUESTION)]),
        answerer(question=[QUESTION], context=[CONTEXT]),
        answerer(example(QUESTION), top_k=1),
    ):
        assert result == one
    both = [example(QUESTION), example("And?", CONTEXT[5:])]
    for result in (
        answerer(both),
        answerer(*both),
        answerer(question=[QUESTION, "And?"], context=[CONTEXT, CONTEXT[5:]]),
        list(answerer(Pairs(both))),
        list(answerer(each for each in both)),
    ):
        assert result == [one, other]
    shared = answerer(question=[QUESTION, "And?"], context=CONTEXT)
    assert shared == [one, answerer(question="And?", context=CONTEXT)]
    with pytest.warns(FutureWarning, match="top_k"):
        assert answerer(example(QUESTION), topk=2) == answerer(example(QUESTION), top_k=2)


def test_top_k_answers_are_different_and_in_order(answerer):
    answers = answerer(question=QUESTION, context=CONTEXT, top_k=7)
    assert len({(answer["start"], answer["end"]) for answer in answers}) == 7
    scores = [answer["score"] for answer in answers]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) <= 1
    for answer in answers:
        assert answer["answer"] == CONTEXT[answer["start"] : answer["end"]] == answer["answer"].strip()
    assert answers[0] == answerer(question=QUESTION, context=CONTEXT)
    short = answerer(question=QUESTION, context="no", top_k=7)
    assert [answer["answer"] for answer in short] == ["no"]


def test_answers_are_whole_words_unless_asked_otherwise(finder):
    context = "the l<ong r>oad, né_1 S<chmid>t"
    words = finder(question=QUESTION, context=context, top_k=2)
    # What is between the marks is cut out of the words around it only where letters meet.
    assert {answer["answer"] for answer in words} == {"ong r", "chmid"}
    text = "the long road"
    offsets = torch.tensor([(i, i + 1) for i in range(len(text))])
    starts, ends = torch.zeros(2, len(text))
    starts[5] = ends[9] = 20.0
    window = Window(starts, ends, offsets, torch.ones(len(text), dtype=torch.bool))
    for align, expected in ((True, "long road"), (False, "ong r")):
        (span,) = find_spans([window], text, top_k=1, max_answer_len=9, align_to_words=align, with_none=False)
        assert text[span.start : span.end] == expected


def test_an_answer_is_no_longer_than_asked_for(answerer):
    for longest in (1, 3):
        answers = answerer(question=QUESTION, context=CONTEXT, top_k=9, max_answer_len=longest, align_to_words=False)
        assert max(len(answer["answer"].encode()) for answer in answers) <= max(longest, 2)
        assert {len(answer["answer"]) for answer in answers} <= set(range(1, longest + 1))


def test_no_answer_competes_when_asked_to(finder):
    nothing = {"start": 0, "end": 0, "answer": ""}
    empty = "nothing is marked in here. " * 20
    answer = finder(question=QUESTION, context=empty, handle_impossible_answer=True)
    assert {**answer, "score": None} == {**nothing, "score": None}
    assert finder(question=QUESTION, context=empty)["answer"] != ""
    # All windows have to find nothing: here one of several finds something.
    marked = empty + "<here>"
    best, second = finder(
        question=QUESTION, context=marked, handle_impossible_answer=True, top_k=2, align_to_words=False
    )
    assert best["answer"] == "here"
    assert second["answer"] == ""
    # One window: weights e^18 for the span, e^10 for nothing, and pairs with the other 1 + 1 * 9 tokens.
    short = "<b>"
    best, second = finder(
        question=QUESTION, context=short, handle_impossible_answer=True, top_k=2, align_to_words=False
    )
    total = (math.exp(9) + 2) ** 2 + math.exp(10)
    assert best["score"] == pytest.approx(math.exp(18) / total, rel=1e-6)
    assert (second["answer"], second["score"]) == ("", pytest.approx(math.exp(10) / total, rel=1e-6))


def test_all_windows_have_to_find_nothing():
    """The weight of no answer is that of the window which is least sure of it."""
    offsets = torch.tensor([(0, 0), (0, 1)])
    in_context = torch.tensor([False, True])
    surest, least = (Window(torch.tensor([n, 1.0]), torch.tensor([n, 2.0]), offsets, in_context) for n in (8.0, 0.5))
    for windows in ([surest, least], [least, surest]):
        spans = find_spans(windows, "x", top_k=2, max_answer_len=1, align_to_words=False, with_none=True)
        total = 2 * math.exp(3) + math.exp(1)
        assert [(span.start, span.end) for span in spans] == [(0, 1), (0, 0)]
        assert [span.score for span in spans] == pytest.approx([2 * math.exp(3) / total, math.exp(1) / total])


def test_a_long_question_is_cut(finder):
    finder(question="é" * 100, context="<b>", max_question_len=21)
    # Whole characters of two bytes: the eleventh is begun, so it is read.
    assert finder.model.seen == [(1, 22 + 3)]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ({"context": CONTEXT}, ValueError, "question is missing"),
        ({"question": QUESTION}, ValueError, "context is missing"),
        ({}, ValueError, "give examples, or question= and context=; got neither"),
        ({"data": {"question": QUESTION}}, ValueError, "context is missing in an example, which has 'question'"),
        ({"data": []}, ValueError, "examples must not be empty"),
        ({"data": {"question": "a", "context": "b"}, "question": "c"}, ValueError, "got both"),
        ({"data": "text"}, TypeError, "an example must be a dict with question and context; got str"),
        ({"question": "", "context": CONTEXT}, ValueError, "question must not be empty"),
        ({"question": QUESTION, "context": " \n"}, ValueError, r"context must not be empty; got ' \\n'"),
        ({"question": 3, "context": CONTEXT}, TypeError, "question must be a string; got int"),
        ({"question": [QUESTION], "context": [CONTEXT] * 2}, ValueError, "lists of one length; got 1 and 2"),
        ({"question": QUESTION, "context": [CONTEXT] * 2}, ValueError, "question must be a list"),
        ({"question": [], "context": CONTEXT}, ValueError, "question must not be an empty list"),
        ({"top_k": 0}, ValueError, "top_k must be an integer >= 1; got 0"),
        ({"top_k": 1.0}, ValueError, "top_k must be an integer >= 1"),
        ({"max_answer_len": 0}, ValueError, "max_answer_len must be an integer >= 1; got 0"),
        ({"max_question_len": 0}, ValueError, "max_question_len must be an integer >= 1; got 0"),
        ({"doc_stride": -1}, ValueError, "doc_stride must be an integer >= 0; got -1"),
        ({"max_seq_len": LIMIT + 1}, ValueError, f"max_seq_len must be at most {LIMIT}"),
        ({"max_seq_len": 9}, ValueError, "max_seq_len must leave more than doc_stride=0 tokens .* the 9 of"),
        ({"max_seq_len": 20, "doc_stride": 11}, ValueError, "max_seq_len must leave more than doc_stride=11"),
        ({"align_to_words": 1}, TypeError, "align_to_words must be True or False; got 1"),
        ({"handle_impossible_answer": "yes"}, TypeError, "handle_impossible_answer must be True or False"),
        ({"max_length": 9}, TypeError, "takes no max_length"),
    ],
)
def test_mistakes_are_named(call, error, message, answerer):
    asked = {"question", "context", "data"} & call.keys()
    if call and not asked:
        call = {"question": QUESTION, "context": CONTEXT, **call}
    with pytest.raises(error, match=message):
        answerer(**call)


def test_a_mistake_in_the_middle_of_a_dataset_is_named(answerer):
    results = answerer(each for each in [{"question": QUESTION, "context": CONTEXT}, {"question": QUESTION}])
    with pytest.raises(ValueError, match="context is missing"):
        list(results)


def test_tokenizers_that_do_not_fit_are_named():
    model = make("ReformerForQuestionAnswering")
    larger = ours.ReformerByteTokenizer(additional_special_tokens=["<sep>"])
    with pytest.raises(ValueError, match="the tokenizer has 259 entries, but the model's vocab_size is 258"):
        ours.QuestionAnsweringPipeline(model=model, tokenizer=larger)
    with pytest.raises(ValueError, match="tokenizer must be given"):
        ours.QuestionAnsweringPipeline(model=model)
    with pytest.raises(ValueError, match=r"tokenizer must tell where in the text.*got object"):
        ours.QuestionAnsweringPipeline(model=model, tokenizer=object())


def test_a_saved_pipeline_comes_back_without_foreign_code(answerer, tmp_path):
    answerer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    again = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert again(question=QUESTION, context=CONTEXT) == answerer(question=QUESTION, context=CONTEXT)
