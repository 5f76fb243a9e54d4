"""Layers against transformers' Reformer, and attention against FlexAttention.

A layer is the projections and the attention, without the output projection. transformers' runs in fp32 only: its bf16
merges rounds wrongly. So ours is timed in fp32, like against like, and in bf16, as one would use it; rows say which.

Letters: B batch, T positions, H heads, D head size, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.models.reformer import ReformerConfig as TheirConfig
from transformers.models.reformer import modeling_reformer as theirs

from benchmarks.contestants import Entry, fields
from benchmarks.gpu.attention import PASSES, Case, runner
from benchmarks.gpu.device import Run
from benchmarks.gpu.lanes import OVER, Lane, Prediction, Row, spare
from benchmarks.gpu.stages import Context, describe
from flash_reformer import ReformerConfig
from flash_reformer.functional import normalize_keys
from flash_reformer.layers.attention import LocalSelfAttention, LSHSelfAttention
from flash_reformer.layers.call import Call

KINDS: dict[str, tuple[Any, Any]] = {
    "lsh": (LSHSelfAttention, theirs.LSHSelfAttention),
    "local": (LocalSelfAttention, theirs.LocalSelfAttention),
}


def layers(context: Context) -> Row:
    """Time our layers against those of transformers."""
    plan, rows, prediction = context.plan, context.rows, Prediction(power=1)

    def key(who: Row) -> tuple[Any, ...]:
        return who["who"], who["kind"], who["rounds"], who["passes"]

    for length in plan.layer_lengths:
        for kind, rounds in (("lsh", plan.many), ("lsh", plan.few), ("local", 0)):
            at = {"kind": kind, "length": length, "rounds": rounds}
            if context.share.out():
                rows.append({"who": "all", **at, "not_run": OVER})
                continue
            lanes = [
                Lane(
                    {"who": who, "dtype": str(dtype).removeprefix("torch."), **at, "passes": passes},
                    lambda who=who, dtype=dtype, at=at, passes=passes: _layer(context, who, dtype, at, passes),
                )
                for who, dtype in (
                    ("ours", torch.bfloat16),
                    ("ours", torch.float32),
                    ("transformers", torch.float32),
                )
                for passes in PASSES
            ]
            kept, told = spare(lanes, prediction, plan.slow, key)
            found = context.race(kept)
            for row in found:
                if "median_s" in row and row["who"] != "ours":
                    prediction.learn(key(row), length, row["median_s"])
            rows += found + told
            for row in told:
                context.say(describe(row))
    return {"rows": rows}


def _layer(context: Context, who: str, dtype: torch.dtype, at: Row, passes: str) -> Run:
    plan, device = context.plan, context.device.torch
    entry = Entry(who, at["kind"], at["length"], at["rounds"], passes)
    head_size = plan.head_sizes[0]
    wide = {"hidden_size": plan.heads * head_size, "num_attention_heads": plan.heads, "attention_head_size": head_size}
    chunks = {"lsh_attn_chunk_length": plan.chunk, "local_attn_chunk_length": plan.chunk}
    axial = {"axial_pos_embds_dim": (head_size, (plan.heads - 1) * head_size)}
    made = fields(entry, **wide, **chunks, **axial)
    ours, other = KINDS[at["kind"]]
    torch.manual_seed(0)
    layer: nn.Module = ours(ReformerConfig(**made), 0) if who == "ours" else other(TheirConfig(**made), 0)
    layer = layer.to(device, dtype).train(passes == "training")
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, at["length"], wide["hidden_size"])
    hidden, grad = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2))
    hidden.requires_grad_()

    def attend() -> Tensor:
        if who == "ours":
            # Fresh randomness in every call, drawn where the layer is, as a model draws it.
            call = Call(
                mask_BT=None,
                num_hashes=max(1, entry.rounds),
                bucket_factors=entry.factors,
                rotation_seed=None,
                seeds_LX=torch.randint(2**63 - 1, (1, 2), device=device),
                exact=False,
                backend=context.backend,
            )
            return layer(hidden, call)[0]
        return layer(hidden).hidden_states

    return runner(attend, (hidden, *layer.parameters()), grad, passes)


# --- FlexAttention ----------------------------------------------------------------------------------------------------


def window_mask(
    length: int, chunk: int, block: int, device: torch.device, mask_mod: Callable[..., Tensor]
) -> BlockMask:
    """Return the blocks that windows of the own chunk and the one before it touch, on the ring."""
    assert block % chunk == 0
    N = length // block
    own = torch.arange(N, dtype=torch.int32, device=device)
    # A row of block numbers: the own one, the one before it, and then what does not count.
    indices = torch.zeros(N, N, dtype=torch.int32, device=device)
    indices[:, 0], count = own, 1
    if N > 1:
        indices[:, 1], count = (own - 1) % N, 2
    counts = torch.full((N,), count, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(counts[None, None], indices[None, None], BLOCK_SIZE=block, mask_mod=mask_mod)


class Flex:
    """Our attention with one round, stated for FlexAttention over slots in sorted order: same keys, same scores."""

    def __init__(self, case: Case, compiled: Callable[..., Tensor]) -> None:
        self._case, self._compiled = case, compiled
        with torch.no_grad():
            self.positions = case.positions(case.buckets(case.rotations()))
            places = self.positions[0, :, 0]  # [H, T]: which position stands in a slot
        length, chunk = case.length, case.chunk
        order = places.long()[None, :, :, None].expand(1, case.heads, length, case.head_size)
        self._order, places = order, places.to(torch.int32)
        chunks = length // chunk

        def see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            mine, other = q // chunk, k // chunk
            near = (mine == other) | (mine == (other + 1) % chunks)
            return near & (places[h, k] <= places[h, q])

        def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return torch.where(places[h, k] == places[h, q], -1e5, score)

        self._score = score
        self._mask = window_mask(length, chunk, min(128, length), case.device.torch, see)

    def slots(self) -> tuple[Tensor, Tensor]:
        """Return query-key and value in sorted order, ``[1, H, T, D]``."""
        qk, _, v, _ = self._case.tensors
        return qk.transpose(1, 2).gather(2, self._order), v.transpose(1, 2).gather(2, self._order)

    def attend(self, qk: Tensor, v: Tensor) -> Tensor:
        """Return outputs in sorted order."""
        return self._compiled(qk, normalize_keys(qk), v, score_mod=self._score, block_mask=self._mask, scale=1.0)

    def whole(self) -> Tensor:
        """Gather, attend, scatter: ``[1, T, H, D]`` of unsorted tensors."""
        out = self.attend(*self.slots())
        return torch.zeros_like(out).scatter(2, self._order, out).transpose(1, 2)

    def sorted_run(self, passes: str) -> Run:
        """Return the call on slots that are sorted already, which leaves out what gathers cost."""
        with torch.no_grad():
            qk, v = (x.detach().contiguous() for x in self.slots())
            grad = self._case.grad.transpose(1, 2).gather(2, self._order).contiguous()
        # Without a backward no gradient may be asked for: a CPU has none.
        inputs = tuple(x.requires_grad_(passes != "forward") for x in (qk, v))
        return runner(lambda: self.attend(*inputs), inputs, grad, passes)


def flex(context: Context) -> Row:
    """Time attention with given positions, one round, against FlexAttention; its compilation does not count."""
    plan, rows = context.plan, context.rows
    compiled = context.device.compile(flex_attention)
    measured = PASSES if plan.measures else PASSES[:1]
    for length in plan.flex_lengths:
        at = {"length": length, "rounds": 1}
        # What is compiled cannot be interrupted.
        if context.share.out(needed=20.0 if plan.measures else 0.0):
            rows.append({"who": "all", **at, "not_run": OVER})
            continue
        case = context.case(length, plan.head_sizes[0], rounds=1)
        try:
            peer = Flex(case, compiled)
            buckets = case.buckets(case.rotations())
            with torch.no_grad():
                mine, other = case.attend(peer.positions, buckets).float(), peer.whole().float()
            error = ((mine - other).norm() / mine.norm()).item()
        except Exception as failed:
            rows.append({"who": "flex", **at, "error": f"{type(failed).__name__}: {str(failed)[:300]}"})
            context.say(describe(rows[-1]))
            context.device.free()
            continue

        def ours(passes: str, case: Case = case, peer: Flex = peer, buckets: Tensor = buckets) -> Run:
            return runner(lambda: case.attend(peer.positions, buckets), case.inputs_of("lsh"), case.grad, passes)

        def whole(passes: str, case: Case = case, peer: Flex = peer) -> Run:
            return runner(peer.whole, case.inputs_of("lsh"), case.grad, passes)

        builders = {"ours": ours, "flex, gather and scatter": whole, "flex, sorted inputs given": peer.sorted_run}
        lanes = [
            Lane({"who": who, **at, "passes": passes}, lambda build=build, passes=passes: build(passes))
            for who, build in builders.items()
            for passes in measured
        ]
        rows += [{**row, "difference": error} for row in context.race(lanes)]
    return {"rows": rows}
