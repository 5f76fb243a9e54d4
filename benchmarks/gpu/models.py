"""Whole models: training steps, decoding, and the longest sequence that trains.

A training step is the forward with labels and without logits, the backward, and AdamW (fused), under autocast to bf16,
a batch of one. Peaks are those of a step after the first. Letters: B batch, T positions.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from benchmarks.gpu.lanes import OUT_OF_MEMORY, OVER, Row, failure
from benchmarks.gpu.stages import Context
from flash_reformer import ReformerConfig, ReformerModelWithLMHead

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}


class Trainer:
    """A model and its optimizer."""

    def __init__(self, device: Device, backend: str, fields: dict[str, Any], length: int) -> None:
        torch.manual_seed(0)
        self.device, self.length = device, length
        self.model: Any = ReformerModelWithLMHead(ReformerConfig(**fields)).to(device.torch).train()
        self.model.set_backend(backend)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(fields["vocab_size"], (1, length), generator=generator).to(device.torch)

    def step(self) -> Tensor:
        """Take one step and return the loss, which is also kept."""
        self.device.admit(self.length)
        with torch.autocast(self.device.torch.type, torch.bfloat16):
            loss = self.model(self.ids, labels=self.ids, return_logits=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss = loss.detach()
        return self.loss


def train(context: Context, fields: dict[str, Any], length: int, cap: float | None, steps: int) -> Row:
    """Return what training steps take within so many GB, or that they do not fit."""
    device = context.device
    with device.cap(cap):
        try:
            trainer = Trainer(device, context.backend, fields, length)
            start = time.perf_counter()
            loss = trainer.step().item()
            first = time.perf_counter() - start
            device.reset_peak()
            times = sorted(device.times(trainer.step, steps, cold=False)) if steps else [first]
            row: Row = {"step_s": times[len(times) // 2], "steps": len(times), "first_s": first, **device.peak()}
            row["tokens_per_s"] = length / row["step_s"]
            last = trainer.loss.item()
            if not all(map(_is_finite, (loss, last))):
                return {**row, "error": f"the loss is {loss}, then {last}"}
            return {**row, "loss": [loss, last]}
        except Exception as error:
            error.__traceback__ = None
            return {"error": failure(error)}
        finally:
            trainer = None


def _is_finite(x: float) -> bool:
    return x - x == 0.0


def models(context: Context) -> Row:
    """Train the reference sizes, and that of one novel with a table of a million positions."""
    plan, rows = context.plan, context.rows
    million = plan.million[0] * plan.million[1]
    larger = {**plan.novel, "axial_pos_shape": plan.million, "max_position_embeddings": million}
    chunked = {"chunk_size_feed_forward": plan.feed_forward_chunk}
    runs: list[tuple[str, dict[str, Any], int, float | None]] = [
        ("novel", plan.novel, plan.novel_length, plan.novel_gb),
        ("novel, a million positions", larger, million, plan.million_gb),
        ("novel, a million positions, feed-forward in chunks", {**larger, **chunked}, million, plan.million_gb),
        ("bytes", plan.bytes_model, plan.bytes_length, None),
        ("novel, no dropout", {**plan.novel, **NO_DROPOUT}, plan.novel_length, None),
        ("novel, feed-forward in chunks", {**plan.novel, **chunked}, plan.novel_length, None),
        ("bytes, no dropout", {**plan.bytes_model, **NO_DROPOUT}, plan.bytes_length, None),
    ]
    for name, fields, length, cap in runs:
        at = {"who": "ours", "model": name, "length": length, "cap_gb": cap}
        row = {"not_run": OVER} if context.share.out() else train(context, fields, length, cap, plan.steps)
        rows.append({**at, **row})
        context.say(describe_step(rows[-1], plan.measures))
        if cap is not None and row.get("error") == OUT_OF_MEMORY and not context.share.out():
            rows.append({**at, "cap_gb": None, **train(context, fields, length, None, plan.steps)})
            context.say(describe_step(rows[-1], plan.measures))
    return {"rows": rows}


def describe_step(row: Row, measures: bool) -> str:
    """Return a row for people."""
    cap = f" within {row['cap_gb']:g} GB" if row.get("cap_gb") else ""
    what = f"training step, {row['model']}, {row['length']} tokens{cap}"
    if "step_s" not in row or "error" in row:
        return f"{what}: {row.get('error') or 'not run: ' + row['not_run']}"
    if not measures:
        return f"{what}: ran (rehearsal, no measurement)"
    peak = f"{row['allocated_gb']:.2f} GB allocated, {row['reserved_gb']:.2f} reserved"
    return f"{what}: {1e3 * row['step_s']:.1f} ms, {row['tokens_per_s']:,.0f} tokens/s, peak {peak}"


def longest(context: Context) -> Row:
    """Double the length until memory or time ends, in each cap; a model like that of the novel, larger tables."""
    plan, rows, found = context.plan, context.rows, {}
    length, last = plan.longest_from, 0.0
    for name, cap in plan.caps:
        best = None
        while True:
            # A step takes about as long again per token; what is built and warmed up comes on top.
            if context.share.out(needed=2.5 * last):
                stop = f"time: {length} tokens would take about {2 * last:.0f} s"
                break
            start = time.perf_counter()
            row = train(context, long_fields(plan.novel, length, plan.feed_forward_chunk), length, cap, steps=0)
            rows.append({"who": "ours", "model": f"longest, {name}", "length": length, "cap_gb": cap, **row})
            context.say(describe_step(rows[-1], plan.measures))
            if "error" in row:
                stop = row["error"]
                break
            best, last = length, time.perf_counter() - start
            length *= 2
        if best is None and found:
            best = max((each["tokens"] or 0 for each in found.values()), default=None) or None
        found[name] = {"tokens": best, "stopped_by": stop, "tried": length}
    return {"rows": rows, "longest": found}


def long_fields(novel: dict[str, Any], length: int, feed_forward_chunk: int) -> dict[str, Any]:
    """Return the novel's configuration with a larger table of positions and as many buckets as that needs."""
    power = length.bit_length() - 1
    assert length == 2**power, "lengths are doubled"
    shape = (2 ** (power // 2), 2 ** (power - power // 2))
    sizes = {"axial_pos_shape": shape, "max_position_embeddings": length, "num_buckets": None}
    return {**novel, **sizes, "chunk_size_feed_forward": feed_forward_chunk}


def decode(context: Context) -> Row:
    """Time cached steps after prompts, the likeliest token fed back, in bf16."""
    plan, device, rows = context.plan, context.device, context.rows
    torch.manual_seed(0)
    model: Any = ReformerModelWithLMHead(ReformerConfig(**plan.novel)).to(device.torch, torch.bfloat16).eval()
    model.set_backend(context.backend)
    for context_length in plan.contexts:
        for batch in plan.batches:
            row: Row = {"who": "ours", "context": context_length, "batch": batch}
            try:
                row |= {"not_run": OVER} if context.share.out() else _decode(context, model, context_length, batch)
            except Exception as error:
                error.__traceback__ = None
                row["error"] = failure(error)
            rows.append(row)
            device.free()
            context.say(_describe_decode(row, plan.measures))
    return {"rows": rows}


def _decode(context: Context, model: Any, length: int, batch: int) -> Row:
    device, plan = context.device, context.plan
    vocabulary, generator = model.config.vocab_size, torch.Generator().manual_seed(length)
    prompt = torch.randint(vocabulary, (batch, length), generator=generator).to(device.torch)
    with torch.no_grad():
        device.sync()
        start = time.perf_counter()
        output = model(prompt, use_cache=True, logits_to_keep=1)
        device.sync()
        prefill = time.perf_counter() - start
        steps, begin = 0, time.perf_counter()
        while steps < plan.decode_steps:
            # The first ones warm up.
            if steps == 2:
                device.sync()
                begin = time.perf_counter()
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, past_buckets_states=output.past_buckets_states, logits_to_keep=1)
            steps += 1
            if steps > 10 and steps % 10 == 2 and time.perf_counter() - begin > plan.decode_s:
                break
        device.sync()
        seconds = (time.perf_counter() - begin) / max(1, steps - 2)
    return {"prefill_s": prefill, "steps": steps, "step_s": seconds, "tokens_per_s": batch / seconds}


def _describe_decode(row: Row, measures: bool) -> str:
    what = f"decoding, context {row['context']}, batch {row['batch']}"
    if "step_s" not in row:
        return f"{what}: {row.get('error') or 'not run: ' + row['not_run']}"
    if not measures:
        return f"{what}: ran (rehearsal, no measurement)"
    step = f"{row['tokens_per_s']:,.0f} tokens/s, {1e3 * row['step_s']:.2f} ms a step"
    return f"{what}: {step}, prompt {row['prefill_s']:.3f} s"
