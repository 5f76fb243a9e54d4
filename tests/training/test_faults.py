"""What goes wrong in a long run: signals, numbers that are not finite, disks that are full or closed."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from typer.testing import CliRunner

from flash_reformer.cli import app
from flash_reformer.training import DivergedError, Terminated, resume, safety, train
from flash_reformer.training.checkpoints import damage, own_checkpoints, partials
from flash_reformer.training.finite import FiniteWatch
from flash_reformer.training.safety import SafeTrainer
from flash_reformer.training.signals import stop_on_sigterm
from flash_reformer.training.trainer import TaskTrainer

from .runs import QUICK, TINY, Interrupt, weights, write_text


@pytest.fixture
def asked(tmp_path) -> dict[str, Any]:
    return {**QUICK, "text": (write_text(tmp_path),), "output": str(tmp_path / "run")}


def names(folder: Path) -> list[str]:
    return [path.name for path in own_checkpoints(folder)]


class Signal(TrainerCallback):
    """Sends this process a signal in the middle of a step, or while a checkpoint is written."""

    def __init__(self, step: int, moment: str = "on_pre_optimizer_step") -> None:
        self.step = step
        setattr(self, moment, self.send)

    def send(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = -1  # once
            os.kill(os.getpid(), signal.SIGTERM)


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("moment", "left"), [("on_pre_optimizer_step", "checkpoint-4"), ("on_log", "checkpoint-3")])
def test_sigterm_saves_and_leaves_and_the_run_ends_the_same(moment, left, asked, tmp_path):
    train("clm", {**asked, "output": str(tmp_path / "whole")}, TINY)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated, match=rf"SIGTERM at step (\d): {left} has the run up to step \1; --resume"):
        train("clm", {**asked, "save_interval": 3}, TINY, callbacks=[Signal(3, moment)])
    assert signal.getsignal(signal.SIGTERM) is before
    assert names(tmp_path / "run")[-1] == left
    assert not (tmp_path / "run" / "metrics.json").exists()
    resume({"output": asked["output"]})
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_sigterm_in_the_last_step_changes_nothing(asked, tmp_path):
    assert train("clm", asked, TINY, callbacks=[Signal(5)]).metrics["steps"] == 6


def test_the_command_leaves_with_the_exit_code_of_sigterm(asked, tmp_path, monkeypatch):
    class Told(TaskTrainer):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.add_callback(Signal(1))

    monkeypatch.setattr("flash_reformer.training.recipes.TaskTrainer", Told)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asked.items() if name not in ("text", "cpu")]
    sizes = ["--hidden-size=16", "--layers=local", "--heads=2", "--ff-size=16", "--local-chunk-length=16"]
    given = ["train", "clm", "--text", asked["text"][0], "--cpu", *flags]
    runner = CliRunner()
    helped = runner.invoke(app, ["train", "clm", "--help"]).output
    result = runner.invoke(app, [*given, *(size for size in sizes if size.split("=")[0] in helped)])
    assert result.exit_code == 143, result.output
    assert "SIGTERM at step 2: checkpoint-2 has the run up to step 2" in " ".join(result.output.split())


def test_a_second_sigterm_does_what_it_did_before_and_other_threads_are_left_alone():
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(1))
    try:
        with stop_on_sigterm() as request:
            assert not request.agreed()
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.agreed()
            assert came == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert came == [1]

        def elsewhere() -> None:
            with stop_on_sigterm():
                came.append(signal.getsignal(signal.SIGTERM))

        set_here = signal.getsignal(signal.SIGTERM)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert came == [1, set_here]
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with stop_on_sigterm():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# --- numbers that are not finite --------------------------------------------------------------------------------------


def spoilt(monkeypatch, step: int, batch: int, *, gradient: bool = False) -> list[list[int]]:
    """Make the loss (or only a gradient) of a batch NaN; return the rows of each batch that was trained on."""
    rows: list[list[int]] = []
    real = TaskTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = real(self, model, inputs, *args, **kwargs)
        if not model.training:
            return loss
        data = self.task.train
        held = [
            next(i for i in range(len(data)) if torch.equal(data[i]["input_ids"], row)) for row in inputs["input_ids"]
        ]
        rows.append(held)
        if self.state.global_step == step and len(self._losses) == batch:
            parameter = next(model.parameters())
            return loss + (parameter.sum() * 0).sqrt() if gradient else loss * float("nan")
        return loss

    monkeypatch.setattr(TaskTrainer, "compute_loss", compute_loss)
    return rows


@pytest.mark.parametrize("resumed", [False, True])
def test_a_loss_that_is_nan_stops_before_the_weights_change_and_says_where(resumed, asked, tmp_path, monkeypatch):
    asked |= {"batch_size": 2, "gradient_accumulation": 2, "max_steps": 9, "save_interval": 5, "eval_interval": 9}
    asked |= {"learning_rate": 1e-3}
    step = 7 if resumed else 3  # an epoch has 5 steps
    train("clm", {**asked, "output": str(tmp_path / "whole"), "save_interval": step, "save_total_limit": 9}, TINY)
    if resumed:
        with pytest.raises(KeyboardInterrupt):
            train("clm", asked, TINY, callbacks=[Interrupt(6)])
    rows = spoilt(monkeypatch, step, 1)
    with pytest.raises(DivergedError, match=f"the loss is nan at step {step + 1}: training has diverged") as caught:
        resume({"output": asked["output"]}) if resumed else train("clm", asked, TINY)
    said = str(caught.value)
    assert f"rows {rows[-1][0]}, {rows[-1][1]} (counted from 0)" in said, (said, rows[-3:])
    assert f"checkpoint-{step} holds the weights before that step" in said
    kept, like = (tmp_path / name / f"checkpoint-{step}" for name in ("run", "whole"))
    assert damage(kept) is None
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert (kept / name).read_bytes() == (like / name).read_bytes(), name
    monkeypatch.undo()
    resume({"output": asked["output"]})
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_gradient_that_is_nan_stops_as_well(asked, tmp_path, monkeypatch):
    spoilt(monkeypatch, 3, 0, gradient=True)
    with pytest.raises(DivergedError, match=r"the norm of the gradient is (nan|inf) at step 4: .* checkpoint-3 holds"):
        train("clm", {**asked, "save_interval": 5}, TINY)
    state = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)["state"]
    assert all(torch.isfinite(value).all() for each in state.values() for value in each.values())


def test_nothing_is_there_to_keep_before_the_first_step(asked, monkeypatch):
    spoilt(monkeypatch, 0, 0)
    with pytest.raises(DivergedError, match="There is no checkpoint yet"):
        train("clm", asked, TINY)


def test_where_numbers_arrive_late_the_last_checkpoint_is_named(asked, tmp_path, monkeypatch):
    """The way of CUDA, with a watch that looks a step later; checkpoints never hold weights nobody looked at."""

    class Late(FiniteWatch):
        def check(self, values: Any, complaint: Any) -> None:
            self.settle()
            self._awaited = (values, torch.Event, complaint)

        def settle(self) -> None:
            if self._awaited is not None:
                held, _, complaint = self._awaited
                self._awaited = None
                self._look(held, complaint, in_time=False)

    monkeypatch.setattr(safety, "FiniteWatch", Late)
    spoilt(monkeypatch, 3, 0)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 4: .* checkpoint-2 holds the last good weights"):
        train("clm", {**asked, "save_interval": 2}, TINY)
    assert names(tmp_path / "run") == ["checkpoint-2"]


# --- disks ------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(asked, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output .*file/run cannot be written to: Not a directory"):
        train("clm", {**asked, "output": str(tmp_path / "file" / "run")}, TINY)

    def closed(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("flash_reformer.training.checkpoints.os.fsync", closed)
    monkeypatch.setattr(SafeTrainer, "train", pytest.fail)
    with pytest.raises(ValueError, match=r"--output .*run cannot be written to: Read-only file system"):
        train("clm", asked, TINY)


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(keep, asked, tmp_path, monkeypatch):
    real, failed = safety.seal, []

    def full(path: Path) -> int:
        if path.name in ("checkpoint-4", "checkpoint-6"):
            failed.append(path.name)
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(safety, "seal", full)
    with pytest.warns(UserWarning, match="could not be written") as caught:
        result = train("clm", {**asked, "keep": keep, "save_interval": 1, "eval_interval": 1}, TINY)
    said = [str(each.message) for each in caught]
    form = r"(checkpoint-\d) could not be written: .*No space left .* is (checkpoint-\d)$"
    pairs = [re.search(form, line).groups() for line in said]
    assert pairs == [("checkpoint-4", "checkpoint-3"), ("checkpoint-6", "checkpoint-5")]
    assert failed == ["checkpoint-4", "checkpoint-6"]
    assert names(tmp_path / "run") == ["checkpoint-3", "checkpoint-5"]
    assert not partials(tmp_path / "run")
    # The best that was saved is kept, and the measures are those of it.
    assert result.metrics["kept_step"] == (6 if keep == "last" else 5)
    saved, ended = weights(tmp_path / "run" / "checkpoint-5"), weights(tmp_path / "run")
    assert all(torch.equal(saved[name], ended[name]) for name in saved) == (keep == "best")


def test_what_does_not_fit_is_not_begun_and_the_end_says_what_is_missing(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(safety, "free_bytes", lambda folder: 1000)
    monkeypatch.setattr(safety, "seal", pytest.fail)
    real = SafeTrainer._save

    def full(self: Any, output_dir: str, **options: Any) -> None:
        real(self, output_dir, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SafeTrainer, "_save", full)
    with (
        pytest.warns(UserWarning, match="could not be written") as caught,
        pytest.raises(OSError, match=r"could not be saved in .*run, where it needs about [\d,]{9} bytes and 1,000 are"),
    ):
        train("clm", {**asked, "save_interval": 6, "eval_interval": 6}, TINY)
    assert len(caught) == 1
    assert re.search(r"checkpoint-6 could not be written: .*about [\d,]{9} bytes are missing", str(caught[0].message))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.json"]


def test_other_errors_while_saving_are_not_taken_for_a_full_disk(asked, monkeypatch):
    def broken(path: Path) -> int:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(safety, "seal", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        train("clm", asked, TINY)


def test_writers_of_torch_and_safetensors_that_run_out_of_space_are_understood(tmp_path):
    """A limit on the size of files makes real writers fail, without a full disk."""
    resource = pytest.importorskip("resource")
    from safetensors.torch import save_file

    before, errors = resource.getrlimit(resource.RLIMIT_FSIZE), []
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    tensor = {"x": torch.zeros(100_000)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        for write in (lambda: torch.save(tensor, tmp_path / "a.pt"), lambda: save_file(tensor, tmp_path / "a.st")):
            try:
                write()
            except Exception as error:
                errors.append(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(errors) == 2
    assert all(map(safety._is_about_writing, errors)), errors


# --- what a resumed run remembers -------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_counting_evaluations_without_a_better_result(asked, tmp_path):
    asked |= {"early_stopping": 3, "eval_interval": 1, "learning_rate": 1e-12, "warmup_steps": 0, "max_steps": 20}
    whole = train("clm", {**asked, "output": str(tmp_path / "whole")}, TINY)
    with pytest.raises(KeyboardInterrupt):
        train("clm", asked, TINY, callbacks=[Interrupt(whole.metrics["steps"] - 1)])
    assert resume({"output": asked["output"]}).metrics["steps"] == whole.metrics["steps"] < 20
    with pytest.raises(ValueError, match=r"already at the end of its run: raise .* --early-stopping"):
        resume({"output": asked["output"]})
    more = resume({"output": asked["output"], "early_stopping": 5}).metrics["steps"]
    assert more == whole.metrics["steps"] + 2


def test_early_stopping_may_be_asked_for_on_resume(asked):
    asked |= {"eval_interval": 1, "learning_rate": 1e-12, "warmup_steps": 0, "max_steps": 8}
    with pytest.raises(KeyboardInterrupt):
        train("clm", asked, TINY, callbacks=[Interrupt(3)])
    assert resume({"output": asked["output"], "early_stopping": 1}).metrics["steps"] < 8
