"""How well a causal language model predicts a whole text: in one window, or in windows that slide over it."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flash_reformer.training.data import Document, hold_out, tail_start
from flash_reformer.training.packing import IGNORED_LABEL, pack
from flash_reformer.training.run_folder import SETTINGS_FILE, recorded_task, resumed_settings
from flash_reformer.training.settings import PRECISIONS
from flash_reformer.training.stream_text import held_out_files
from flash_reformer.training.tasks import TASKS
from flash_reformer.training.tasks.causal import read_documents
from flash_reformer.training.vocabulary import Vocabulary

#: Told after each window: predictions made, and to be made.
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class TextScore:
    """How a text was predicted.

    Attributes:
        nats: cross-entropy of all predictions together.
        tokens: predictions; every token of the text, and its end, once.
        bytes: bytes of the text.
        windows: forward passes.
        context: tokens of a window, at most.
        stride: tokens from one window's start to the next one's.
        seconds: time that it took.
    """

    nats: float
    tokens: int
    bytes: int
    windows: int
    context: int
    stride: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        """Bits for a byte of the text."""
        return self.nats / math.log(2) / self.bytes

    @property
    def bits_per_token(self) -> float:
        """Bits for a token."""
        return self.nats / math.log(2) / self.tokens

    @property
    def perplexity(self) -> float:
        """Perplexity per token."""
        return math.exp(min(self.nats / self.tokens, 700.0))


@dataclass(frozen=True)
class Window:
    """Tokens ``start`` up to ``stop`` are read, and those from ``first`` on are predicted."""

    start: int
    stop: int
    first: int


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield windows that together predict each of ``tokens`` but the first exactly once.

    Each window has ``context`` tokens, or all there are. Predictions after the first window's have at least
    ``context - stride`` tokens before them; the last window reaches back to be as long as the others.
    """
    stop = min(context, tokens)
    yield Window(0, stop, 1)
    while stop < tokens:
        first, stop = stop, min(stop + stride, tokens)
        yield Window(stop - context, stop, first)


def evaluate_text(
    model: Any,
    text: bytes | Sequence[bytes],
    *,
    vocabulary: Vocabulary | None = None,
    context: int | str | None = None,
    stride: int | None = None,
    num_hashes: int | None = None,
    precision: str = "fp32",
    seed: int = 0,
    report: Report | None = None,
) -> TextScore:
    """Predict every token of a text from those before it, and the end of the text; memory is that of one window.

    The model sees an end-of-text token before a text, as in training; several texts are judged one by one and added
    up. Only losses are made, a chunk of positions at a time. LSH layers are not prefix-stable: what comes later in a
    window has a say in how it is sorted, though no token sees a later one. Rotations depend on ``seed`` alone, the same
    for every window, and torch's default generators are left as they were.

    Args:
        model: a causal language model.
        text: the bytes of one text, or of several.
        vocabulary: the tokenizer; by default tokens are bytes.
        context: tokens of a window; ``"full"`` for the whole text at once, None for that as far as there are positions.
        stride: tokens from one window to the next, from 1 (slow, most context) up to ``context - 1``, where windows
            share one token as training's blocks do; by default half of ``context``.
        num_hashes: rounds of hashing, in place of the model's own.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` (on a GPU): the arithmetic, by autocast.
        seed: of the rotations.
        report: told how far it is.
    """
    vocabulary = vocabulary or Vocabulary.of_bytes()
    _check(model, context, stride, num_hashes, precision, seed)
    texts = [text] if isinstance(text, bytes) else list(text)
    if not any(texts):
        raise ValueError("text is empty: there is nothing to predict")
    began = time.monotonic()
    limit = model.config.max_length_of_positions
    # Tokens are held, two or four bytes each; all else is made window by window.
    packed = [pack([Document("text", each)], vocabulary).ids for each in texts if each]
    longest = max(len(ids) for ids in packed)
    if context == "full" and longest > limit:
        raise ValueError(
            f"context 'full' would be {longest} tokens, more than the {limit} positions of the model: give a number"
        )
    size = min(context if isinstance(context, int) else longest, limit, longest)
    step = max(1, size // 2) if stride is None else stride
    step = min(step, max(1, size - 1))
    total = sum(len(ids) - 1 for ids in packed)
    nats, count, done = 0.0, 0, 0
    for ids in packed:
        for window in windows(len(ids), size, step):
            nats += _judge(model, ids, window, num_hashes, precision, seed)
            count += 1
            done += window.stop - window.first
            if report is not None:
                report(done, total)
    return TextScore(nats, total, sum(map(len, texts)), count, size, step, time.monotonic() - began)


def _judge(model: Any, ids: Any, window: Window, num_hashes: int | None, precision: str, seed: int) -> float:
    """Return the summed cross-entropy (nats) of a window's predictions."""
    device = next(model.parameters()).device
    ids_1T = torch.from_numpy(ids[window.start : window.stop].astype(np.int64))[None].to(device)
    labels_1T = ids_1T.clone()
    labels_1T[:, : window.first - window.start] = IGNORED_LABEL
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    cast = torch.autocast(device.type, kind) if kind is not None else contextlib.nullcontext()
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad(), cast:
            torch.manual_seed(seed)
            outputs = model(
                ids_1T,
                labels=labels_1T,
                return_logits=False,
                use_cache=False,
                num_hashes=num_hashes,
                num_items_in_batch=1,
            )
    finally:
        model.train(was_training)
    return float(outputs.loss)


def _check(
    model: Any, context: int | str | None, stride: int | None, num_hashes: int | None, precision: str, seed: int
) -> None:
    limit = model.config.max_length_of_positions
    if isinstance(context, str) and context != "full":
        raise ValueError(f"context must be a number of tokens, 'full' or None, got {context!r}")
    if isinstance(context, int) and not 2 <= context <= limit:
        raise ValueError(f"context must be at least 2 and at most {limit}, the positions of the model; got {context}")
    most = (context if isinstance(context, int) else limit) - 1
    if stride is not None and not 1 <= stride <= most:
        raise ValueError(f"stride must be at least 1 and at most context - 1, {most}; got {stride}")
    if stride is not None and context == "full":
        raise ValueError(f"stride {stride} would have no effect: context 'full' is one window")
    if num_hashes is not None and num_hashes < 1:
        raise ValueError(f"num_hashes must be at least 1, got {num_hashes}")
    if num_hashes is not None and "lsh" not in model.config.attn_layers:
        raise ValueError("num_hashes would have no effect: attn_layers has no 'lsh' layer")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and next(model.parameters()).device.type == "cpu":
        raise ValueError("precision fp16 needs a GPU; on a CPU use fp32 or bf16")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2**63), got {seed}")


def tail_of(path: str | Path, fraction: float) -> bytes:
    """Return the last ``fraction`` of a file's bytes: what training holds out of it where there are few files."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"tail must lie strictly between 0 and 1, got {fraction}")
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        file.seek(tail_start(size, fraction, str(path)))
        return file.read()


def held_out_texts(run: str | Path) -> list[bytes]:
    """Return the texts that a run of a language model holds out, by what its folder says."""
    path = Path(run) / SETTINGS_FILE
    if not path.is_file():
        raise ValueError(f"{run} is no run: there is no {SETTINGS_FILE} in it")
    task = recorded_task(path)
    if task not in ("clm", "mlm"):
        raise ValueError(f"{run} is a run of {task}: only language models hold text out")
    settings: Any = resumed_settings(path, TASKS[task].settings_class, {})
    if settings.dataset is None:
        return [part.read(0, part.size) for part in held_out_files(settings)]
    if settings.streaming:
        raise ValueError(f"{run} streams a dataset, and holds out more of it than is read: name a file instead")
    return [document.data for document in hold_out(read_documents(settings), settings.held_out).held_out]
