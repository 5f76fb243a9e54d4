"""Extractive question answering as a pipeline: a question and a text in, a piece of the text out.

transformers has dropped its pipeline for this task. This one takes the same calls and gives the same answers' format.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.pipelines.base import ChunkPipeline

from flash_reformer.models.answer_spans import Window, find_spans

#: The name under which ``pipeline(...)`` finds it.
QUESTION_ANSWERING = "extractive-question-answering"
_FIELDS = ("question", "context")
#: Window of a model that does not say how many positions it has.
_WINDOW = 384


def check_vocabulary(tokenizer: Any, model: Any) -> None:
    """Raise ``ValueError`` if the tokenizer has entries that the model has no embedding for."""
    entries, vocab_size = len(tokenizer), model.config.vocab_size
    if entries > vocab_size:
        raise ValueError(
            f"the tokenizer has {entries} entries, but the model's vocab_size is {vocab_size}: use the tokenizer that "
            "the model was trained with, or call model.resize_token_embeddings(len(tokenizer))"
        )


class QuestionAnsweringPipeline(ChunkPipeline):
    """Find the answer to a question in a text; ``pipeline("extractive-question-answering", model=folder)``.

    Texts longer than ``max_seq_len`` are read in overlapping windows. Windows of one length share a forward, windows
    of different lengths do not, so no answer depends on ``batch_size``.

    Example::

        answerer = pipeline("extractive-question-answering", model=folder)
        answerer(question="Who wrote it?", context="It was written by Fyodor Dostoevsky.")
        # {'score': 0.98, 'start': 18, 'end': 35, 'answer': 'Fyodor Dostoevsky'}
    """

    # transformers declares these as None.
    default_input_names: Any = "question,context"
    tokenizer: Any
    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(self, model: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if tokenizer is None:
            raise ValueError("tokenizer must be given: a model alone cannot read text")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "tokenizer must tell where in the text each token stands, which ReformerTokenizerFast and "
                f"ReformerByteTokenizer do; got {type(tokenizer).__name__}"
            )
        check_vocabulary(tokenizer, model)
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer one or several questions.

        Args:
            *args: dicts with ``question`` and ``context``, or one list, dataset or generator of them.
            question, context: in place of the dicts, one text each, or lists of the same length; a list of questions
                may also share one context.
            top_k: answers per question.
            doc_stride: tokens that neighbouring windows share; min(128, max_seq_len // 2) by default.
            max_answer_len: tokens of an answer at most; 15 by default. Of a byte tokenizer, tokens are bytes.
            max_seq_len: tokens of a window at most. By default what tokenizer and model can take.
            max_question_len: tokens of the question that are read; 64 by default.
            handle_impossible_answer: let "no answer" compete: an answer of score, 0, 0 and "".
            align_to_words: widen answers to whole words; True by default.
            batch_size: windows per forward at most.

        Returns:
            ``{"score", "start", "end", "answer"}`` with ``answer == context[start:end]``, or a list of up to ``top_k``
            of them, the likeliest first, where ``top_k > 1``; for several questions, or a list of more than one, a
            list of that. The score is a probability; ``answer_spans`` says which.

        Raises:
            ValueError, TypeError: for a question or context that is missing, empty or no text, and for numbers that
                do not fit, naming them.
        """
        examples = _examples(args, kwargs)
        if isinstance(examples, list) and len(examples) == 1:
            examples = examples[0]
        return super().__call__(examples, **kwargs)

    def _sanitize_parameters(
        self,
        top_k: int | None = None,
        topk: int | None = None,
        doc_stride: int | None = None,
        max_answer_len: int | None = None,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
        handle_impossible_answer: bool | None = None,
        align_to_words: bool | None = None,
        **unknown: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise TypeError(f"{type(self).__name__} takes no {', '.join(unknown)}")
        if topk is not None:
            warnings.warn("topk is called top_k now", FutureWarning, stacklevel=3)
            top_k = topk if top_k is None else top_k
        numbers = {"doc_stride": doc_stride, "max_seq_len": max_seq_len, "max_question_len": max_question_len}
        for name, number in {**numbers, "top_k": top_k, "max_answer_len": max_answer_len}.items():
            low = 0 if name == "doc_stride" else 1
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < low):
                raise ValueError(f"{name} must be an integer >= {low}; got {number!r}")
        flags = {"handle_impossible_answer": handle_impossible_answer, "align_to_words": align_to_words}
        for name, flag in flags.items():
            if flag is not None and not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False; got {flag!r}")
        limit = self._window_limit()
        if max_seq_len is not None and max_seq_len > limit:
            raise ValueError(f"max_seq_len must be at most {limit}, the model's positions; got {max_seq_len}")
        last = {"top_k": top_k, "max_answer_len": max_answer_len, **flags}
        return (
            {name: number for name, number in numbers.items() if number is not None},
            {},
            {name: value for name, value in last.items() if value is not None},
        )

    @property
    def _lengths(self) -> dict[str, int]:
        """What the model was trained with."""
        return getattr(self.model.config, "answer_lengths", None) or {}

    def _length(self, name: str, asked: int | None, usual: int) -> int:
        return self._lengths.get(name, usual) if asked is None else asked

    def _window_limit(self) -> int:
        return getattr(self.model.config, "max_length_of_positions", _WINDOW)

    def preprocess(  # type: ignore[override]
        self,
        input_: Any,
        doc_stride: int | None = None,
        max_seq_len: int | None = None,
        max_question_len: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yield the windows of one example, each with its tensors ``[1, T]``."""
        example = _checked(input_)
        if max_seq_len is None:
            max_seq_len = min(self.tokenizer.model_max_length, self._window_limit())
        question = self._cut(example["question"], self._length("max_question_len", max_question_len, 64))
        if doc_stride is None and self._lengths.get("doc_stride", max_seq_len) < max_seq_len // 2:
            doc_stride = self._lengths["doc_stride"]
        frame = len(self.tokenizer(question, "").input_ids)
        room = max_seq_len - frame
        if doc_stride is None:
            doc_stride = max(0, min(128, max_seq_len // 2, room - 1))
        if room <= doc_stride:
            raise ValueError(
                f"max_seq_len must leave more than doc_stride={doc_stride} tokens to the context beside the {frame} of "
                f"the question; got {max_seq_len}. Lower doc_stride or max_question_len, or raise max_seq_len"
            )
        encoded = self.tokenizer(
            question,
            example["context"],
            truncation="only_second",
            max_length=max_seq_len,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=True,
        )
        count = len(encoded["input_ids"])
        for index in range(count):
            in_context = torch.tensor([part == 1 for part in encoded.sequence_ids(index)])
            yield {
                "input_ids": torch.tensor(encoded["input_ids"][index]).unsqueeze(0),
                "attention_mask": torch.tensor(encoded["attention_mask"][index]).unsqueeze(0),
                "window": (torch.tensor(encoded["offset_mapping"][index]).view(-1, 2), in_context),
                "context": example["context"],
                "is_last": index == count - 1,
            }

    def _cut(self, question: str, max_question_len: int) -> str:
        """Return as much of the question as makes ``max_question_len`` tokens."""
        read = self.tokenizer(
            question,
            add_special_tokens=False,
            truncation=True,
            max_length=max_question_len,
            return_offsets_mapping=True,
        )
        return question[: read["offset_mapping"][-1][1]] if read["offset_mapping"] else question

    def _forward(self, input_tensors: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        """Run rows of one length together, without their pads: in a padded forward, pads change who sees whom."""
        # A single window comes as it is, a batch in lists.
        single = isinstance(input_tensors["context"], str)
        masks, ids = input_tensors["attention_mask"].bool(), input_tensors["input_ids"]
        lengths = masks.sum(dim=1).tolist()
        logits: list[tuple[Tensor, Tensor]] = [(ids, ids)] * len(lengths)
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            group = torch.stack([ids[row][masks[row]] for row in rows])
            output = self.model(input_ids=group)
            for place, row in enumerate(rows):
                logits[row] = (output.start_logits[place].float(), output.end_logits[place].float())
        others = {name: input_tensors[name] for name in ("window", "context", "is_last")}
        return {"logits": logits[0] if single else logits, **others}

    def postprocess(  # type: ignore[override]
        self,
        model_outputs: list[dict[str, Any]],
        top_k: int = 1,
        max_answer_len: int | None = None,
        handle_impossible_answer: bool = False,
        align_to_words: bool = True,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the answers that all windows of one example give together."""
        windows = [Window(*output["logits"], *output["window"]) for output in model_outputs]
        context = model_outputs[0]["context"]
        spans = find_spans(
            windows,
            context,
            top_k=top_k,
            max_answer_len=self._length("max_answer_len", max_answer_len, 15),
            align_to_words=align_to_words,
            with_none=handle_impossible_answer,
        )
        if not spans:
            raise ValueError(f"context holds nothing that the tokenizer reads: {context[:40]!r}")
        answers = [
            {"score": span.score, "start": span.start, "end": span.end, "answer": context[span.start : span.end]}
            for span in spans
        ]
        return answers if top_k > 1 else answers[0]


def _examples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take the examples out of a call: a list of them, or a dataset or generator as it is."""
    named = {name: kwargs.pop(name) for name in _FIELDS if kwargs.get(name) is not None}
    lists = [kwargs.pop(name) for name in ("data", "X") if kwargs.get(name) is not None]
    given = [*args, *lists]
    if bool(given) == bool(named):
        how = "both" if given else "neither"
        raise ValueError(f"give examples, or question= and context=; got {how}")
    if named:
        return _pair_up(named)
    if len(given) == 1 and isinstance(given[0], (Dataset, GeneratorType)):
        return given[0]
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = list(given[0])
    if not given:
        raise ValueError("examples must not be empty; got an empty list")
    return [_checked(example) for example in given]


def _pair_up(named: dict[str, Any]) -> list[dict[str, str]]:
    for name in _FIELDS:
        if name not in named:
            raise ValueError(f"{name} is missing: give question= and context=")
    question, context = named["question"], named["context"]
    if not isinstance(question, (list, tuple)):
        question = [question]
        if isinstance(context, (list, tuple)):
            raise ValueError(f"question must be a list where context is one; got one question for {len(context)}")
    contexts = context if isinstance(context, (list, tuple)) else [context] * len(question)
    if len(question) != len(contexts):
        raise ValueError(f"question and context must be lists of one length; got {len(question)} and {len(contexts)}")
    if not question:
        raise ValueError("question must not be an empty list")
    return [_checked({"question": q, "context": c}) for q, c in zip(question, contexts, strict=True)]


def _checked(example: Any) -> dict[str, str]:
    """Return question and context of an example, or raise for what is missing, empty or no text."""
    if not isinstance(example, Mapping):
        raise TypeError(f"an example must be a dict with question and context; got {type(example).__name__}")
    for name in _FIELDS:
        text = example.get(name)
        if text is None:
            raise ValueError(f"{name} is missing in an example, which has {', '.join(map(repr, example)) or 'nothing'}")
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a string; got {type(text).__name__}")
        if not text.strip():
            raise ValueError(f"{name} must not be empty; got {text!r}")
    return {name: example[name] for name in _FIELDS}
