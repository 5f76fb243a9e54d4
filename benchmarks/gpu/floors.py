"""The floor: what a pass over attention cannot be faster than, from the bytes that it moves and the speed of copies.

A *row* is one pass over a tensor ``[B, T, H, D]``: ``B*T*H*D`` numbers. Neighbouring chunks read the same rows at about
the same time, so that a window's keys and values count once (the cache holds them), however many chunks see them. R is
the number of rounds.

LSH, forward, hash and sort included:

- hash: reads qk: 1 row;
- per round: reads qk (queries and keys are the same rows) and v, writes the round's output: 3 rows;
- merge, for R > 1: reads R outputs, writes one: R + 1 rows.

LSH, backward:

- ``delta = rowsum(dO * O)``: reads both: 2 rows;
- per round: reads qk, v, dO: 3 rows;
- gradients of qk and v: with one round each is written once, 2 rows. With more, rounds add to sums in fp32: the first
  writes them, those between read and write, the last reads them and writes the gradients, so ``R - 1`` writes and
  ``R - 1`` reads of two tensors in fp32, and 2 rows.

Local: forward reads q, k, v, writes the output: 4 rows; backward reads dO and O for delta, then q, k, v, dO, and writes
three gradients: 9 rows.

Index and statistics, in bytes per slot (B*H*T per round): LSH forward 16 (buckets written and read, 2 + 2; positions
written and read, 4 + 4; lse written, 4), for R > 1 another 4 (lse read by the merge); backward 8 (positions, lse) and
per position 4 + 4 R (delta written, and read in each round). Local: forward 4 (lse), backward 12.

These are the bytes of this way of computing it, not of all thinkable ones; a cache larger than the tensors lets short
sequences be faster.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rows:
    """Rows and bytes besides them that one pass moves."""

    rows: float
    fp32_rows: float
    slot_bytes: float
    position_bytes: float


def lsh_rows(rounds: int, *, backward: bool) -> Rows:
    """Return what LSH attention moves."""
    R, many = rounds, rounds > 1
    if backward:
        return Rows(2 + 3 * R + 2, 2 * 2 * (R - 1), 8, 4 + 4 * R)
    return Rows(1 + 3 * R + (R + 1 if many else 0), 0, 20 if many else 16, 0)


def local_rows(*, backward: bool) -> Rows:
    """Return what local attention moves."""
    return Rows(9, 0, 0, 12) if backward else Rows(4, 0, 0, 4)


def bytes_of(rows: Rows, *, length: int, heads: int, head_size: int, itemsize: int, rounds: int = 1) -> float:
    """Return the bytes of one pass over a batch of one."""
    positions = length * heads
    numbers = positions * head_size
    return (
        numbers * (rows.rows * itemsize + rows.fp32_rows * 4)
        + positions * rounds * rows.slot_bytes
        + positions * rows.position_bytes
    )


def floor_s(kind: str, passes: str, speed: float, *, rounds: int = 1, **shape: int) -> float:
    """Return the floor in seconds of ``"forward"``, ``"backward"`` or ``"training"``, which is both."""
    if passes == "training":
        return sum(floor_s(kind, each, speed, rounds=rounds, **shape) for each in ("forward", "backward"))
    backward = passes == "backward"
    rows = lsh_rows(rounds, backward=backward) if kind == "lsh" else local_rows(backward=backward)
    return bytes_of(rows, rounds=rounds if kind == "lsh" else 1, **shape) / speed
