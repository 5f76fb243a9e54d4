"""Sequence classification: one class for a whole text."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset

from flash_reformer.models.modeling_heads import ReformerForSequenceClassification
from flash_reformer.training.metrics import accuracy, macro_f1
from flash_reformer.training.settings import ClassificationSettings
from flash_reformer.training.sources import check_columns, check_text
from flash_reformer.training.tasks.examples import read_examples
from flash_reformer.training.tasks.task import Measure, PaddedRows, Task
from flash_reformer.training.vocabulary import Vocabulary


class LabelledTexts(Dataset[dict[str, torch.Tensor]]):
    """Tokens and classes of texts; ``ids`` as arrays of 2 or 4 bytes per token."""

    def __init__(self, ids: Sequence[Any], labels: Sequence[int]) -> None:
        self.ids = ids
        self.labels = labels

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return ``input_ids`` ``[T]`` and ``labels`` ``[]``."""
        ids = torch.from_numpy(self.ids[index].astype(np.int64))
        return {"input_ids": ids, "labels": torch.tensor(self.labels[index])}


class SequenceClassification(PaddedRows, Task):
    """Trains :class:`ReformerForSequenceClassification` on texts with classes, judged by accuracy and macro F1."""

    name = "classify"
    settings_class = ClassificationSettings
    model_class = ReformerForSequenceClassification
    # Narrow local windows make features of neighbouring tokens without having to learn distances first; the maximum
    # over positions finds one telling place among thousands. Position tables and attention start small, and dropout
    # is off, since noise in single positions is what a maximum picks up.
    model_defaults: ClassVar[dict[str, Any]] = {
        "attn_layers": ["local", "local", "lsh"],
        "hidden_size": 128,
        "num_attention_heads": 4,
        "attention_head_size": 32,
        "feed_forward_size": 256,
        "local_attn_chunk_length": 1,
        "local_num_chunks_after": 1,
        "lsh_attn_chunk_length": 64,
        "lsh_num_chunks_after": 1,
        "initializer_range": 0.03,
        "axial_norm_std": 0.005,
        "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "classifier_pooling": "max",
    }
    measure: ClassVar[Measure] = Measure("accuracy", "accuracy", "loss", greater_is_better=True)
    loss_only = False
    cuts_texts = True

    def __init__(self, settings: ClassificationSettings, vocabulary: Vocabulary) -> None:
        super().__init__(settings, vocabulary)
        train, held_out = read_examples(settings, self._read, lambda example: example[0])
        # A class whose examples were all set aside is still a class; one of a named validation alone is a mistake.
        named = settings.validation is not None or settings.validation_split is not None
        self.classes = _classes([label for _, label in (train if named else [*train, *held_out])])
        self.train = self._encode(train, "training")
        self.held_out = self._encode(held_out, "held-out")

    def _read(self, rows: Any, name: str) -> list[tuple[str, Any]]:
        settings = self.settings
        check_columns(rows, name, text_column=settings.text_column, label_column=settings.label_column)
        feature = rows.features[settings.label_column]
        names = getattr(feature, "names", None)
        labels = rows[settings.label_column]
        for index, label in enumerate(labels):
            # A number that a table lacks becomes NaN, and the column's whole numbers become fractions.
            if label is None or label != label:
                raise ValueError(f"--label-column {settings.label_column!r} holds no label in row {index} of {name}")
        found = []
        for index, (text, label) in enumerate(zip(rows[settings.text_column], labels, strict=True)):
            place = f"row {index} of {name}"
            if not check_text(text, "text_column", settings.text_column, place).strip():
                raise ValueError(f"--text-column {settings.text_column!r} holds no text in {place}")
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise ValueError(
                    f"--label-column {settings.label_column!r} must hold whole numbers or names; "
                    f"{place} holds {type(label).__name__}"
                )
            if names is not None and isinstance(label, int):
                if not 0 <= label < len(names):
                    raise ValueError(
                        f"--label-column {settings.label_column!r} must lie in 0..{len(names) - 1}; "
                        f"{place} holds {label}"
                    )
                label = names[label]
            found.append((text, label))
        return found

    def _encode(self, examples: list[tuple[str, Any]], kind: str) -> LabelledTexts:
        limit, cut = self.settings.seq_len, 0
        ids, labels = [], []
        number = {label: place for place, label in enumerate(self.classes)}
        tokenizer = self.vocabulary.tokenizer
        for text, label in examples:
            if label not in number:
                known = ", ".join(map(str, self.classes))
                raise ValueError(f"label {label!r} of a {kind} example is no class of the training examples: {known}")
            # As the pipeline encodes it.
            tokens = np.array(tokenizer(text, verbose=False)["input_ids"], dtype=self.vocabulary.dtype)
            cut += len(tokens) > limit
            ids.append(tokens[:limit])
            labels.append(number[label])
        if cut:
            warnings.warn(
                f"{cut} of {len(ids)} {kind} texts are longer than seq_len {limit} tokens: their ends are cut off",
                stacklevel=2,
            )
        return LabelledTexts(ids, labels)

    def dictated_fields(self) -> dict[str, Any]:
        """Return what vocabulary and classes dictate."""
        names = [str(each) for each in self.classes]
        return {
            **super().dictated_fields(),
            "id2label": dict(enumerate(names)),
            "label2id": {name: place for place, name in enumerate(names)},
            "problem_type": "single_label_classification",
        }

    def loading_fields(self, architecture: str) -> dict[str, Any]:
        """Give a model that has no head yet one for these classes, and the recipe's pooling."""
        if architecture == self.model_class.__name__:
            return {}
        labels = {name: self.dictated_fields()[name] for name in ("id2label", "label2id", "problem_type")}
        return {**labels, "classifier_pooling": self.model_defaults["classifier_pooling"]}

    def check_model(self, model: Any) -> None:
        """Give a loaded model the classes; one with as many outputs keeps its head."""
        super().check_model(model)
        if model.config.num_labels != len(self.classes):
            raise ValueError(
                f"the data has {len(self.classes)} classes, but init_from {self.settings.init_from} has a head of "
                f"{model.config.num_labels}"
            )
        for name in ("id2label", "label2id"):
            setattr(model.config, name, self.dictated_fields()[name])

    @property
    def tokens_per_row(self) -> float:
        """Mean length of the texts."""
        return float(np.mean([len(ids) for ids in self.train.ids]))  # type: ignore[attr-defined]

    @staticmethod
    def reduce(logits: Any, labels: Any) -> torch.Tensor:
        """Keep the likeliest class."""
        return logits.argmax(dim=-1)

    def judge(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return accuracy and macro F1."""
        return {"accuracy": accuracy(predictions, labels), "f1": macro_f1(predictions, labels)}

    def finish(self, model: Any, folder: Path) -> tuple[tuple[str, str], dict[str, Path]]:
        """There is nothing more to write."""
        return ("", ""), {}


def _classes(labels: list[Any]) -> list[Any]:
    """Return the classes in order; ``ValueError`` unless there are two or more, all of one kind."""
    kinds = {type(label) for label in labels}
    if len(kinds) > 1:
        raise ValueError("labels must be all whole numbers or all names; the training examples have both")
    classes = sorted(set(labels))
    if len(classes) < 2:
        raise ValueError(f"a classifier needs two classes or more; the training examples have {classes!r}")
    return classes
