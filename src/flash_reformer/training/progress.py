"""What a run says about itself while it goes: numbers only, whoever shows them chooses the form."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flash_reformer.training.budget import Budget
from flash_reformer.training.tasks import Measure


@dataclass(frozen=True)
class Progress:
    """A moment of a run.

    Attributes:
        event: "start", "step", "evaluate", "save" or "end".
        step: optimizer steps done.
        fraction: part of the run that is done.
        tokens: tokens trained on since this process started.
        tokens_per_second: training speed, pauses for evaluation left out.
        seconds_left: estimate of the time to the end, or None before there is one.
        measure: what the task is judged by, in words.
        training_measure: what is measured in training: the same, or the loss.
        training: its value over the last batches trained on, or None.
        held_out: the measure at the last evaluation, or None.
        memory_bytes: highest memory use so far, of the process or of the GPU, or None where it is unknown.
    """

    event: str
    step: int = 0
    fraction: float = 0.0
    tokens: int = 0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    measure: str = ""
    training_measure: str = ""
    training: float | None = None
    held_out: float | None = None
    memory_bytes: int | None = None


Report = Callable[[Progress], None]


def peak_memory() -> int | None:
    """Return the highest memory use so far in bytes: of the GPU where one is used, else of this process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # not there on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class ProgressCallback(TrainerCallback):
    """Tells ``report`` about each step, evaluation and checkpoint of a `transformers.Trainer`."""

    def __init__(self, report: Report, budget: Budget, tokens_of: Callable[[int], float], measure: Measure) -> None:
        self.report = report
        self.budget = budget
        self.tokens_of = tokens_of
        self.measure = measure
        names = (measure.name, measure.name if measure.training_key == measure.key else measure.training_key)
        self.now = Progress("start", measure=names[0], training_measure=names[1])
        self._first_step = 0
        self._first_fraction = 0.0
        self._first_seconds = 0.0
        self._step_began = 0.0
        self._busy = 0.0

    def _tell(self, event: str, **changes: Any) -> None:
        self.now = replace(self.now, event=event, memory_bytes=peak_memory(), **changes)
        self.report(self.now)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this process takes over."""
        self._first_step = state.global_step
        self._first_seconds = self.budget.seconds
        self._first_fraction = self.budget.fraction(state.global_step)
        self._tell("start", step=state.global_step, fraction=self._first_fraction)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the watch."""
        self._step_began = self.budget.seconds

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report speed and time left."""
        self._busy += self.budget.seconds - self._step_began
        tokens = round(self.tokens_of(state.global_step) - self.tokens_of(self._first_step))
        fraction = self.budget.fraction(state.global_step)
        gained = fraction - self._first_fraction
        spent = self.budget.seconds - self._first_seconds
        self._tell(
            "step",
            step=state.global_step,
            fraction=fraction,
            tokens=tokens,
            tokens_per_second=tokens / self._busy if self._busy > 0 else 0.0,
            seconds_left=spent / gained * (1.0 - fraction) if gained > 0 else None,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Pick up the loss of the last batches."""
        if logs and self.measure.training_key in logs:
            self.now = replace(self.now, training=logs[self.measure.training_key])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report what the held-out text says."""
        self._tell("evaluate", held_out=(metrics or {}).get(f"eval_{self.measure.key}", math.nan))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report a checkpoint."""
        self._tell("save")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the end."""
        self._tell("end")
