"""`transformers.Trainer` for any :class:`Task`, with a schedule that follows a :class:`Budget`."""

import functools
import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from flash_reformer.training import ranks
from flash_reformer.training.budget import Budget
from flash_reformer.training.checkpoints import prune_checkpoints
from flash_reformer.training.lengths import GrowingPositions, StreamPosition
from flash_reformer.training.memory import current_memory, peak_memory
from flash_reformer.training.progress import Speed
from flash_reformer.training.safety import SafeTrainer
from flash_reformer.training.settings import TrainingSettings
from flash_reformer.training.sharding import fsdp_config, leave_head_to_root, use_fsdp
from flash_reformer.training.sharing import as_drawn_by_first, gather_rows, replicas, share_rows, share_sequences
from flash_reformer.training.signals import StopRequest
from flash_reformer.training.tasks import Task

# The Trainer's own rhythm is set to steps, as keeping the best needs; ours ends every run long before this one.
NEVER = 10_000_000


class Rhythm(TrainerCallback):
    """Says when to evaluate, to save and to stop.

    Attributes:
        terminated: the run was told to stop before its end.
    """

    def __init__(self, settings: TrainingSettings, budget: Budget, request: StopRequest) -> None:
        self.settings = settings
        self.budget = budget
        self.request = request
        self.terminated = False
        self._mark = 0

    def _marks(self, step: int) -> int:
        return int(self.budget.fraction(step) * self.settings.EVALUATIONS)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and count as done what was done before a resumption."""
        self.budget.start()
        self.budget.agree(ranks.from_main)
        if ranks.rank() > 0:
            # Ranks drop and hash each in its own way. A resumption restores each rank's generators after this.
            torch.manual_seed((self.settings.seed + ranks.rank()) % 2**32)
        self._mark = self._marks(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Remove old checkpoints; leave right after one that was written while the run was told to stop."""
        if state.is_world_process_zero:
            limit, best = self.settings.save_total_limit, state.best_model_checkpoint
            prune_checkpoints(Path(self.settings.output), limit, best, state.global_step)
        asked = self.request.agreed()  # asked of all ranks, whatever each one's clock says
        if asked and not control.should_training_stop:
            self.terminated = control.should_training_stop = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the flags that the Trainer acts on."""
        step = state.global_step
        self.budget.agree(ranks.from_main)
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
        asked = self.request.agreed()
        if asked and fraction < 1.0:
            self.terminated = control.should_save = True
        # A checkpoint carries the log, and the log carries the time spent: see `seconds_spent`.
        control.should_log = control.should_log or control.should_save
        control.should_training_stop = fraction >= 1.0 or self.terminated


class EarlyStopping(EarlyStoppingCallback):
    """Counts on where a resumed run has stopped counting."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the count."""
        self.early_stopping_patience_counter = bad_evaluations(state)
        # Where early stopping was not asked for until now, the Trainer would not know where to keep the count.
        saved: Any = state.stateful_callbacks
        saved.setdefault(type(self).__name__, self.state())
        super().on_train_begin(args, state, control, **kwargs)


def bad_evaluations(state: TrainerState) -> int:
    """Return how many evaluations in a row have brought nothing better, as far as anybody counted."""
    saved: Any = state.stateful_callbacks or {}
    counted = saved.get(EarlyStopping.__name__, {}).get("attributes", {})
    return int(counted.get("early_stopping_patience_counter", 0))


class TaskTrainer(SafeTrainer):
    """Trains a model on the data of a task and judges it as the task says."""

    def __init__(self, task: Task, budget: Budget, request: StopRequest, **kwargs: Any) -> None:
        self.task = task
        self.settings: TrainingSettings = task.settings
        self.budget = budget
        self.rhythm = Rhythm(self.settings, budget, request)
        callbacks: list[TrainerCallback] = [self.rhythm, *kwargs.pop("callbacks", [])]
        if self.settings.early_stopping is not None:
            callbacks.append(EarlyStopping(self.settings.early_stopping))
        if self.settings.tensorboard:
            callbacks.append(_tensorboard(self.settings.output))
        if self.settings.trackio:
            callbacks.append(_trackio())
        if task.stream is not None:
            callbacks.append(StreamPosition(task.stream))
        if getattr(self.settings, "grow_positions", False):
            callbacks.append(GrowingPositions(task.settings, task.vocabulary.tokenizer))
        self.speed = Speed(functools.partial(tokens_of, task))
        callbacks.insert(0, self.speed)
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
        self._sharers = share_sequences(cast(torch.nn.Module, self.model), self.settings.sequence_parallel)
        # It prints every log to stdout, which belongs to whoever calls us.
        self.remove_callback(PrinterCallback)

    def _judge(self, outcome: EvalPrediction) -> dict[str, float]:
        return self.task.judge(outcome.predictions, outcome.label_ids)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Give the model what the task makes of a batch."""
        inputs = self.task.model_inputs(inputs)
        if self.task.draws:
            inputs = as_drawn_by_first(inputs, self._sharers)
        if self.settings.rounds is not None and model.training:
            step = self.state.global_step
            inputs = {**inputs, "num_hashes": self.settings.rounds.at(step, self.budget.fraction(step))}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of this process; a stream takes its share by itself, whole batches at a time.

        Ranks that share sequences get the same rows.
        """
        stream, shared = self.task.stream, self.settings.sequence_parallel
        if stream is None:
            return share_rows(super().get_train_dataloader(), shared)
        stream.share(self.args.process_index // shared, self.args.world_size // shared)
        # A generator of its own: without one, every start of an iteration would move torch's default generator.
        return DataLoader(
            stream, batch_size=None, generator=torch.Generator(), pin_memory=self.args.dataloader_pin_memory
        )

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

    def create_accelerator_and_postprocess(self) -> None:
        """Have FSDP on any device that was asked for it."""
        super().create_accelerator_and_postprocess()
        if self.settings.parallel == "fsdp":
            leave_head_to_root(self.accelerator)
        if self.settings.parallel == "fsdp" and not self.is_fsdp_enabled:
            use_fsdp(self.accelerator, self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, on whichever rank saves, with the bucket count of the longest input of all ranks.

        A checkpoint of FSDP holds shards, which the Trainer writes elsewhere; here their configuration joins them.
        """
        model = self.accelerator.unwrap_model(self.model)
        model.share_trained_buckets()
        if self.is_fsdp_enabled and _internal_call:
            if self.args.should_save and output_dir is not None:
                model.config.save_pretrained(output_dir)
                self.task.vocabulary.tokenizer.save_pretrained(output_dir)
            return
        super().save_model(output_dir, _internal_call)

    def save_final_model(self) -> None:
        """Save the model whole, whatever its checkpoints hold. A collective call."""
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        self.save_model()

    def final_model(self) -> Any:
        """Return the model that was saved, as one that a process can run alone."""
        if self.is_fsdp_enabled:
            return self.task.model_class.from_pretrained(self.settings.output)
        return self.model

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate with the same random rotations each time, and without moving the generator that training uses."""
        self.task.prepare_evaluation(self.state.global_step)
        self.eval_dataset = self.task.held_out
        if self.settings.sequence_parallel > 1:
            self.gather_function = self._gather_rows
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.settings.seed)
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the task's measures and the time spent to every entry of the log."""
        if "loss" in logs:
            logs["tokens_per_second"] = round(self.speed.since_last_time(), 1)
            logs |= {
                name: size
                for name, size in (("memory_bytes", current_memory()), ("peak_memory_bytes", peak_memory()))
                if size is not None
            }
        logs["seconds"] = round(self.budget.seconds, 3)
        self.task.add_to_log(logs)
        super().log(logs, *args, **kwargs)


def tokens_of(task: Task, steps: int) -> float:
    """Tokens that all ranks together train on in their first ``steps`` steps."""
    return task.tokens_of(steps) * replicas(task.settings)


def check_reporters(settings: TrainingSettings) -> None:
    """Refuse to log to what is not installed."""
    for name in ("tensorboard", "trackio"):
        if getattr(settings, name) and importlib.util.find_spec(name) is None:
            raise ImportError(f"--{name} needs the package `{name}`: pip install {name}")


def _tensorboard(output: str) -> TrainerCallback:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return TensorBoardCallback(tb_writer=SummaryWriter(str(Path(output) / "tensorboard")))


def _trackio() -> TrainerCallback:
    from transformers.integrations.integration_utils import TrackioCallback

    return TrackioCallback()


def uses_gpu(settings: TrainingSettings) -> bool:
    """Say whether the run will be on a GPU; refuse a precision that its device does not train in."""
    on_gpu = torch.cuda.is_available() and not settings.cpu
    if settings.precision == "fp16" and not on_gpu:
        raise ValueError("precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    return on_gpu


def training_arguments(task: Task, use_cache: bool) -> TrainingArguments:
    """Say in the Trainer's words what the settings ask for; ``use_cache`` is what the model's config keeps."""
    settings: TrainingSettings = task.settings
    on_gpu = uses_gpu(settings)
    arguments = TrainingArguments(
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
        # On several ranks the Trainer must be told that there is no GPU; else each rank would train by itself.
        use_cpu=settings.cpu or (ranks.world_size() > 1 and not on_gpu),
        ddp_backend="gloo" if ranks.world_size() > 1 and not on_gpu else None,
        ddp_find_unused_parameters=settings.find_unused_parameters,
        ddp_static_graph=settings.static_graph,
        # A static graph is learnt in the first backward, in which ranks must meet: no batch may put that off.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": settings.static_graph}},
        fsdp=settings.parallel == "fsdp",  # type: ignore[arg-type]
        fsdp_config=fsdp_config(settings),
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
        dataloader_pin_memory=on_gpu,
        # A stream knows by itself where to go on.
        ignore_data_skip=task.stream is not None,
        disable_tqdm=True,
        use_cache=use_cache,
        report_to="none",
        # Of trackio's logs, which stay on this machine.
        project=Path(settings.output).resolve().name or "flash-reformer",
    )
    # One process trains on one device: with several, the Trainer would take nn.DataParallel (see docs/distributed.md).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def seconds_spent(state: TrainerState) -> float:
    """Return the seconds that a run had taken when this state was saved."""
    return max((float(entry.get("seconds", 0.0)) for entry in state.log_history), default=0.0)
