"""What a run will take, before it starts: parameters, memory by part, time. Nothing of it is written anywhere.

Totals are measured (see :mod:`flash_reformer.training.calibration`); parts are counted from sizes, and what of a total
no part explains is a part of its own.

Letters: B batch, T positions, E hidden size, H heads, D head size, R hash rounds, V vocabulary.
"""

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerControl

from flash_reformer.buffers import RESULTS_KEPT
from flash_reformer.training.budget import Budget
from flash_reformer.training.calibration import SECONDS, Batch, Calibration, Request
from flash_reformer.training.memory import memory_of_process
from flash_reformer.training.signals import StopRequest
from flash_reformer.training.tasks import Task
from flash_reformer.training.trainer import Rhythm, training_arguments, uses_gpu

#: What the memory of freed results may grow to on a CPU, see `flash_reformer.buffers`.
KEPT_AT_MOST = RESULTS_KEPT
#: Batches that are looked at: for the time of a step, and rows for the longest one.
_BATCHES, _ROWS = 4, 256
#: Beyond so many steps evaluations are counted from fewer.
_COUNTED = 20_000
#: What steps depend on of the Trainer's arguments.
_ARGUMENTS = (
    "bf16 fp16 use_cpu seed learning_rate weight_decay adam_beta2 max_grad_norm gradient_accumulation_steps "
    "label_names report_to disable_tqdm remove_unused_columns"
)
OTHER = "libraries, allocator, other (measured)"


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        parameters: numbers that are trained, by part of the model; shared ones count once.
        memory: bytes above the process after its imports, by part, at the worst moment of a training step.
        baseline: bytes of the process after its imports; 0 on a GPU, where memory is that of tensors.
        on_gpu: whether the memory is that of a GPU.
        steps: optimizer steps of the run.
        evaluations: how often it is evaluated.
        saves: how many checkpoints it writes.
        seconds_per_step: of an optimizer step, with making its batches.
        seconds_per_evaluation: of one evaluation.
        seconds_per_save: of one checkpoint.
        calibrated: what was run to know, in words.
        calibration_seconds: how long that took, without the start of its process.
        length: positions per row of the steps that were timed; where it is less than ``seq_len``, time and memory of
            longer rows are extrapolated.
        seq_len: positions per row of the run's longest batches.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    baseline: int
    on_gpu: bool
    steps: int
    evaluations: int
    saves: int
    seconds_per_step: float
    seconds_per_evaluation: float
    seconds_per_save: float
    calibrated: tuple[str, ...]
    calibration_seconds: float
    length: int
    seq_len: int

    @property
    def memory_peak(self) -> int:
        """Bytes above the process after its imports."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """Seconds of the whole run: steps, evaluations and checkpoints, but neither reading the data nor a sample."""
        others = self.evaluations * self.seconds_per_evaluation + self.saves * self.seconds_per_save
        return self.steps * self.seconds_per_step + others


def estimate(task: Task, network: Any, budget: Budget, data_bytes: int) -> Estimate:
    """Return what training ``network`` for a task will take; runs calibrating steps in another process.

    Args:
        task: with its data read.
        network: the fresh or loaded model; it is not touched.
        budget: the end of the run.
        data_bytes: what reading the data has taken of this process's memory.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a dry run is of one process: leave the launcher out; on several devices each takes as much")
    settings = task.settings
    batches, data_seconds = _training_batches(task)
    longest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
    per_row = 1 if task.loss_only else settings.batch_size
    judged = [_batch(task, rows) for rows in _groups(_some_rows(task.held_out, _BATCHES * per_row), per_row)]
    seq_len = longest["input_ids"].shape[1]
    arguments = {**training_arguments(task, False).to_dict(), "use_cache": False}
    request = Request(
        type(network),
        network.config.to_dict(),
        {name: arguments[name] for name in _ARGUMENTS.split()},
        # The longest one comes first: its memory is that of the run.
        [longest, *(batch for batch in batches[:_BATCHES] if batch is not longest)],
        judged,
        task.loss_only,
        seq_len,
        torch.get_num_threads(),
        SECONDS,
        [] if settings.rounds is None else list(settings.rounds.values),
    )
    measured = _in_fresh_process(request)
    stretch = _mean_length(batches) / _mean_length([cut_like(batch, measured.length) for batch in request.training])
    judged_stretch = _mean_length(judged) / _mean_length([cut_like(batch, measured.length) for batch in judged])
    micro = measured.micro_step * stretch * _share_of_rounds(settings, budget, measured) + data_seconds
    seconds_per_step = settings.gradient_accumulation * micro + measured.optimizer
    seconds_per_evaluation = measured.evaluation * judged_stretch * math.ceil(_length(task.held_out) / per_row)
    steps, evaluations, saves = _counts(settings, budget, seconds_per_step, seconds_per_evaluation, measured.save)
    on_gpu = uses_gpu(settings)
    return Estimate(
        _parameters(network),
        _memory(network, settings, request, measured, 0 if on_gpu else data_bytes, on_gpu=on_gpu),
        0 if on_gpu else measured.baseline or 0,
        on_gpu,
        steps,
        evaluations,
        saves,
        seconds_per_step,
        seconds_per_evaluation,
        measured.save,
        tuple(measured.says),
        measured.seconds,
        measured.length,
        seq_len,
    )


# --- batches ----------------------------------------------------------------------------------------------------------


def _training_batches(task: Task) -> tuple[list[Batch], float]:
    """Return batches to train on, the longest one among them, and seconds to make each.

    A schedule of lengths keeps the tokens of a step about equal, and so its time and memory: they are those of the
    longest.
    """
    start = time.perf_counter()
    most = {} if task.settings.rounds is None else {"num_hashes": max(task.settings.rounds.values)}
    if task.stream is not None:
        made, seconds = task.stream.longest_batches(_BATCHES)
        start = time.perf_counter()
        batches = [{**_without_draws(task, batch), **most} for batch in made]
        return batches, seconds + (time.perf_counter() - start) / len(batches)
    groups = _groups(_some_rows(task.train, _ROWS), task.settings.batch_size)
    batches = [{**_batch(task, rows), **most} for rows in groups]
    return batches, (time.perf_counter() - start) / len(batches)


def _length(rows: Any) -> int:
    return len(rows)


def _some_rows(rows: Any, count: int) -> list[Batch]:
    """Return rows from all over the data."""
    length = len(rows)
    return [rows[index] for index in sorted({place * length // count for place in range(count)})]


def _groups(rows: list[Batch], size: int) -> Iterable[list[Batch]]:
    """Yield rows as batches: at most so many as are looked at, and one of the longest rows where they differ."""
    lengths = [len(row["input_ids"]) for row in rows]
    if len(rows) < size:
        rows = list(itertools.islice(itertools.cycle(rows), size))
    if len(set(lengths)) > 1:
        yield sorted(rows, key=lambda row: -len(row["input_ids"]))[:size]
    every = max(1, len(rows) // (_BATCHES * size))
    # Rows from all over, not neighbours.
    spread = [rows[place::every] for place in range(every)]
    mixed = list(itertools.chain(*spread))
    for place in range(min(_BATCHES, len(rows) // size)):
        yield mixed[place * size : (place + 1) * size]


def _batch(task: Task, rows: list[Batch]) -> Batch:
    return _without_draws(task, task.collate(rows))


def _without_draws(task: Task, batch: Batch) -> Batch:
    """Return what the model takes of a batch; torch's default generator stays as it is."""
    state = torch.get_rng_state()
    try:
        return task.model_inputs(batch)
    finally:
        torch.set_rng_state(state)


def cut_like(batch: Batch, length: int) -> Batch:
    """Return the ids of a batch's first ``length`` positions."""
    return {"input_ids": batch["input_ids"][:, :length]}


def _mean_length(batches: list[Batch]) -> float:
    return sum(batch["input_ids"].shape[1] for batch in batches) / len(batches)


# --- time -------------------------------------------------------------------------------------------------------------


def _counts(settings: Any, budget: Budget, step: float, evaluation: float, save: float) -> tuple[int, int, int]:
    """Return steps, evaluations and checkpoints of the run, by asking the run's own rhythm."""
    steps = budget.max_steps
    if budget.max_minutes is not None:
        seconds = 60.0 * budget.max_minutes
        while True:
            fitting = max(1, int(seconds / step))
            _, evaluations, saves = _counts(settings, Budget(fitting, None), step, evaluation, save)
            left = 60.0 * budget.max_minutes - evaluations * evaluation - saves * save
            if left >= seconds or seconds - left < 0.01 * seconds:
                break
            seconds = max(step, left)
        steps = fitting if steps is None else min(steps, fitting)
    assert steps is not None, "a run has an end"
    counted = min(steps, _COUNTED)
    rhythm = Rhythm(settings, Budget(counted, None), StopRequest())
    evaluations, saves = 1, 0  # the first evaluation comes before the first step
    state, control = SimpleNamespace(global_step=0, is_world_process_zero=False), TrainerControl()
    for state.global_step in range(1, counted + 1):
        rhythm.on_step_end(None, state, control)  # type: ignore[arg-type]
        evaluations += control.should_evaluate
        saves += control.should_save
    if counted < steps:
        evaluations = 1 + (evaluations - 1 if settings.eval_interval is None else steps // settings.eval_interval)
        saves = saves if settings.save_interval is None else steps // settings.save_interval
    return steps, evaluations, saves


def _share_of_rounds(settings: Any, budget: Budget, measured: Calibration) -> float:
    """Return what steps take on average, over what those with the most rounds of hashing take."""
    if settings.rounds is None or not measured.by_rounds:
        return 1.0
    parts = list(zip(settings.rounds.shares(budget.max_steps), measured.by_rounds, strict=True))
    if budget.max_steps is None and settings.rounds.by_fraction:
        return 1.0 / sum(share / seconds for share, seconds in parts)  # shares of the clock
    return sum(share * seconds for share, seconds in parts)


# --- memory -----------------------------------------------------------------------------------------------------------


def _parameters(network: Any) -> dict[str, int]:
    """Count parameters by part: embeddings, layers by kind, norm, head."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    kinds = network.config.attn_layers
    found: dict[str, int] = {}
    for parameter in network.parameters():
        name = names[id(parameter)]
        if "word_embeddings" in name:
            part = "word embeddings"
        elif "position_embeddings" in name:
            part = "position embeddings"
        elif ".layers." in name:
            kind = kinds[int(name.split(".layers.")[1].split(".")[0])]
            part = f"{kind} attention" if ".attention." in name else "feed-forward"
        else:
            part = "final norm" if "encoder.layer_norm" in name else "head"
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def _memory(
    network: Any, settings: Any, request: Request, measured: Calibration, data_bytes: int, *, on_gpu: bool
) -> dict[str, int]:
    """Return the parts of the peak; without a measured one, the parts that can be counted."""
    config = network.config
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    trained = sum(p.numel() * p.element_size() for p in network.parameters() if p.requires_grad)
    B, T, E = settings.batch_size, request.seq_len, config.hidden_size
    HD = config.num_attention_heads * config.attention_head_size
    lsh, depth = list(config.attn_layers).count("lsh"), len(config.attn_layers)
    wide = 4
    stored = 1 if getattr(config, "reversible", True) else depth
    positions = lsh * B * T * config.num_attention_heads * config.num_hashes * 2
    fixed = {
        "weights": weights,
        "gradients": trained,
        "optimizer (two moments)": 2 * trained,
    }
    chunk = min(T, config.chunk_size_lm_head or 1024)
    classes = config.vocab_size if "LM" in type(network).__name__ else 2
    rows = {
        # The pair, its low parts, the gradients of the pair.
        "streams, low parts and their gradients": 6 * wide * B * T * E * stored,
        # Queries, keys, values, the result, and the gradient of each.
        "attention": 8 * wide * B * T * HD * stored,
        "head and loss": 3 * wide * B * chunk * classes if request.loss_only else 3 * wide * B * T * classes,
        "buckets kept by LSH layers": positions,
        "batches": 2 * 8 * B * T,
    }
    if measured.peak is None:
        return {**fixed, **rows, "data": data_bytes}
    beyond = request.seq_len - measured.length
    growth = measured.bytes_per_token * beyond
    if beyond:
        # What was measured has one LSH layer, if any, and keeps no freed results.
        growth += max(0, lsh - 1) * positions / max(1, lsh) * beyond / T
        kept = min(KEPT_AT_MOST, measured.kept * T / measured.length)
        growth += 0 if on_gpu else max(0, kept - measured.kept)
    total = round(measured.peak + growth)
    room = total - sum(fixed.values())
    explained = sum(rows.values())
    if 0 < room < explained:
        # Some are not there at the same time: their shares of what is.
        rows = {name: round(size * room / explained) for name, size in rows.items()}
    other = total - sum(fixed.values()) - sum(rows.values())
    return {**fixed, **rows, OTHER: other, "data": data_bytes}


# --- the other process ------------------------------------------------------------------------------------------------


def _in_fresh_process(request: Request) -> Calibration:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "request.pt", Path(folder) / "answer.json"
        torch.save(request, asked)
        code = "from flash_reformer.training.calibration import main; main()"
        command = [sys.executable, "-c", code, str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        if done.returncode or not answered.is_file():
            lines = done.stderr.strip().splitlines() or ["it said nothing"]
            killed = " (killed: out of memory?)" if done.returncode in (-9, 137) else ""
            raise RuntimeError(f"the calibration failed with exit code {done.returncode}{killed}: {lines[-1]}")
        return Calibration(**json.loads(answered.read_text("utf-8")))


def data_memory(before: int | None) -> int:
    """Return how many bytes this process has grown by since ``before``; 0 where that is unknown."""
    now = memory_of_process()
    return 0 if before is None or now is None else max(0, now - before)
