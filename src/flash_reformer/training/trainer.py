"""`transformers.Trainer` for any :class:`Task`, with a schedule that follows a :class:`Budget`."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from flash_reformer.training.budget import Budget
from flash_reformer.training.run_folder import prune_checkpoints
from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.sharing import gather_rows, share_rows, share_sequences
from flash_reformer.training.tasks import Task

# The Trainer's own rhythm is set to steps, as keeping the best needs; ours ends every run long before this one.
NEVER = 10_000_000


class Rhythm(TrainerCallback):
    """Says when to evaluate, to save and to stop."""

    def __init__(self, settings: TrainingSettings, budget: Budget) -> None:
        self.settings = settings
        self.budget = budget
        self._mark = 0

    def _marks(self, step: int) -> int:
        return int(self.budget.fraction(step) * self.settings.EVALUATIONS)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and count as done what was done before a resumption."""
        self.budget.start()
        self._mark = self._marks(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove old checkpoints."""
        if state.is_world_process_zero:
            prune_checkpoints(Path(self.settings.output), self.settings.save_total_limit, state.best_model_checkpoint)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the flags that the Trainer acts on."""
        step = state.global_step
        fraction = self.budget.fraction(step)
        mark, self._mark = self._mark, self._marks(step)
        due = self._mark > mark
        evaluate, save = self.settings.eval_interval, self.settings.save_interval
        control.should_evaluate = fraction >= 1.0 or (due if evaluate is None else step % evaluate == 0)
        control.should_save = fraction >= 1.0 or (due if save is None else step % save == 0)
        if self.settings.keep == "best" or self.settings.early_stopping is not None:
            # What is best is known after an evaluation, and can be gone back to where a checkpoint was written. And a
            # run that stops early ends with the checkpoint of the evaluation that ended it.
            control.should_save = control.should_save or control.should_evaluate
        # A checkpoint carries the log, and the log carries the time spent: see `seconds_spent`.
        control.should_log = control.should_log or control.should_save
        control.should_training_stop = fraction >= 1.0


class TaskTrainer(Trainer):
    """Trains a model on the data of a task and judges it as the task says."""

    def __init__(self, task: Task, budget: Budget, **kwargs: Any) -> None:
        self.task = task
        self.settings: TrainingSettings = task.settings
        self.budget = budget
        callbacks: list[TrainerCallback] = [Rhythm(self.settings, budget), *kwargs.pop("callbacks", [])]
        if self.settings.early_stopping is not None:
            callbacks.append(EarlyStoppingCallback(self.settings.early_stopping))
        if self.settings.tensorboard:
            callbacks.append(_tensorboard(self.settings.output))
        use_cache = bool(kwargs["model"].config.use_cache)
        super().__init__(
            args=training_arguments(task, use_cache),
            callbacks=callbacks,
            train_dataset=task.train,
            eval_dataset=task.held_out,
            data_collator=task.collate,
            compute_metrics=None if task.loss_only else self._judge,
            preprocess_logits_for_metrics=task.reduce,
            **kwargs,
        )
        share_sequences(cast(torch.nn.Module, self.model), self.settings.sequence_parallel)
        # It prints every log to stdout, which belongs to whoever calls us.
        self.remove_callback(PrinterCallback)

    def _judge(self, outcome: EvalPrediction) -> dict[str, float]:
        return self.task.judge(outcome.predictions, outcome.label_ids)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Give the model what the task makes of a batch."""
        inputs = self.task.model_inputs(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Give ranks that share sequences the same rows."""
        return share_rows(super().get_train_dataloader(), self.settings.sequence_parallel)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Give ranks that share sequences the same rows."""
        return share_rows(super().get_eval_dataloader(eval_dataset), self.settings.sequence_parallel)

    def _gather_rows(self, data: Any) -> Any:
        return gather_rows(data, self.settings.sequence_parallel, self.accelerator.gradient_state)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Let the learning rate follow the budget."""
        if self.lr_scheduler is None:
            settings, budget = self.settings, self.budget

            def factor(step: int) -> float:
                return budget.learning_rate(
                    step, warmup_steps=settings.warmup_steps, final=settings.final_learning_rate
                )

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or cast(torch.optim.Optimizer, self.optimizer), factor
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, on whichever rank saves, with the bucket count of the longest input of all ranks."""
        self.accelerator.unwrap_model(self.model).share_trained_buckets()
        super().save_model(output_dir, _internal_call)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the same random rotations each time, and without moving the generator that training uses."""
        if self.settings.sequence_parallel > 1:
            self.gather_function = self._gather_rows
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed)
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the task's measures and the time spent to every entry of the log."""
        if not math.isfinite(logs.get("loss", 0.0)):
            raise ValueError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: training has diverged; "
                f"learning_rate {self.settings.learning_rate} is too high, or precision too low"
            )
        logs["seconds"] = round(self.budget.seconds, 3)
        self.task.add_to_log(logs)
        super().log(logs, *args, **kwargs)


def _tensorboard(output: str) -> TrainerCallback:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs the package `tensorboard`: pip install tensorboard") from error
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(tb_writer=SummaryWriter(str(Path(output) / "tensorboard")))


def uses_gpu(settings: TrainingSettings) -> bool:
    """Say whether the run will be on a GPU; refuse a precision that its device does not train in."""
    on_gpu = torch.cuda.is_available() and not settings.cpu
    if settings.precision == "fp16" and not on_gpu:
        raise ValueError("precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    return on_gpu


def training_arguments(task: Task, use_cache: bool) -> TrainingArguments:
    """Say in the Trainer's words what the settings ask for; ``use_cache`` is what the model's config keeps."""
    settings: TrainingSettings = task.settings
    return TrainingArguments(
        output_dir=settings.output,
        per_device_train_batch_size=settings.batch_size,
        # Blocks of text are long; texts of their own are evaluated as they are trained on.
        per_device_eval_batch_size=1 if task.loss_only else settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        # Minutes alone set no number of steps; the Rhythm stops the run long before this one.
        max_steps=settings.max_steps or NEVER,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=settings.cpu,
        eval_strategy="steps",
        eval_steps=NEVER,
        save_strategy="steps",
        save_steps=NEVER,
        load_best_model_at_end=settings.keep == "best",
        metric_for_best_model=f"eval_{task.measure.key}",
        greater_is_better=task.measure.greater_is_better,
        # Removing old checkpoints is the Rhythm's.
        save_total_limit=None,
        logging_steps=settings.log_interval,
        logging_nan_inf_filter=False,
        prediction_loss_only=task.loss_only,
        label_names=list(task.label_names),
        remove_unused_columns=False,
        dataloader_pin_memory=uses_gpu(settings),
        disable_tqdm=True,
        use_cache=use_cache,
        report_to="none",
    )


def seconds_spent(state: TrainerState) -> float:
    """Return the seconds that a run had taken when this state was saved."""
    return max((float(entry.get("seconds", 0.0)) for entry in state.log_history), default=0.0)
