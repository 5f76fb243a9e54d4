"""Extractive question answering: the span of a text that answers a question about it."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from flash_reformer.models.answer_spans import Window, find_spans
from flash_reformer.models.modeling_heads import ReformerForQuestionAnswering
from flash_reformer.training.metrics import answer_f1, exact_match
from flash_reformer.training.settings import AnswerSettings
from flash_reformer.training.sources import read_rows
from flash_reformer.training.tasks.examples import read_examples
from flash_reformer.training.tasks.task import Measure, PaddedRows, Task
from flash_reformer.training.vocabulary import Vocabulary


@dataclass(frozen=True)
class Question:
    """A question about a text, with the answers that are accepted; without any the text has none."""

    name: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """One window of tokens: a question and a part of its context.

    Attributes:
        source: number of the question.
        ids: tokens of both.
        offsets: ``[tokens, 2]`` characters within the text that each is of.
        in_context: which tokens are of the context.
        span: first and last token of the answer, or (0, 0) where it is not in this window.
    """

    source: int
    ids: Any
    offsets: Any
    in_context: Any
    span: tuple[int, int]


def load_questions(name: str, split: str, *, flag: str = "--dataset") -> Any:
    """Open SQuAD-style JSON (one object with ``data``), or else any table that ``datasets`` reads."""
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{flag} {name} is no JSON: {error}") from error
        if isinstance(content, dict) and "data" in content:
            if split != "train":
                raise ValueError(f"{flag} {name} (split {split!r}) cannot be read: a file is all 'train'")
            if not isinstance(content["data"], list):
                found = type(content["data"]).__name__
                raise ValueError(f"{name} is not SQuAD-style: data must be a list, got {found}")
            return content["data"]
    return read_rows(name, split, flag=flag)


def read_questions(source: Any, name: str) -> list[Question]:
    """Return the questions of an opened source; ``ValueError`` says where it is not what it must be."""
    if isinstance(source, list):
        rows: Iterable[dict[str, Any]] = _squad_rows(source, name)
    else:
        if not {"question", "context", "answers"} <= set(source.column_names):
            found = ", ".join(source.column_names)
            raise ValueError(f"{name} must have the columns question, context and answers; it has {found}")
        rows = source
    return [_question(row, f"{name}[{row.get('id', place)}]") for place, row in enumerate(rows)]


def _squad_rows(data: list[Any], name: str) -> Iterator[dict[str, Any]]:
    try:
        for article in data:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    # Unanswerable questions may carry answers that are only plausible.
                    answers = [] if question.get("is_impossible") else question.get("answers", [])
                    yield {
                        "id": question.get("id"),
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": {
                            "text": [each["text"] for each in answers],
                            "answer_start": [each["answer_start"] for each in answers],
                        },
                    }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{name} is not SQuAD-style: data must hold paragraphs, they qas and context, these question and "
            f"answers (missing or of another kind: {error})"
        ) from error


def _question(row: dict[str, Any], name: str) -> Question:
    question, context, answers = row["question"], row["context"], row["answers"] or {"text": [], "answer_start": []}
    for part, value in (("question", question), ("context", context)):
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{part} must be a text that is not empty; {name} has {value!r}")
    if not isinstance(answers, dict) or not {"text", "answer_start"} <= set(answers):
        raise ValueError(f"answers must hold text and answer_start; {name} has {answers!r}")
    if not all(isinstance(answers[part], list | tuple) for part in ("text", "answer_start")):
        raise ValueError(f"answers must hold lists as text and answer_start; {name} has {answers!r}")
    texts, starts = tuple(answers["text"]), tuple(answers["answer_start"])
    if len(texts) != len(starts):
        raise ValueError(f"answers must have as many texts as starts; {name} has {len(texts)} and {len(starts)}")
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int) or start < 0:
            raise ValueError(
                f"an answer must be a text with a whole number >= 0 as answer_start; {name} has {text!r} at {start!r}"
            )
        if not text.strip() or context[start : start + len(text)] != text:
            found = context[start : start + len(text)]
            raise ValueError(f"answer {text!r} does not stand at answer_start {start} of {name}: there is {found!r}")
    return Question(name, question, context, texts, starts)


class Pieces(Dataset[dict[str, Tensor]]):
    """Windows as rows."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` ``[T]``, ``start_positions`` and ``end_positions`` ``[]``."""
        piece = self.pieces[index]
        return {
            "input_ids": torch.from_numpy(piece.ids.astype(np.int64)),
            "start_positions": torch.tensor(piece.span[0]),
            "end_positions": torch.tensor(piece.span[1]),
        }


class QuestionAnswering(PaddedRows, Task):
    """Trains :class:`ReformerForQuestionAnswering` on questions with contexts, judged by exact match and F1.

    Long contexts are cut into windows that overlap by ``doc_stride`` tokens. A window without the answer is to point
    at its first token. Answers of evaluations are found as the question answering pipeline finds them.
    """

    name = "qa"
    settings_class = AnswerSettings
    model_class = ReformerForQuestionAnswering
    # The first layer matches equal tokens of question and context, wherever they are: hashing puts them into one
    # bucket, and wide weights make them attend to each other. The others carry the match to the tokens around it.
    model_defaults: ClassVar[dict[str, Any]] = {
        "attn_layers": ["lsh", "local", "local"],
        "hidden_size": 64,
        "num_attention_heads": 2,
        "attention_head_size": 32,
        "feed_forward_size": 128,
        "local_attn_chunk_length": 2,
        "local_num_chunks_after": 1,
        "lsh_attn_chunk_length": 32,
        "lsh_num_chunks_after": 1,
        "num_hashes": 4,
        "initializer_range": 0.1,
        "axial_norm_std": 0.03,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
    }
    measure: ClassVar[Measure] = Measure("exact match", "exact_match", "loss", greater_is_better=True)
    label_names = ("start_positions", "end_positions")
    loss_only = False
    cuts_texts = True
    train: Pieces
    held_out: Pieces

    def __init__(self, settings: AnswerSettings, vocabulary: Vocabulary) -> None:
        super().__init__(settings, vocabulary)
        train, self.questions = read_examples(
            settings, read_questions, lambda question: question.context, load_questions
        )
        self.train = Pieces(self._cut(train))
        self.held_out = Pieces(self._cut(self.questions))
        spans = [piece.span for piece in self.train.pieces]
        longest = max(last - first + 1 for first, last in spans)
        self.max_answer_tokens = longest if settings.max_answer_tokens is None else settings.max_answer_tokens
        if longest > self.max_answer_tokens:
            raise ValueError(
                f"max_answer_tokens must be at least {longest}, the tokens of the longest answer to train on; "
                f"got {self.max_answer_tokens}: longer ones could never be found"
            )
        # What the pipeline takes by default, so that it answers as evaluations do.
        self.answer_lengths = {
            "doc_stride": settings.doc_stride,
            "max_answer_len": self.max_answer_tokens,
            "max_question_len": max(1, settings.seq_len - settings.doc_stride - 1),
        }

    def _cut(self, questions: list[Question]) -> list[Piece]:
        settings, pieces = self.settings, []
        for source, question in enumerate(questions):
            asked = len(self.vocabulary.tokenizer(question.question, verbose=False)["input_ids"])
            if settings.seq_len - asked <= settings.doc_stride:
                raise ValueError(
                    f"seq_len {settings.seq_len} leaves {settings.seq_len - asked} tokens beside the question of "
                    f"{question.name}: too few for windows that share doc_stride {settings.doc_stride}"
                )
            found = self.vocabulary.tokenizer(
                question.question,
                question.context,
                truncation="only_second",
                max_length=settings.seq_len,
                stride=settings.doc_stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
                verbose=False,
            )
            for window, ids in enumerate(found["input_ids"]):
                in_context = np.array([part == 1 for part in found.sequence_ids(window)])
                offsets = np.array(found["offset_mapping"][window], dtype=np.int64)
                span = _find_answer(question, offsets, in_context)
                tokens = np.array(ids, dtype=self.vocabulary.dtype)
                pieces.append(Piece(source, tokens, offsets, in_context, span))
        return pieces

    def dictated_fields(self) -> dict[str, Any]:
        """Return what the vocabulary dictates, and the lengths that the pipeline is to take."""
        return {**super().dictated_fields(), "answer_lengths": self.answer_lengths}

    def check_model(self, model: Any) -> None:
        """Give a loaded model the lengths of this run."""
        super().check_model(model)
        model.config.answer_lengths = self.answer_lengths

    @property
    def tokens_per_row(self) -> float:
        """Mean length of the windows."""
        return float(np.mean([len(piece.ids) for piece in self.train.pieces]))

    def judge(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return exact match and F1 over the held-out questions; ``predictions`` are logits ``[windows, T]`` twice."""
        windows: list[list[Window]] = [[] for _ in self.questions]
        for piece, starts, ends in zip(self.held_out.pieces, *predictions, strict=True):
            length = len(piece.ids)
            windows[piece.source].append(
                Window(
                    torch.from_numpy(starts[:length]),
                    torch.from_numpy(ends[:length]),
                    torch.from_numpy(piece.offsets),
                    torch.from_numpy(piece.in_context),
                )
            )
        with_none = any(not question.answers for question in self.questions)
        matches, overlaps = [], []
        for question, parts in zip(self.questions, windows, strict=True):
            found = find_spans(
                parts,
                question.context,
                top_k=1,
                max_answer_len=self.max_answer_tokens,
                align_to_words=True,
                with_none=with_none,
            )
            answer = question.context[found[0].start : found[0].end] if found else ""
            matches.append(exact_match(answer, question.answers))
            overlaps.append(answer_f1(answer, question.answers))
        return {"exact_match": float(np.mean(matches)), "f1": float(np.mean(overlaps))}

    def finish(self, model: Any, folder: Path) -> tuple[tuple[str, str], dict[str, Path]]:
        """There is nothing more to write."""
        return ("", ""), {}


def _find_answer(question: Question, offsets: Any, in_context: Any) -> tuple[int, int]:
    """Return the first and last token of the first answer, or (0, 0) where it does not wholly stand in the window."""
    if not question.answers:
        return 0, 0
    start, end = question.starts[0], question.starts[0] + len(question.answers[0])
    # Tokens of the context that share a character with the answer.
    touching = np.flatnonzero(in_context & (offsets[:, 0] < end) & (offsets[:, 1] > start))
    places = np.flatnonzero(in_context)
    if not len(touching) or offsets[places[0], 0] > start or offsets[places[-1], 1] < end:
        return 0, 0
    return int(touching[0]), int(touching[-1])
