"""What a run says about itself while it goes: numbers only, whoever shows them chooses the form."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flash_reformer.training.budget import Budget
from flash_reformer.training.memory import current_memory, peak_memory
from flash_reformer.training.settings import TrainingSettings
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
        memory_now_bytes: memory use at the moment, likewise.
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
    memory_now_bytes: int | None = None


Report = Callable[[Progress], None]


class Speed(TrainerCallback):
    """Times the steps of a `transformers.Trainer`, pauses for evaluations and checkpoints left out.

    Attributes:
        tokens_of: tokens trained on in so many first steps.
        seconds: spent in steps since this process began.
        step: the last one.
    """

    def __init__(self, tokens_of: Callable[[int], float]) -> None:
        self.tokens_of = tokens_of
        self.seconds = 0.0
        self.step = 0
        self._began = 0.0
        self._told = (0.0, 0)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this process takes over."""
        self.step = state.global_step
        self._told = (self.seconds, self.step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the watch."""
        self._began = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop the watch."""
        self.seconds += time.monotonic() - self._began
        self.step = state.global_step

    def since_last_time(self) -> float:
        """Return the tokens per second of the steps since this was asked for; 0 where there were none."""
        seconds, step = self._told
        self._told = (self.seconds, self.step)
        taken = self.seconds - seconds
        return (self.tokens_of(self.step) - self.tokens_of(step)) / taken if taken > 0 else 0.0


def evaluations_left(settings: TrainingSettings, budget: Budget, step: int) -> int:
    """Return how many evaluations follow after ``step`` steps; with an interval, only a number of steps says it."""
    fraction = budget.fraction(step)
    if fraction >= 1.0:
        return 0
    every = settings.eval_interval
    if every is None:
        return settings.EVALUATIONS - int(fraction * settings.EVALUATIONS)
    if budget.max_steps is None:
        return 0
    # The last step ends with one, whether it is its turn or not.
    return math.ceil(budget.max_steps / every) - step // every


class ProgressCallback(TrainerCallback):
    """Tells ``report`` about each step, evaluation and checkpoint of a `transformers.Trainer`."""

    def __init__(
        self,
        report: Report,
        budget: Budget,
        tokens_of: Callable[[int], float],
        measure: Measure,
        settings: TrainingSettings | None = None,
    ) -> None:
        self.settings = settings or TrainingSettings()
        self.report = report
        self.budget = budget
        self.tokens_of = tokens_of
        self.measure = measure
        names = (measure.name, measure.name if measure.training_key == measure.key else measure.training_key)
        self.now = Progress("start", measure=names[0], training_measure=names[1])
        self._first_step = 0
        self._first_seconds = 0.0
        self._step_began = 0.0
        self._busy = 0.0
        self._evaluations = 0

    def _tell(self, event: str, **changes: Any) -> None:
        self.now = replace(
            self.now, event=event, memory_bytes=peak_memory(), memory_now_bytes=current_memory(), **changes
        )
        self.report(self.now)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where this process takes over."""
        self._first_step = state.global_step
        self._first_seconds = self.budget.seconds
        self._tell("start", step=state.global_step, fraction=self.budget.fraction(state.global_step))

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
        self._tell(
            "step",
            step=state.global_step,
            fraction=fraction,
            tokens=tokens,
            tokens_per_second=tokens / self._busy if self._busy > 0 else 0.0,
            seconds_left=self._seconds_left(state.global_step),
        )

    def _seconds_left(self, step: int) -> float:
        """Return the time of the steps to come and of the pauses for evaluations and checkpoints between them."""
        budget = self.budget
        ends = []
        if budget.max_minutes is not None:
            ends.append(max(0.0, 60.0 * budget.max_minutes - budget.seconds))
        if budget.max_steps is not None:
            paused = budget.seconds - self._first_seconds - self._busy
            pauses = evaluations_left(self.settings, budget, step) * paused / max(1, self._evaluations)
            done = step - self._first_step
            ends.append((budget.max_steps - step) * self._busy / done + pauses)
        return min(ends)

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
        self._evaluations += 1
        self._tell("evaluate", held_out=(metrics or {}).get(f"eval_{self.measure.key}", math.nan))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Report a checkpoint."""
        self._tell("save")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report the end."""
        self._tell("end")
