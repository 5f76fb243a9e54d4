"""Steps of the real model for a few seconds, in a process of its own: what they take, and by what law it grows.

The process is fresh, so that its memory is that of the steps. Where a step of the whole length fits into the time, it
is that step which is measured. Where not, time is that of as long a step as fits, stretched in proportion. Memory is
measured at that length, too; it grows by what a model of one layer of each kind, which is as lean as a deep one but
quicker, takes more at one length than at half of it.
"""

import ctypes
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from flash_reformer import buffers
from flash_reformer.models.configuration_reformer import ReformerConfig
from flash_reformer.training.memory import memory_of_process, peak_of_process
from flash_reformer.training.quiet import quiet_transformers

#: What a model's forward takes, by name: tensors, and switches.
Batch = dict[str, Any]

#: Seconds that steps may take in all, and the part of them that goes to steps of the whole model.
SECONDS = 10.0
_WHOLE = 0.5
#: A first look at what a token costs, in tokens per row; steps at the whole length take their time in these runs.
_LOOK, _REPEATS = 512, 30
#: In a process with this setting the C library hands freed tensors back at once: resident memory is what lives.
_M_MMAP_THRESHOLD, _HAND_BACK = -3, 2**18


@dataclass(frozen=True)
class Request:
    """What to run.

    Attributes:
        model_class: what is trained.
        config: fields of its `ReformerConfig`.
        arguments: fields of `TrainingArguments`; the output folder is replaced by one that goes away.
        training: batches as the model's forward takes them.
        evaluation: one of these at a time is evaluated.
        loss_only: whether evaluation asks for nothing but the loss.
        seq_len: positions of the batches to be estimated.
        threads: of torch.
        seconds: what all steps may take together.
        rounds: rounds of hashing that steps take as a run goes; the batches ask for the most of them.
    """

    model_class: Any
    config: dict[str, Any]
    arguments: dict[str, Any]
    training: list[Batch]
    evaluation: list[Batch]
    loss_only: bool
    seq_len: int
    threads: int
    seconds: float
    rounds: list[int] = field(default_factory=list)


@dataclass
class Calibration:
    """What was measured. Bytes are above those of the process after its imports; None where no peak can be read.

    Attributes:
        length: positions of the steps that were timed; memory was read at the same ones.
        steps: how many were run in all, of whatever model and length.
        says: what was run, in words.
        seconds: what it took, without the start of the process.
        micro_step: seconds of a forward and backward at ``length``.
        optimizer: seconds of clipping, an optimizer's step and clearing the gradients.
        evaluation: seconds of an evaluation batch at ``length``.
        save: seconds of writing a checkpoint.
        peak: bytes at the worst moment of these steps.
        bytes_per_token: what every further position of a row adds to it; 0 where ``length`` is the whole.
        kept: bytes of freed results that the process kept at ``length``.
        baseline: bytes of the process after its imports.
        by_rounds: seconds of a short step with each of the request's rounds, over those with the most.
    """

    length: int = 0
    steps: int = 0
    says: list[str] = field(default_factory=list)
    seconds: float = 0.0
    micro_step: float = 0.0
    optimizer: float = 0.0
    evaluation: float = 0.0
    save: float = 0.0
    peak: int | None = None
    bytes_per_token: float = 0.0
    kept: int = 0
    baseline: int | None = None
    by_rounds: list[float] = field(default_factory=list)


class Meter:
    """The highest memory use since :meth:`reset`, in bytes: of this process, or of its GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Forget the peak so far, and hand back what is free."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        _c_library("malloc_trim", 0)
        try:
            Path("/proc/self/clear_refs").write_text("5", "ascii")
        except OSError:
            return  # not Linux, or not allowed: the peak is then that of all steps so far, which grow

    def peak(self) -> int | None:
        """Return the peak; None where this system does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        return peak_of_process()


def _c_library(function: str, *arguments: int) -> None:
    """Call a function of glibc; do nothing where there is another C library."""
    try:
        getattr(ctypes.CDLL(None), function)(*arguments)
    except (AttributeError, OSError, TypeError):
        return


def cut(batch: Batch, length: int) -> Batch:
    """Return a batch's first ``length`` positions; numbers that are positions stay inside."""
    width = batch["input_ids"].shape[1]
    found = dict(batch)
    for name, value in batch.items():
        if name in ("start_positions", "end_positions"):
            found[name] = value.clamp(max=length - 1)
        elif isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[1] == width:
            found[name] = value[:, :length]
    return found


class _Steps:
    """A fresh model under a `transformers.Trainer`, one step at a time."""

    def __init__(self, request: Request, folder: str, layers: Sequence[str] | None = None) -> None:
        config = dict(request.config)
        if layers is not None:
            config["attn_layers"] = list(layers)
            config.pop("num_hidden_layers", None)
        self.request = request
        model = request.model_class(ReformerConfig(**config))
        arguments = TrainingArguments(**{**request.arguments, "output_dir": folder})
        self.trainer = Trainer(model, arguments)
        self.trainer.create_optimizer()
        prepared = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.model, self.optimizer = prepared
        self.trainer.optimizer = self.optimizer
        self.trainer.current_gradient_accumulation_steps = 1
        self.count = 0

    def _synchronise(self) -> float:
        if torch.cuda.is_available() and self.trainer.args.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self, length: int, *, twice: bool = False, **changes: Any) -> tuple[float, float]:
        """Return the seconds of a forward and backward, and of the optimizer; ``twice`` sums two batches before it.

        ``changes`` go into the batches.
        """
        start = self._synchronise()
        for _ in range(1 + twice):
            batches = self.request.training
            self.trainer.training_step(self.model, cut({**batches[self.count % len(batches)], **changes}, length))
            self.count += 1
        middle = self._synchronise()
        self.trainer.accelerator.clip_grad_norm_(self.model.parameters(), self.trainer.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad()
        return (middle - start) / (1 + twice), self._synchronise() - middle

    def evaluate(self, length: int) -> float:
        """Return the seconds of an evaluation batch."""
        self.model.eval()
        start = self._synchronise()
        batch = cut(self.request.evaluation[self.count % len(self.request.evaluation)], length)
        self.trainer.prediction_step(self.model, batch, self.request.loss_only)
        return self._synchronise() - start

    def save(self, folder: str) -> float:
        """Return the seconds of writing weights and the optimizer's state."""
        start = time.perf_counter()
        self.trainer.save_model(folder)
        torch.save(self.optimizer.state_dict(), Path(folder) / "optimizer.pt")
        return time.perf_counter() - start


def calibrate(request: Request) -> Calibration:
    """Run what fits into the time."""
    torch.set_num_threads(request.threads)
    found = Calibration(baseline=memory_of_process())
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        steps = _Steps(request, folder)
        device = steps.trainer.args.device
        base = 0 if device.type == "cuda" else (found.baseline or peak_of_process() or 0)
        meter = Meter(device)
        twice = request.arguments.get("gradient_accumulation_steps", 1) > 1
        look = min(request.seq_len, _LOOK)
        steps.step(look)
        per_token = sum(steps.step(look)) / look
        found.steps = 2
        found.by_rounds = _compare_rounds(steps, look, request.rounds)
        # A run's steps come after a checkpoint, too, and the libraries that it needs stay.
        found.save = steps.save(folder)
        left = request.seconds - (time.perf_counter() - start)
        # A step, an evaluation and one more step; two forwards and backwards in each step of accumulation.
        cost = (2.4 + 2 * twice) * per_token
        whole = look == request.seq_len or cost * request.seq_len <= left
        found.length = request.seq_len if whole else max(look, min(request.seq_len, int(_WHOLE * left / cost)))
        meter.reset()
        # The first batch is the longest.
        steps.count = 0
        _measure_whole(steps, found, start + request.seconds * (0.8 if whole else _WHOLE), twice=twice)
        peak = meter.peak()
        found.peak = None if peak is None else max(0, peak - base)
        found.kept = buffers.kept_results()
        found.says.append(f"{found.steps} steps of {_tokens(look)} and {_tokens(found.length)} per row")
        if not whole:
            del steps
            left = request.seconds - (time.perf_counter() - start)
            _measure_growth(request, folder, meter, found, per_token, left)
    found.seconds = time.perf_counter() - start
    return found


def _compare_rounds(steps: _Steps, look: int, rounds: list[int]) -> list[float]:
    """Return what short steps take with each number of rounds, over what they take with the most."""
    times = [min(steps.step(look, num_hashes=each)[0] for _ in range(3)) for each in rounds]
    return [seconds / times[rounds.index(max(rounds))] for seconds in times]


def _tokens(length: int) -> str:
    return f"{length:,} tokens"


def _measure_whole(steps: _Steps, found: Calibration, deadline: float, *, twice: bool) -> None:
    times: list[float] = []
    optimizer: list[float] = []
    evaluations: list[float] = []
    longest = 0.0
    while len(times) < 1 or (time.perf_counter() + longest < deadline and len(times) < _REPEATS):
        begin = time.perf_counter()
        micro, rest = steps.step(found.length, twice=twice)
        times.append(micro)
        optimizer.append(rest)
        found.steps += 1
        if len(evaluations) < 1 + len(times) // 2:
            evaluations.append(steps.evaluate(found.length))
        longest = max(longest, time.perf_counter() - begin)
    # The first one fetches fresh memory; where there are more it does not count.
    found.micro_step = statistics.fmean(times[1:] or times)
    found.optimizer = statistics.fmean(optimizer[1:] or optimizer)
    found.evaluation = statistics.fmean(evaluations[1:] or evaluations)


def _measure_growth(
    request: Request, folder: str, meter: Meter, found: Calibration, per_token: float, seconds: float
) -> None:
    """Set ``bytes_per_token``, from a model of one layer of each kind where blocks are reversible."""
    layers = list(request.config["attn_layers"])
    short = list(dict.fromkeys(layers)) if request.config.get("reversible", True) else layers
    # Where freed memory is handed back at once, steps take about twice the time: fresh pages.
    cost = 2.5 * per_token * len(short) / len(layers)
    longest = int(min(request.seq_len, max(2 * _LOOK, seconds / (1.5 * cost))))
    steps = _Steps(request, folder, short)
    steps.step(_LOOK)
    _c_library("mallopt", _M_MMAP_THRESHOLD, _HAND_BACK)
    buffers.keep_results(0)
    peaks = []
    for length in (longest // 2, longest):
        meter.reset()
        steps.step(length)
        peaks.append(meter.peak())
    found.steps += 3
    what = "the model" if short == layers else f"a model of {' and '.join(short)} alone"
    found.says.append(f"3 steps of {what}, up to {_tokens(longest)} per row, for how memory grows")
    shorter, longer = peaks
    if shorter is not None and longer is not None:
        found.bytes_per_token = max(0.0, (longer - shorter) / (longest - longest // 2))


def main() -> None:
    """Calibrate as the request in the file named first says, and write the result into the second."""
    request: Request = torch.load(sys.argv[1], weights_only=False)  # our own file
    Path(sys.argv[2]).write_text(json.dumps(asdict(calibrate(request))), encoding="utf-8")
