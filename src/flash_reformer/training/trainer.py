"""`transformers.Trainer` with bits per byte, and a schedule that follows a :class:`Budget`."""

from typing import Any, cast

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flash_reformer.training.budget import Budget
from flash_reformer.training.data import PackedBlocks
from flash_reformer.training.settings import TrainingSettings

EVALUATIONS_PER_RUN = 6


class Rhythm(TrainerCallback):
    """Says when to evaluate, to save and to stop."""

    def __init__(self, settings: TrainingSettings, budget: Budget) -> None:
        self.settings = settings
        self.budget = budget
        self._mark = 0

    def _marks(self, step: int) -> int:
        return int(self.budget.fraction(step) * EVALUATIONS_PER_RUN)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and count as done what was done before a resumption."""
        self.budget.start()
        self._mark = self._marks(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the flags that the Trainer acts on."""
        step = state.global_step
        fraction = self.budget.fraction(step)
        mark, self._mark = self._mark, self._marks(step)
        due = self._mark > mark
        evaluate, save = self.settings.eval_interval, self.settings.save_interval
        control.should_evaluate = fraction >= 1.0 or (due if evaluate is None else step % evaluate == 0)
        control.should_save = fraction >= 1.0 or (due if save is None else step % save == 0)
        # A checkpoint carries the log, and the log carries the time spent: see `seconds_spent`.
        control.should_log = control.should_log or control.should_save
        control.should_training_stop = fraction >= 1.0


class BytesTrainer(Trainer):
    """Trains a byte-level language model on packed blocks and judges it in bits per byte."""

    def __init__(self, settings: TrainingSettings, budget: Budget, **kwargs: Any) -> None:
        self.settings = settings
        self.budget = budget
        callbacks = [Rhythm(settings, budget), *kwargs.pop("callbacks", [])]
        use_cache = bool(kwargs["model"].config.use_cache)
        super().__init__(args=training_arguments(settings, use_cache), callbacks=callbacks, **kwargs)
        # It prints every log to stdout, which belongs to whoever calls us.
        self.remove_callback(PrinterCallback)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Ask for the loss alone: no cache is built, and logits are never held for the whole sequence."""
        inputs = {**inputs, "return_logits": False, "use_cache": False}
        return super().compute_loss(model, inputs, *args, **kwargs)

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
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed)
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add bits per byte and the time spent to every entry of the log."""
        logs["seconds"] = round(self.budget.seconds, 3)
        if "loss" in logs:
            logs["bits_per_byte"] = cast(PackedBlocks, self.train_dataset).bits_per_byte(logs["loss"])
        if "eval_loss" in logs:
            logs["eval_bits_per_byte"] = cast(PackedBlocks, self.eval_dataset).bits_per_byte(logs["eval_loss"])
        super().log(logs, *args, **kwargs)


def uses_gpu(settings: TrainingSettings) -> bool:
    """Say whether the run will be on a GPU; refuse a precision that its device does not train in."""
    on_gpu = torch.cuda.is_available() and not settings.cpu
    if settings.precision == "fp16" and not on_gpu:
        raise ValueError("precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    return on_gpu


def training_arguments(settings: TrainingSettings, use_cache: bool) -> TrainingArguments:
    """Say in the Trainer's words what the settings ask for; ``use_cache`` is what the model's config keeps."""
    return TrainingArguments(
        output_dir=settings.output,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=settings.gradient_accumulation,
        # Minutes alone set no number of steps; the Rhythm stops the run long before this one.
        max_steps=settings.max_steps or 10_000_000,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=settings.cpu,
        eval_strategy="no",
        save_strategy="no",
        save_total_limit=settings.save_total_limit,
        logging_steps=settings.log_interval,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        label_names=["labels"],
        remove_unused_columns=False,
        dataloader_pin_memory=uses_gpu(settings),
        disable_tqdm=True,
        use_cache=use_cache,
        report_to="none",
    )


def seconds_spent(state: TrainerState) -> float:
    """Return the seconds that a run had taken when this state was saved."""
    return max((float(entry.get("seconds", 0.0)) for entry in state.log_history), default=0.0)
