"""From tensors and options to launches: the host's side of attention.

Letters: B batch, T positions, H heads, D head size, R rounds, C chunk length, N chunks of a ring, G = B*H rings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flash_reformer.kernels.triton._backward import attend_backward_kernel, delta_kernel
from flash_reformer.kernels.triton._forward import attend_kernel, merge_kernel
from flash_reformer.kernels.triton._launch import block_of, dot_dtype, is_hopper, launch, seed_on
from flash_reformer.kernels.triton._random import threshold_of
from flash_reformer.kernels.triton.randomness import kept_scale

#: Positions that one program merges, or takes delta of.
_ROWS = 64


@dataclass(frozen=True)
class Rules:
    """Who sees whom, and how a score is made. ``scale`` is what keys are multiplied by."""

    chunk_length: int
    num_chunks_before: int
    num_chunks_after: int
    causal: bool
    exclude_self: bool
    wrap_around: bool
    attend_across_buckets: bool
    allow_duplicate_attention: bool
    scale: float
    dropout_p: float


@dataclass(frozen=True)
class Facts:
    """What a call knows of its tokens. Without positions, slots are positions; without a key, queries are keys."""

    query_BTHD: Tensor
    key_BTHD: Tensor | None
    v_BTHD: Tensor
    sorted_positions_BHRT: Tensor | None
    buckets_BHRT: Tensor | None
    mask_BT: Tensor | None
    dropout_seed: Tensor | None

    @property
    def num_rounds(self) -> int:
        """R."""
        return 1 if self.sorted_positions_BHRT is None else self.sorted_positions_BHRT.shape[2]

    def check(self, rules: Rules) -> None:
        """Assert what kernels take for granted: where it does not hold, they would write to memory of others."""
        B, T, H, _D = self.query_BTHD.shape
        for name in ("key_BTHD", "v_BTHD"):
            x = getattr(self, name)
            assert x is None or x.shape == self.query_BTHD.shape, f"{name} has shape {tuple(x.shape)}"
        assert T % max(1, rules.chunk_length) == 0, f"{T} positions are no multiple of {rules.chunk_length}"
        for name in ("sorted_positions_BHRT", "buckets_BHRT"):
            x = getattr(self, name)
            assert x is None or (x.shape == (B, H, self.num_rounds, T) and not x.is_floating_point()), name
        assert rules.attend_across_buckets or self.buckets_BHRT is not None, "buckets_BHRT are needed"
        mask = self.mask_BT
        assert mask is None or (mask.shape == (B, T) and mask.dtype == torch.bool), "mask_BT must be bool, [B, T]"
        assert rules.dropout_p == 0.0 or self.dropout_seed is not None, "dropout needs a seed"
        tensors = (self.key_BTHD, self.v_BTHD, self.sorted_positions_BHRT, self.buckets_BHRT, mask)
        assert all(x is None or x.device == self.query_BTHD.device for x in tensors), "tensors are on several devices"


def _chunk_of(sorted_positions_BHRT: Tensor, chunk_length: int) -> Tensor:
    """Return int32 ``[B, H, R, T]``: the chunk on the ring in which a position stands, in every round."""
    _, _, R, T = sorted_positions_BHRT.shape
    slots = torch.arange(R * T, device=sorted_positions_BHRT.device).view(R, T).expand(sorted_positions_BHRT.shape)
    chunks = (slots // chunk_length).to(torch.int32)
    return torch.empty_like(chunks, memory_format=torch.contiguous_format).scatter_(
        -1, sorted_positions_BHRT.long(), chunks
    )


class Shape(NamedTuple):
    """How a kernel over tiles is launched: slots of a tile at most, warps of a program, stages of its loop.

    Sums of wide rows do not fit the registers together, so a ``split`` backward goes over its tiles twice.
    """

    tile: int
    num_warps: int
    num_stages: int
    split: bool = False


def forward_shape(dtype: torch.dtype, block_d: int, hopper: bool, union: bool = False) -> Shape:
    """Choose what compiles without spills (see the table that ``tests/kernels/triton/compiled.py`` prints)."""
    if dtype == torch.float32 or union:
        return Shape(32, 4, 1)
    return Shape(64, 4 if block_d <= 64 else 8, 2 if hopper else 1)


def backward_shape(dtype: torch.dtype, block_d: int, hopper: bool, union: bool = False) -> Shape:
    """Choose what spills least. Before Hopper, operands of products take registers; so do counts, for unions."""
    if dtype == torch.float32:
        return Shape(32 if block_d <= 64 else 16, 8, 1, split=True)
    if block_d > 64 or union:
        return Shape(32, 8, 1, split=True)
    return Shape(64 if hopper else 32, 4, 1)


class Launches:
    """The launches of one call: sizes, arguments that every kernel takes, and constants."""

    def __init__(self, facts: Facts, rules: Rules, most_slots: int) -> None:
        facts.check(rules)
        B, T, H, D = facts.query_BTHD.shape
        R, C = facts.num_rounds, max(1, rules.chunk_length)
        self.like = facts.query_BTHD
        self.rings, self.length, self.heads, self.head_size, self.rounds = B * H, T, H, D, R
        chunks_per_round = T // C
        block = min(most_slots, block_of(C))
        tiles_per_chunk = triton.cdiv(C, block)
        self.tiles_per_round = chunks_per_round * tiles_per_chunk
        num_chunks = max(1, R * chunks_per_round)
        before, after = rules.num_chunks_before, rules.num_chunks_after
        self.plane = B * T * H * D
        self.sizes = (T, H, num_chunks, max(1, chunks_per_round), C, tiles_per_chunk)
        self.turns = triton.cdiv(max(before, after), num_chunks)
        # Every pointer must point somewhere, also where the kernel will not look.
        query = facts.query_BTHD.contiguous()
        key = query if facts.key_BTHD is None else facts.key_BTHD.contiguous()
        positions = facts.sorted_positions_BHRT
        chunk_of = None
        if positions is not None and not rules.allow_duplicate_attention:
            chunk_of = _chunk_of(positions, C)
        self.pointers = (
            query,
            key,
            facts.v_BTHD.contiguous(),
            query if positions is None else positions.contiguous(),
            query if facts.buckets_BHRT is None else facts.buckets_BHRT.contiguous(),
            query if chunk_of is None else chunk_of,
            query if facts.mask_BT is None else facts.mask_BT.contiguous().view(torch.uint8),
            seed_on(query.device, facts.dropout_seed, query),
        )
        self.numbers = (rules.scale, kept_scale(rules.dropout_p))
        self.rows: dict[str, Any] = {"D": D, "BLOCK_D": block_of(D)}
        self.constants: dict[str, Any] = {
            **self.rows,
            "BLOCK": block,
            "BEFORE": before,
            "WIDTH": before + 1 + after,
            "ROUNDS": R,
            "SHARED": facts.key_BTHD is None,
            "IDENTITY": positions is None,
            "CAUSAL": rules.causal,
            "MASKED": facts.mask_BT is not None,
            "EXCLUDE_SELF": rules.exclude_self,
            "WRAP": rules.wrap_around,
            "ACROSS": rules.attend_across_buckets,
            "DUPLICATES": rules.allow_duplicate_attention,
            "DROPOUT": rules.dropout_p > 0.0,
            "THRESHOLD": threshold_of(rules.dropout_p),
            "FULL": C % block == 0,
            "WIDE": T * H * D >= 2**31,
            "DOT": dot_dtype(query),
        }
        self.exact_alone = rules.exclude_self and (before + after > chunks_per_round or query.dtype == torch.float32)

    def tiles(self, first_round: int, rounds: int) -> tuple[int, tuple[int, int, int]]:
        """Return how many programs go over the tiles of some rounds, and the arguments that say so."""
        here = rounds * self.tiles_per_round
        return self.rings * here, (here, first_round * self.tiles_per_round, self.turns)

    def over_rows(self) -> tuple[int, tuple[int, int, int]]:
        """Return how many programs go over all positions of all rings, and the arguments that say so."""
        blocks = triton.cdiv(self.length, _ROWS)
        return self.rings * blocks, (self.length, self.heads, blocks)


def attend(facts: Facts, rules: Rules) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return output ``[B, T, H, D]``, log-sum-exps ``[B, H, R, T]``, and maxima and sums of powers ``[B, H, T]``."""
    v = facts.v_BTHD
    B, T, H, D = v.shape
    shape = forward_shape(v.dtype, block_of(D), is_hopper(v.device), not rules.allow_duplicate_attention)
    run = Launches(facts, rules, shape.tile)
    R = run.rounds
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse_BHRT, top_BHRT, total_BHRT = (torch.empty((B, H, R, T), dtype=torch.float32, device=v.device) for _ in range(3))
    rounds_out = out if R == 1 else torch.empty((R, *v.shape), dtype=v.dtype, device=v.device)
    programs, tiles = run.tiles(0, R)
    launch(
        attend_kernel,
        programs,
        *run.pointers,
        *(rounds_out, lse_BHRT, top_BHRT, total_BHRT),
        run.plane,
        *run.sizes,
        *tiles,
        *run.numbers,
        **run.constants,
        EXACT_ALONE=run.exact_alone,
        like=v,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
    if R == 1:
        return out, lse_BHRT, top_BHRT.view(B, H, T), total_BHRT.view(B, H, T)
    top_BHT, total_BHT = (torch.empty((B, H, T), dtype=torch.float32, device=v.device) for _ in range(2))
    programs, rows = run.over_rows()
    launch(
        merge_kernel,
        programs,
        *(rounds_out, top_BHRT, total_BHRT, out, top_BHT, total_BHT),
        run.plane,
        *rows,
        **run.rows,
        BLOCK=_ROWS,
        ROUNDS=R,
        like=v,
        num_warps=4,
    )
    return out, lse_BHRT, top_BHT, total_BHT


def attend_backward(
    d_out_BTHD: Tensor,
    out_BTHD: Tensor,
    top_BHT: Tensor,
    total_BHT: Tensor,
    facts: Facts,
    rules: Rules,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key (empty where queries are keys) and values.

    Rounds add up in fp32, one launch after the other, so sums have one order; or, not ``deterministic``, in one launch
    with atomic additions.
    """
    v = facts.v_BTHD
    union = not rules.allow_duplicate_attention
    shape = backward_shape(v.dtype, block_of(v.shape[-1]), is_hopper(v.device), union)
    run = Launches(facts, rules, shape.tile)
    R = run.rounds
    d_out = d_out_BTHD.contiguous()
    delta_BHT = torch.empty_like(top_BHT)
    programs, rows = run.over_rows()
    pointers = (d_out, out_BTHD.contiguous(), delta_BHT)
    launch(delta_kernel, programs, *pointers, *rows, **run.rows, BLOCK=_ROWS, like=v, num_warps=4)

    atomic = R > 1 and not deterministic
    make = torch.zeros if atomic else torch.empty
    d_q, d_v = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    d_k = torch.empty(v.shape if facts.key_BTHD is not None else (0,), dtype=v.dtype, device=v.device)
    shared = run.constants["SHARED"]
    sides = [(True, False), (False, True)] if shape.split else [(True, True)]
    parts = R * (len(sides) if shared else 1)
    sum_q, sum_v = (
        result
        if count == 1 or (v.dtype == torch.float32 and not atomic)
        else make(v.shape, dtype=torch.float32, device=v.device)
        for result, count in ((d_q, parts), (d_v, R))
    )
    fixed = (*run.pointers, d_out, top_BHT, total_BHT, delta_BHT, sum_q, sum_v, d_q, d_k, d_v, *run.sizes)
    part = 0
    for r in range(1 if atomic else R):
        programs, tiles = run.tiles(r, R if atomic else 1)
        for as_keys, as_queries in sides:
            writes_q = as_queries or shared
            launch(
                attend_backward_kernel,
                programs,
                *fixed,
                *tiles,
                *run.numbers,
                **run.constants,
                AS_KEYS=as_keys,
                AS_QUERIES=as_queries,
                ATOMIC=atomic,
                ADD_Q=writes_q and part > 0,
                LAST_Q=writes_q and part == parts - 1,
                ADD_V=r > 0,
                LAST_V=r == R - 1,
                like=v,
                num_warps=shape.num_warps,
                num_stages=shape.num_stages,
            )
            part += writes_q
    if atomic:
        d_q, d_v = sum_q.to(v.dtype), sum_v.to(v.dtype)
    return d_q, d_k, d_v
