"""What a training task is: the one thing that recipes, trainer and command line ask about."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.stream_blocks import BlockStream
from flash_reformer.training.vocabulary import Vocabulary

Rows = Dataset[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Measure:
    """The number that says how good a model is.

    Attributes:
        name: as people say it.
        key: its key in the Trainer's log, ``eval_`` in front for held-out data.
        training_key: the key of what the training batches say: the same, or the loss.
        greater_is_better: which way is up.
    """

    name: str
    key: str
    training_key: str
    greater_is_better: bool


class Task(ABC):
    """A kind of training. Making one reads its data and refuses what is wrong with it, before anything is written.

    Attributes:
        name: what the command line calls it.
        settings_class: what may be asked for.
        model_class: what is trained.
        model_defaults: sizes of a fresh model, where they are not asked for.
        measure: what the run is judged by.
        label_names: what a row holds that is an answer.
        loss_only: whether evaluation asks for nothing but the loss.
        cuts_texts: whether a row is a text of its own, cut to ``seq_len`` where it is longer.
        draws: whether the model's inputs are drawn at random from a batch.
        train, held_out: the data.
    """

    name: ClassVar[str]
    settings_class: ClassVar[type[TrainingSettings]]
    model_class: ClassVar[Any]
    model_defaults: ClassVar[Mapping[str, Any]] = {}
    measure: ClassVar[Measure]
    label_names: ClassVar[Sequence[str]] = ("labels",)
    loss_only: ClassVar[bool] = True
    cuts_texts: ClassVar[bool] = False
    draws: ClassVar[bool] = False

    train: Rows | BlockStream
    held_out: Rows

    def __init__(self, settings: Any, vocabulary: Vocabulary) -> None:
        self.settings = settings
        self.vocabulary = vocabulary

    def dictated_fields(self) -> dict[str, Any]:
        """Return the fields of the model's configuration that the task and its data leave no choice about."""
        return {
            "vocab_size": self.vocabulary.size,
            "pad_token_id": self.vocabulary.pad_id,
            "eos_token_id": self.vocabulary.eos_id,
        }

    def loading_fields(self, architecture: str) -> dict[str, Any]:
        """Return what the configuration of a saved model must become; ``architecture`` is the class that saved it."""
        return {}

    def check_model(self, model: Any) -> None:
        """Refuse a loaded model that does not fit the task's data."""
        config = model.config
        if self.settings.tokenizer is not None and config.vocab_size > self.vocabulary.size:
            raise ValueError(
                f"tokenizer {self.vocabulary.name} has {self.vocabulary.size} ids, but init_from "
                f"{self.settings.init_from} has a vocab_size of {config.vocab_size}: it was trained with another"
            )
        if config.vocab_size < self.vocabulary.size:
            raise ValueError(
                f"tokenizer {self.vocabulary.name} has ids up to {self.vocabulary.size - 1}, but init_from "
                f"{self.settings.init_from} has a vocab_size of {config.vocab_size}"
            )

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a training row, on average, for the report of speed."""
        return float(self.settings.seq_len)

    def tokens_of(self, steps: int) -> float:
        """Tokens that a process trains on in its first ``steps`` steps."""
        return steps * self.settings.batch_size * self.settings.gradient_accumulation * self.tokens_per_row

    @property
    def rows_per_pass(self) -> int:
        """Training rows in a pass over the data."""
        return len(self.train)  # type: ignore[arg-type]

    @property
    def stream(self) -> BlockStream | None:
        """The training data where it is made as training goes."""
        return self.train if isinstance(self.train, BlockStream) else None

    def warn(self) -> None:
        """Warn of data that is less than what was asked for."""
        return

    def prepare_evaluation(self, steps: int) -> None:
        """Set ``held_out`` to what is judged after ``steps`` steps; for most tasks that never changes."""
        return

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Make a batch of rows of one length."""
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def model_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return what the model's forward gets of a batch."""
        return inputs

    #: Turns the logits of an evaluation batch into what :meth:`judge` needs of them.
    reduce: Callable[[Any, Any], Any] | None = None

    def judge(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Return measures from all held-out predictions, without ``eval_`` in front."""
        return {}

    def add_to_log(self, logs: dict[str, float]) -> None:
        """Add measures that follow from a loss to an entry of the log; most tasks have none."""
        return

    @abstractmethod
    def finish(self, model: Any, folder: Path) -> tuple[tuple[str, str], dict[str, Path]]:
        """Write what comes after training; return a sample (prompt and continuation, may be empty) and paths."""


class PaddedRows:
    """Makes batches of rows of different lengths; shared by tasks whose rows are texts of their own."""

    vocabulary: Vocabulary

    def collate(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pad on the right, masked; numbers become ``[B]``."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self.vocabulary.pad_id, dtype=torch.int64)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for place, row in enumerate(rows):
            ids[place, : len(row["input_ids"])] = row["input_ids"]
            mask[place, : len(row["input_ids"])] = 1
        others = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != "input_ids"}
        batch = {"input_ids": ids, **others}
        # A mask of ones would change nothing but the way that LSH layers count buckets.
        return batch if bool(mask.all()) else {**batch, "attention_mask": mask}
