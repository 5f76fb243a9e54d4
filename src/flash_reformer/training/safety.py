"""A `transformers.Trainer` that survives: whole checkpoints, full disks, signals and numbers that are not finite."""

import errno
import math
import random
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from flash_reformer.training.checkpoints import (
    damage,
    move_files,
    move_into_place,
    own_checkpoints,
    partial_of,
    seal,
    step_of,
)
from flash_reformer.training.finite import SKIPPED_AT_MOST, DivergedError, FiniteWatch, rows_of_batches
from flash_reformer.training.ranks import barrier, from_main, is_main, world_size
from flash_reformer.training.settings import TrainingSettings

# Room for tokenizer, states and manifest, in bytes.
_SLACK = 1 << 20


class SafeTrainer(Trainer):
    """What can go wrong in a long run, and what is done about it.

    Attributes:
        settings: of the run.
        over: the run has reached its end before this process: there is nothing to train, only to finish.
    """

    settings: TrainingSettings
    over = False

    def __init__(self, **kwargs: Any) -> None:
        self._run_dir: str | None = None
        self._saved_step: int | None = None
        self._best: tuple[float | None, int | None, str | None] = (None, None, None)
        self._watch = FiniteWatch()
        self._losses: list[Tensor] = []
        self._skipped = 0
        self._generators: Any = None
        super().__init__(**kwargs)
        self.add_callback(_Keeper(self))

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._run_dir is None else self._run_dir

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._watch.settle()
        final = self.folder / f"checkpoint-{self.state.global_step}"
        missing = from_main(self._missing_bytes())
        try:
            if missing:
                raise OSError(errno.ENOSPC, f"about {missing:,} bytes are missing")
            self._write_checkpoint(model, trial, final)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_about_writing(error):
                raise
            if is_main():
                shutil.rmtree(partial_of(final), ignore_errors=True)
            # A rank that goes on alone after half a checkpoint would wait for the others at the wrong place.
            if world_size() > 1 and not missing:
                raise OSError(f"{final} could not be written: {error}") from error
            self._go_on_without(final, error)
        else:
            self._saved_step = self.state.global_step
            self._best = (self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint)

    def _write_checkpoint(self, model: Any, trial: Any, final: Path) -> None:
        aside = partial_of(final)
        if is_main():
            shutil.rmtree(aside, ignore_errors=True)
        barrier()
        best_before = self.state.best_model_checkpoint
        self._run_dir = str(aside)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._run_dir = None
        best = self.folder / f"checkpoint-{self.state.best_global_step}"
        is_best = self.state.best_global_step is not None and (best == final or best.is_dir())
        self.state.best_model_checkpoint = str(best) if is_best else best_before
        barrier()
        if is_main():
            written = aside / final.name
            # Written before with the path of the folder aside.
            self.state.save_to_json(str(written / "trainer_state.json"))
            seal(written)
            move_into_place(written, final)
            aside.rmdir()
        barrier()

    def _missing_bytes(self) -> int:
        """Return how many bytes a checkpoint would probably need beyond those that are free; 0 if it fits."""
        model: Any = self.model
        tensors = [*model.parameters(), *model.buffers()]
        for state in getattr(self.optimizer, "state", {}).values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        # What a sharded tensor says of its size is the whole one, which rank 0 may have to write.
        needed = _bytes_of(tensors) + _SLACK
        return max(0, needed - free_bytes(self.folder))

    def _go_on_without(self, final: Path, error: Exception) -> None:
        metric, step, best = self._best
        self.state.best_model_checkpoint = best
        if self.settings.keep == "best":
            # The weights of what was best are lost, so something else has to be.
            self.state.best_metric, self.state.best_global_step = metric, step
        kept = own_checkpoints(self.folder)
        warnings.warn(
            f"{final} could not be written: {error}; {free_bytes(final.parent):,} bytes are free. The run goes on; its "
            f"last checkpoint is {kept[-1].name if kept else 'still to come'}",
            stacklevel=2,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; that of a finished run takes its place in the folder file by file, each one whole."""
        if output_dir is not None:
            super().save_model(output_dir, _internal_call)
            return
        folder, model = self.folder, cast(torch.nn.Module, self.model)
        aside = partial_of(folder / "model")
        try:
            super().save_model(str(aside), _internal_call)
            barrier()
            if is_main():
                move_files(aside, folder)
        except (OSError, SafetensorError, RuntimeError) as error:
            if not _is_about_writing(error):
                raise
            shutil.rmtree(aside, ignore_errors=True)
            size = _SLACK + _bytes_of(list(model.parameters()))
            kept = own_checkpoints(folder)
            has = (
                f"{kept[-1].name} has the run: with more space, --resume ends it" if kept else "no checkpoint is there"
            )
            raise OSError(
                f"the model could not be saved in {folder}, where it needs about {size:,} bytes and "
                f"{free_bytes(folder):,} are free: {error}; {has}"
            ) from error
        barrier()

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        fault = from_main(damage(best) if is_main() else None)
        if fault is None:
            super()._load_best_model()
            return
        warnings.warn(f"the best checkpoint, {best}, is damaged: {fault}; the last weights are kept", stacklevel=2)
        self.state.best_model_checkpoint = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.over:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    # --- numbers that are not finite ----------------------------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; where a loss or gradient is not finite, keep the state before it and say where."""
        try:
            return super().train(*args, **kwargs)
        except DivergedError as error:
            raise DivergedError(f"{error}. {self._keep_good_state(error)}", in_time=error.in_time) from None

    def _keep_good_state(self, error: DivergedError) -> str:
        """Save the weights before the step that went wrong, and say where they are."""
        step = self.state.global_step
        if error.in_time and step > 0 and self._saved_step != step and self._generators is not None:
            self._rewind()
            self._save_checkpoint(self.model_wrapped, None)
        kept = own_checkpoints(self.folder)
        if not kept:
            return "There is no checkpoint yet"
        exact = error.in_time and step_of(kept[-1]) == step
        return f"{kept[-1].name} holds {'the weights before that step' if exact else 'the last good weights'}"

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one batch, and look at its loss before anything is made of it."""
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        if loss.device.type == "cpu" and world_size() == 1:
            self._check("loss", loss[None], len(self._losses) - 1)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        value = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        value = torch.as_tensor(value).detach().reshape(1)
        losses, self._losses = torch.stack(self._losses), []
        if getattr(self.accelerator, "scaler", None) is None:
            # Ranks must stop together, and only the gradients are those of all of them.
            both = value if world_size() > 1 else torch.cat([losses.to(value), value])
            self._check("loss or the norm of the gradient", both, None, len(losses))
        else:
            # Steps with an overflow are left out, and the next scale is lower. The loss itself has no scale.
            self._skipped = self._skipped + 1 if self.accelerator.optimizer_step_was_skipped else 0
            if self._skipped > SKIPPED_AT_MOST:
                raise self._complaint("gradient", None, len(losses))([math.nan], False)
            if world_size() == 1:
                self._check("loss", losses, None, len(losses))
        return norm

    def _check(self, what: str, values: Tensor, batch: int | None, count: int = 1) -> None:
        self._watch.check(values, self._complaint(what, batch, count))

    def _complaint(self, what: str, batch: int | None, count: int) -> Any:
        step = self.state.global_step

        def complain(numbers: list[float], in_time: bool) -> DivergedError:
            bad = [place for place, number in enumerate(numbers) if not math.isfinite(number)]
            name, value = what, numbers[bad[0]]
            first, many = (0, count) if batch is None else (batch, 1)
            if len(numbers) == count + 1:  # losses, and the norm after them
                name = "loss" if bad[0] < count else "norm of the gradient"
                first, many = (bad[0], 1) if bad[0] < count else (0, count)
            return DivergedError(
                f"the {name} is {value} at step {step + 1}: training has diverged; learning_rate "
                f"{self.settings.learning_rate} is too high, or precision {self.settings.precision} too low, or the "
                f"data is to blame: {self._place(step, first, many)}",
                in_time=in_time,
            )

        return complain

    def _place(self, step: int, first: int, count: int) -> str:
        """Say which rows of the data the batches of a step hold."""
        loader: Any = self.callback_handler.train_dataloader
        every = self.args.gradient_accumulation_steps
        try:
            steps_per_epoch = max(1, math.ceil(len(loader) / every))
        except TypeError:  # a stream
            return f"batch {step * every + first} since the start"
        epoch, number = divmod(step, steps_per_epoch)
        number = number * every + first
        rows = rows_of_batches(loader, epoch, number, count)
        named = (
            ""
            if rows is None
            else f", {'rows' if world_size() == 1 else 'of this rank rows'} " + ", ".join(map(str, rows))
        )
        return f"epoch {epoch}, batch {number}{named} (counted from 0)"

    def _rewind(self) -> None:
        python, numpy, torchs, cudas = self._generators
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002, what the Trainer keeps
        torch.random.set_rng_state(torchs)
        if cudas is not None:
            torch.cuda.set_rng_state_all(cudas)


class _Keeper(TrainerCallback):
    """Notes what going back would need."""

    def __init__(self, trainer: SafeTrainer) -> None:
        self.trainer = trainer

    def _note(self) -> None:
        cudas = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        numpy = np.random.get_state()  # noqa: NPY002, what the Trainer keeps
        self.trainer._generators = (random.getstate(), numpy, torch.random.get_rng_state(), cudas)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note what is best so far, as far as its weights are still there."""
        if state.global_step:
            self.trainer._saved_step = state.global_step
        if state.best_global_step is not None:
            here = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
            # A folder that was copied or moved has the best one with it, wherever it was before.
            if here.is_dir():
                state.best_model_checkpoint = str(here)
            if state.best_model_checkpoint is None and self.trainer.settings.keep == "best":
                state.best_metric = state.best_global_step = None
        self.trainer._best = (state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the generators before the order of the epoch is drawn."""
        self._note()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the generators after a step."""
        self._note()


def free_bytes(folder: Path) -> int:
    """Return how many bytes may still be written in a folder."""
    return shutil.disk_usage(folder).free


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _is_about_writing(error: Exception) -> bool:
    """Say whether an error comes from the disk: torch and safetensors tell it as text."""
    if isinstance(error, OSError | SafetensorError):
        return True
    return any(word in str(error) for word in ("PytorchStreamWriter", "inline_container", "No space left"))
