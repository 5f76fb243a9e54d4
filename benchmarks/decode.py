"""What does a token cost after a long context, here and in transformers' Reformer?

Run ``python -m benchmarks.decode``. Both models have the same weights; at each context both read the same prompt and
then take steps in turn, so that whatever disturbs the machine disturbs both. Prints a table and one JSON line last.

A step of ours is first checked against the forward without a cache; nothing is reported if they disagree.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.reformer import ReformerConfig as TheirConfig
from transformers.models.reformer import ReformerModelWithLMHead as TheirModel

from benchmarks.depth_memory import peak_rss
from benchmarks.shapes import NOVEL
from flash_reformer import ReformerConfig, ReformerModelWithLMHead

CONTEXTS = (512, 4096, 16_384, 65_536, 262_144)
BATCH, BATCH_CONTEXT = 8, 4096
PREFILL_CONTEXT, PREFILL_CHUNKS = 65_536, (None, 4096)


def check_parity() -> None:
    """Refuse to go on unless cached steps equal the forward without a cache, where they must: one LSH layer."""
    small = {**NOVEL, "attn_layers": ["local", "lsh"], "local_attn_chunk_length": 16, "lsh_attn_chunk_length": 16}
    torch.manual_seed(1)
    model = ReformerModelWithLMHead(ReformerConfig(**{**small, "num_buckets": [4, 8], "hash_seed": 0})).double().eval()
    ids = torch.randint(320, (2, 130))
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_buckets_states
        for end in range(21, 131):
            cached = model(ids[:, end - 1 : end], past_buckets_states=cache).logits[:, -1]
            error = (cached - model(ids[:, :end], use_cache=False).logits[:, -1]).abs().max().item()
            if not error < 1e-9:
                raise SystemExit(f"parity is red: error {error:.3g} at {end} tokens; nothing is measured")


class Decoder:
    """A model, its prompt read, that takes one step at a time."""

    def __init__(self, step: Callable[[Tensor, Any], Any], prompt: Tensor, first: dict[str, Any]) -> None:
        self._step = step
        start = time.perf_counter()
        output = step(prompt, first)
        self.prefill_s = time.perf_counter() - start
        self.cache, self.token = output.past_buckets_states, output.logits[:, -1:].argmax(-1)
        self.times: list[float] = []

    def step(self, *, record: bool = True) -> None:
        """Feed the likeliest token back."""
        start = time.perf_counter()
        output = self._step(self.token, {"past_buckets_states": self.cache})
        self.token = output.logits[:, -1:].argmax(-1)
        if record:
            self.times.append(time.perf_counter() - start)
        self.cache = output.past_buckets_states

    @property
    def step_ms(self) -> float:
        """Mean, not median: growing and merging happen seldom, and they count."""
        return 1e3 * statistics.fmean(self.times)


def ours(model: Any, prompt: Tensor) -> Decoder:
    """Return our decoder with its prompt read."""
    return Decoder(lambda ids, more: model(ids, logits_to_keep=1, **more), prompt, {"use_cache": True})


def theirs(model: Any, prompt: Tensor) -> Decoder:
    """Return that of transformers, which prints as it goes."""

    def step(ids: Tensor, more: dict[str, Any]) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return model(ids, **more)

    return Decoder(step, prompt, {"use_cache": True})


def race(our_model: Any, their_model: Any, context: int, steps: int, their_steps: int) -> dict[str, Any]:
    """Measure both at one context."""
    prompt = torch.randint(320, (1, context), generator=torch.Generator().manual_seed(context))
    mine, other = ours(our_model, prompt), theirs(their_model, prompt)
    for decoder in (mine, other):
        decoder.step(record=False)
    for turn in range(their_steps):
        for _ in range(turn * steps // their_steps, (turn + 1) * steps // their_steps):
            mine.step()
        other.step()
    return {
        "context": context,
        "prefill_s": round(mine.prefill_s, 3),
        "theirs_prefill_s": round(other.prefill_s, 3),
        "step_ms": round(mine.step_ms, 3),
        "median_ms": round(1e3 * statistics.median(mine.times), 3),
        "theirs_step_ms": round(other.step_ms, 3),
        "faster": round(other.step_ms / mine.step_ms, 1),
        "cache_mb": round(mine.cache.nbytes / 1e6, 1),
    }


def batches(model: Any, context: int, steps: int) -> dict[str, Any]:
    """Measure one row against several, of one length and of as many lengths, steps in turn."""
    prompt = torch.randint(320, (BATCH, context), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    for row in range(BATCH):
        mask[row, : row * context // (2 * BATCH)] = 0
    one, many = ours(model, prompt[:1]), ours(model, prompt)
    padded = Decoder(
        lambda ids, more: model(ids, logits_to_keep=1, **more), prompt, {"use_cache": True, "attention_mask": mask}
    )
    for decoder in (one, many, padded):
        decoder.step(record=False)
    for _ in range(steps):
        for decoder in (one, many, padded):
            decoder.step()
    return {
        "context": context,
        "one_ms": round(one.step_ms, 3),
        f"batch_{BATCH}_ms": round(many.step_ms, 3),
        f"padded_{BATCH}_ms": round(padded.step_ms, 3),
        "ratio": round(many.step_ms / one.step_ms, 2),
        "padded_ratio": round(padded.step_ms / one.step_ms, 2),
    }


def prefill(context: int, chunk_size: int | None) -> dict[str, Any]:
    """Read a prompt through ``generate`` in this process and return what it took."""
    torch.manual_seed(0)
    model = ReformerModelWithLMHead(ReformerConfig(**NOVEL)).eval()
    prompt = torch.randint(320, (1, context), generator=torch.Generator().manual_seed(context))
    before, start = peak_rss(), time.perf_counter()
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 1, "prefill_chunk_size": chunk_size}
    output = model.generate(prompt, return_dict_in_generate=True, **options)
    return {
        "context": context,
        "prefill_chunk_size": chunk_size,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_mb": round((peak_rss() - before) / 1e6),
        "cache_mb": round(output.past_key_values.nbytes / 1e6),
    }


def prefills() -> list[dict[str, Any]]:
    """Read a long prompt at once and in chunks, each in a fresh process, and print what it takes."""
    rows = []
    for chunk_size in PREFILL_CHUNKS:
        command = [sys.executable, "-m", "benchmarks.decode", "--prefill", str(PREFILL_CONTEXT), str(chunk_size or 0)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        how = "at once" if chunk_size is None else f"by {chunk_size}"
        print(f"{PREFILL_CONTEXT} tokens {how}: {rows[-1]['seconds']} s, peak {rows[-1]['peak_mb']} MB", flush=True)
    return rows


def main() -> None:
    """Run the races and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS), help="tokens of the prompts")
    parser.add_argument("--steps", type=int, default=1100, help="tokens of ours to time at each (merges count)")
    parser.add_argument("--prefill", type=int, nargs=2, help="one prefill: tokens, and how many at a time (0: all)")
    arguments = parser.parse_args()
    if arguments.prefill:
        context, chunk_size = arguments.prefill
        print(json.dumps(prefill(context, chunk_size or None)))
        return
    check_parity()
    torch.manual_seed(0)
    our_model = ReformerModelWithLMHead(ReformerConfig(**NOVEL)).eval()
    their_model = TheirModel(TheirConfig(**NOVEL)).eval()
    their_model.load_state_dict(our_model.state_dict())
    rows = []
    print(f"{'context':>8} {'prefill s':>10} {'theirs':>8} {'ms/token':>9} {'theirs':>9} {'faster':>7} {'cache MB':>9}")
    with torch.no_grad():
        for context in arguments.contexts:
            row = race(our_model, their_model, context, arguments.steps, 20 if context < 2**16 else 4)
            rows.append(row)
            print(
                f"{context:>8} {row['prefill_s']:>10.2f} {row['theirs_prefill_s']:>8.2f} {row['step_ms']:>9.2f} "
                f"{row['theirs_step_ms']:>9.2f} {row['faster']:>6.1f}x {row['cache_mb']:>9.1f}",
                flush=True,
            )
        batch = batches(our_model, BATCH_CONTEXT, arguments.steps)
    flat = rows[-1]["step_ms"] / rows[0]["step_ms"]
    print(f"{rows[-1]['context']} costs {flat:.2f} times {rows[0]['context']}")
    print(
        f"batch {BATCH} costs {batch['ratio']} times batch 1 at {batch['context']}, "
        f"with rows of different lengths {batch['padded_ratio']} times"
    )
    result = {"rows": rows, "longest_over_shortest": round(flat, 2), "batch": batch, "prefill": prefills()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
