"""The operations of a decoding step against loops, on odd sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flash_reformer.ops import attention, decoding, sorting

B, H, K = 2, 3, 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_buckets(rounds: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(K, (B, H, rounds, length), generator=generator(seed), dtype=torch.int16)


def index_of(buckets: torch.Tensor, upto: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Order and starts of the first positions, one garbage place behind."""
    order = sorting.sort_positions(buckets[..., :upto]).int()
    starts = decoding.bucket_starts(buckets[..., :upto].gather(-1, order.long()), K + 2)
    return torch.nn.functional.pad(order, (0, 1), value=10**6), starts


def windows_by_loops(
    buckets: torch.Tensor, length: int, padded: int, chunk: int, before: int, wrap: bool, across: bool
) -> list[int]:
    """Positions (with repeats) that the last of ``length`` tokens sees in one head; ``buckets`` ``[R, >= length]``."""
    rounds = buckets.shape[0]
    slots: list[tuple[int, int | None]] = []
    for r in range(rounds):
        real = sorted(range(length), key=lambda p, r=r: (int(buckets[r, p]), p))
        slots += [(r, p) for p in real] + [(r, None)] * (padded - length)
    ring = len(slots) // chunk
    seen = []
    for r in range(rounds):
        own = slots.index((r, length - 1)) // chunk
        for unwrapped in range(own - before, own + 1):
            if not wrap and unwrapped < r * padded // chunk:
                continue
            start = unwrapped % ring * chunk
            for other, position in slots[start : start + chunk]:
                same = other == r and position is not None and buckets[r, position] == buckets[r, length - 1]
                if position is not None and position != length - 1 and (across or same):
                    seen.append(position)
    return sorted(seen)


CASES = list(itertools.product([1, 2, 3], [0, 1, 3], [True, False], [True, False]))


@pytest.mark.parametrize(("rounds", "before", "wrap", "across"), CASES)
def test_windows_are_those_of_the_sorted_ring(rounds, before, wrap, across):
    chunk = 3
    options = {"num_chunks_before": before, "wrap_around": wrap, "attend_across_buckets": across}
    seen_something = 0
    for indexed, new in ((4, 1), (4, 6), (7, 5), (13, 1), (0, 5)):
        total = indexed + 3 + new
        buckets = random_buckets(rounds, total, seed=indexed)
        order, starts = index_of(buckets, indexed)
        lengths = torch.arange(total - new + 1, total + 1).unsqueeze(0)
        padded = -(-lengths // chunk) * chunk
        positions, visible = decoding.windows_of_new_tokens(
            order,
            starts,
            buckets[..., indexed:],
            lengths - indexed,
            lengths,
            padded,
            complete=new == 1,
            chunk_length=chunk,
            **options,
        )
        assert positions.shape == (B, H, new, rounds * (before + 1) * chunk)
        for b, h, m in itertools.product(range(B), range(H), range(new)):
            length = int(lengths[0, m])
            expected = windows_by_loops(buckets[b, h], length, int(padded[0, m]), chunk, before, wrap, across)
            assert sorted(positions[b, h, m][visible[b, h, m]].tolist()) == expected
            assert (positions[b, h, m][~visible[b, h, m]] == 0).all()
            seen_something += len(expected)
    assert seen_something > 20


def test_rows_of_different_lengths_have_windows_of_their_own():
    chunk, buckets = 3, random_buckets(2, 20)
    indexed, totals, new = [4, 9], [8, 17], 3
    orders, starts = zip(*(index_of(buckets[b : b + 1], n) for b, n in enumerate(indexed)), strict=True)
    width = max(order.shape[-1] for order in orders)
    order = torch.cat([torch.nn.functional.pad(order, (0, width - order.shape[-1])) for order in orders])
    recent = torch.stack([buckets[b, ..., indexed[b] : indexed[b] + 8] for b in range(B)])
    lengths = torch.tensor(totals).unsqueeze(-1) + torch.arange(1, new + 1) - new
    padded = -(-lengths // chunk) * chunk
    positions, visible = decoding.windows_of_new_tokens(
        order,
        torch.cat(starts),
        recent,
        lengths - torch.tensor(indexed).unsqueeze(-1),
        lengths,
        padded,
        complete=False,
        chunk_length=chunk,
        num_chunks_before=1,
        wrap_around=True,
        attend_across_buckets=True,
    )
    for b, h, m in itertools.product(range(B), range(H), range(new)):
        expected = windows_by_loops(buckets[b, h], int(lengths[b, m]), int(padded[b, m]), chunk, 1, True, True)
        assert sorted(positions[b, h, m][visible[b, h, m]].tolist()) == expected


@pytest.mark.parametrize("rounds", [1, 3])
def test_merging_recent_tokens_is_sorting_all(rounds):
    buckets = random_buckets(rounds, 23)
    for indexed, recent in (([7, 7], [9, 9]), ([0, 5], [4, 11]), ([12, 3], [0, 20])):
        width = max(1, *indexed)
        order = torch.full((B, H, rounds, width), 10**6, dtype=torch.int32)
        starts = torch.zeros(B, H, rounds, K + 2, dtype=torch.int32)
        tail = torch.zeros(B, H, rounds, max(recent), dtype=torch.int16)
        for b in range(B):
            one, starts[b] = (x[0] for x in index_of(buckets[b : b + 1], indexed[b]))
            order[b, ..., : indexed[b]] = one[..., :-1]
            tail[b, ..., : recent[b]] = buckets[b, ..., indexed[b] : indexed[b] + recent[b]]
        merged, new_starts = decoding.merge_recent(order, starts, tail, torch.tensor(indexed), torch.tensor(recent))
        for b in range(B):
            expected, expected_starts = index_of(buckets[b : b + 1], indexed[b] + recent[b])
            assert torch.equal(merged[b, ..., : indexed[b] + recent[b]], expected[0, ..., :-1])
            assert torch.equal(new_starts[b], expected_starts[0])


def test_dropping_positions_is_sorting_what_is_left():
    buckets = random_buckets(2, 19)
    order, starts = index_of(buckets, 19)
    for kept in ([19, 19], [12, 3], [0, 18]):
        left, new_starts = decoding.drop_positions(order, starts, torch.tensor([19, 19]), torch.tensor(kept))
        for b in range(B):
            expected, expected_starts = index_of(buckets[b : b + 1], kept[b])
            assert torch.equal(left[b, ..., : kept[b]], expected[0, ..., :-1])
            assert torch.equal(new_starts[b], expected_starts[0])


def test_a_repeated_position_stays_once():
    positions = torch.randint(6, (B, H, 4, 15), generator=generator(1))
    visible = torch.rand(B, H, 4, 15, generator=generator(2)) < 0.7
    left, stays = decoding.without_repeats(positions, visible)
    for b, h, m in itertools.product(range(B), range(H), range(4)):
        once = left[b, h, m][stays[b, h, m]].tolist()
        assert sorted(once) == sorted(set(positions[b, h, m][visible[b, h, m]].tolist()))


@pytest.mark.parametrize("wrap", [True, False])
@pytest.mark.parametrize("before", [0, 1, 2, 3])
def test_the_bias_counts_how_often_a_window_holds_a_chunk(before, wrap):
    chunk, most = 3, 16
    keys = torch.arange(most).unsqueeze(0)
    lengths = torch.arange(1, most + 1).unsqueeze(0)
    padded = -(-lengths // chunk) * chunk
    bias = decoding.window_bias(
        keys, lengths, padded, chunk_length=chunk, num_chunks_before=before, wrap_around=wrap, dtype=torch.float64
    )
    for m, key in itertools.product(range(most), range(most)):
        ring, own = int(padded[0, m]) // chunk, m // chunk
        chunks = [own + offset for offset in range(-before, 1)]
        chunks = [c % ring for c in chunks] if wrap else [c for c in chunks if c >= 0]
        times = chunks.count(key // chunk) if key <= m else 0
        assert bias[0, m, key].item() == pytest.approx(math.log(times) if times else -math.inf)


def test_attention_with_a_bias_is_exact_attention():
    T, D, new = 9, 4, 3
    query, key, value = (torch.randn(B, T, H, D, generator=generator(i), dtype=torch.float64) for i in range(3))
    head_mask = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    lengths = torch.arange(T - new + 1, T + 1).unsqueeze(0)
    for exclude_self in (True, False):
        expected, _ = attention.exact_attention(
            query, key, value, None, head_mask, causal=True, exclude_self=exclude_self
        )
        positions = torch.arange(T).unsqueeze(0)
        bias = decoding.exact_bias(positions, lengths, exclude_self=exclude_self, dtype=torch.float64)
        found = decoding.attend_with_bias(query[:, -new:], key.transpose(1, 2), value.transpose(1, 2), bias, head_mask)
        assert torch.allclose(found, expected[:, -new:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_query_that_sees_only_itself_returns_its_value(dtype):
    X, D, M = 7, 4, 2
    query = torch.randn(B, M, H, D, generator=generator(0)).to(dtype)
    key, value = (torch.randn(B, H, M, X, D, generator=generator(i)).to(dtype) for i in (1, 2))
    visible = torch.zeros(B, H, M, X, dtype=torch.bool)
    alone = decoding.attend_to_windows(query, key, value, visible)
    assert torch.equal(alone, value[..., -1, :].transpose(1, 2))
    visible[0, 1, 0, 2] = True
    out = decoding.attend_to_windows(query, key, value, visible)
    assert torch.equal(out[0, 0, 1], value[0, 1, 0, 2])
    assert torch.equal(out[1], alone[1])
