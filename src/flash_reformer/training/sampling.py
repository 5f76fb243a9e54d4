"""Text out of a trained language model."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.generation.streamers import BaseStreamer

from flash_reformer.models.modeling_language import ReformerModelWithLMHead
from flash_reformer.tokenization.bytes import VOCAB_SIZE
from flash_reformer.training.quiet import quiet_transformers
from flash_reformer.training.vocabulary import Vocabulary


def load_language_model(folder: str | Path) -> Any:
    """Load a causal language model that ``save_pretrained`` wrote; ``ValueError`` says what is wrong with it."""
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} is no saved model: there is no config.json in it")
    with quiet_transformers():
        saved, _ = PreTrainedConfig.get_config_dict(path)
        # First of all: what a causal model refuses of such a config would say nothing of what is wrong.
        if not saved.get("is_decoder", False):
            raise ValueError(f"{path} is no causal language model: its config says is_decoder=False")
        model = ReformerModelWithLMHead.from_pretrained(path)
    return model.eval()


def load_vocabulary(folder: str | Path, vocab_size: int) -> Vocabulary:
    """Load the tokenizer beside a model; one without any is byte-level if its vocabulary has 258 entries."""
    if Vocabulary.stands_in(folder):
        vocabulary = Vocabulary.load(str(folder))
    elif vocab_size == VOCAB_SIZE:
        vocabulary = Vocabulary.of_bytes()
    else:
        raise ValueError(
            f"{folder} holds no tokenizer, and it is no byte-level model: its vocabulary has {vocab_size} entries, "
            f"not {VOCAB_SIZE}"
        )
    if vocabulary.size > vocab_size:
        raise ValueError(f"{folder} has a tokenizer of {vocabulary.size} entries and a model of {vocab_size}")
    return vocabulary


@dataclass(frozen=True)
class Written:
    """What a model wrote, and how long it took.

    Attributes:
        text: the bytes that are new.
        prompt_tokens, new_tokens: tokens read and written, the end-of-text tokens included.
        prompt_seconds: until the first token was there; ``seconds``: from then to the last.
    """

    text: bytes
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first by the time they took; None where there was only one."""
        return (self.new_tokens - 1) / self.seconds if self.new_tokens > 1 and self.seconds > 0 else None


class _Stream(BaseStreamer):
    """Passes text on as its tokens come: as much of it as later tokens cannot change."""

    def __init__(self, vocabulary: Vocabulary, start: list[int], pass_on: Callable[[bytes], None] | None) -> None:
        self._vocabulary = vocabulary
        self._ids = start
        self._pass_on = pass_on
        # Text is decoded from the first of these places; up to the second it has been passed on. What stands between
        # them decides how the next token is joined. Both are places between whole characters.
        self._from, self._passed = 0, len(start)
        self.times: list[float] = [time.perf_counter()]

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token after token."""
        if len(self.times) == 1 and not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self._ids += value.flatten().tolist()
        if self._pass_on is None:
            return
        before = self._vocabulary.decode(self._ids[self._from : self._passed])
        now = self._vocabulary.decode(self._ids[self._from :])
        whole = not self._vocabulary.is_piece_of_character(self._ids[-1])
        if whole and now.startswith(before) and len(now) > len(before):
            self._pass_on(now[len(before) :])
            self._from, self._passed = self._passed, len(self._ids)

    def end(self) -> None:
        """Pass on what was held back."""
        if self._pass_on is not None and self._passed < len(self._ids):
            before = self._vocabulary.decode(self._ids[self._from : self._passed])
            rest = self._vocabulary.decode(self._ids[self._from :])[len(before) :]
            if rest:
                self._pass_on(rest)

    _prompt_seen = False


def generate_text(model: Any, prompt: bytes, **options: Any) -> bytes:
    """Return the text of :func:`write_text`, whose options it takes."""
    return write_text(model, prompt, **options).text


def write_text(
    model: Any,
    prompt: bytes,
    *,
    vocabulary: Vocabulary | None = None,
    max_new_tokens: int = 256,
    greedy: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    num_hashes: int | None = None,
    prefill_chunk_size: int | None = None,
    stream: Callable[[bytes], None] | None = None,
) -> Written:
    """Continue ``prompt`` until the model ends the text or ``max_new_tokens`` are there.

    The model sees an end-of-text token before the prompt, as every text has one before it in training. Sampling
    depends on ``seed`` alone, and torch's default generators are left as they were. Without a ``vocabulary``, tokens
    are bytes. ``prefill_chunk_size`` bounds the memory of a long prompt: its first so many tokens are read at once, the
    others by steps. ``stream`` is called with each piece of text as it comes; the pieces make up the text.
    """
    _check_sampling(max_new_tokens, greedy, temperature, top_k, top_p, num_hashes, prefill_chunk_size)
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2**63), got {seed}")
    device = next(model.parameters()).device
    vocabulary = vocabulary or Vocabulary.of_bytes()
    start = vocabulary.encode(prompt).ids.tolist()
    ids = torch.tensor([[vocabulary.eos_id, *start]], device=device)
    limit = model.config.max_length_of_positions
    if ids.shape[1] + max_new_tokens > limit:
        raise ValueError(
            f"max_new_tokens {max_new_tokens} after a prompt of {len(start)} tokens is more than the model has "
            f"positions for: {limit}, one of them for the start of the text"
        )
    choice: dict[str, Any] = {"do_sample": not greedy}
    if not greedy:
        # HF's own defaults are top_k=50 and top_p=1; "not given" means here that nothing is cut off.
        choice |= {"temperature": temperature, "top_k": top_k or 0, "top_p": 1.0 if top_p is None else top_p}
    if num_hashes is not None:
        choice["num_hashes"] = num_hashes
    if prefill_chunk_size is not None:
        choice["prefill_chunk_size"] = prefill_chunk_size
    devices = [device] if device.type == "cuda" else []
    streamer = _Stream(vocabulary, list(start), stream)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=vocabulary.eos_id,
            pad_token_id=vocabulary.pad_id,
            streamer=streamer,
            **choice,
        )
    written = output[0, ids.shape[1] :].tolist()
    if vocabulary.is_bytes:
        text = vocabulary.decode(written)
    else:
        # Together, so that what joins two tokens, such as a space, is there at the seam too.
        whole, before = vocabulary.decode([*start, *written]), vocabulary.decode(start)
        text = whole[len(before) :]
    begin, first, *_ = times = streamer.times
    return Written(text, ids.shape[1], len(written), first - begin, times[-1] - first)


def _check_sampling(
    max_new_tokens: int,
    greedy: bool,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    num_hashes: int | None,
    prefill_chunk_size: int | None,
) -> None:
    counts = {
        "max_new_tokens": max_new_tokens,
        "top_k": top_k,
        "num_hashes": num_hashes,
        "prefill_chunk_size": prefill_chunk_size,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}; for the likeliest tokens use greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    if greedy and (temperature != 1.0 or top_k is not None or top_p is not None):
        raise ValueError("greedy takes the likeliest token each time: temperature, top_k and top_p contradict it")
