"""Chunking: rows by slot, windows on the ring, who is visible, how often a key appears."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer.ops import chunking
from tests.ops import definitions
from tests.ops.tools import B, D, H, assert_wide_integers, generator, layout_of, randn, untouched

#: T, chunk length, rounds, before, after. The last ones have windows longer than their ring.
GEOMETRIES = [
    (21, 3, 1, 1, 0),
    (12, 4, 2, 1, 1),
    (21, 7, 3, 0, 0),
    (9, 3, 4, 0, 2),
    (20, 4, 5, 3, 2),
    (14, 7, 3, 2, 3),
    (6, 3, 1, 3, 2),
    (7, 7, 2, 3, 1),
    (5, 5, 1, 2, 0),
]
OPTIONS = [{"wrap_around": wrap, "attend_across_buckets": across} for wrap, across in product((True, False), repeat=2)]


def layout_options(C: int, before: int, after: int, options: dict[str, bool]) -> dict[str, int | bool]:
    return {"chunk_length": C, "num_chunks_before": before, "num_chunks_after": after, **options}


def test_gathered_rows_are_the_named_ones() -> None:
    x, (order, _) = randn(B, 13, H, D, seed=1), layout_of(13, 3, seed=2)
    rows = chunking.gather_rows(x, order.flatten(2))
    assert rows.shape == (B, H, 39, D)
    for b, h, r, t in product(range(B), range(H), range(3), range(13)):
        assert torch.equal(rows[b, h, r * 13 + t], x[b, order[b, h, r, t], h])


def test_gathering_takes_strided_input_and_gives_gradients_to_every_row() -> None:
    x, (order, _) = randn(13, B, D, H, seed=1).permute(1, 0, 3, 2).requires_grad_(), layout_of(13, 3, seed=2)
    rows = chunking.gather_rows(x, order.flatten(2))
    assert torch.equal(rows[1, 2, 17], x[1, order[1, 2, 1, 4], 2])
    (grad,) = torch.autograd.grad(rows.sum(), x)
    assert (grad == 3).all(), "every row stands in every round once"


@pytest.mark.parametrize("tail", [(), (D,)], ids=str)
@pytest.mark.parametrize(("num_chunks", "C"), [(1, 3), (2, 3), (5, 4), (3, 7)])
@pytest.mark.parametrize(("before", "after"), list(product(range(4), repeat=2)))
def test_windows_stand_on_the_ring(num_chunks: int, C: int, before: int, after: int, tail: tuple[int, ...]) -> None:
    x = randn(B, H, num_chunks * C, *tail, seed=3)
    windows = chunking.look_around(chunking.split_chunks(x, C), before, after)
    assert windows.shape == (B, H, num_chunks, C * (before + 1 + after), *tail)
    for n, o, c in product(range(num_chunks), range(before + 1 + after), range(C)):
        slot = ((n - before + o) % num_chunks) * C + c
        assert torch.equal(windows[:, :, n, o * C + c], x[:, :, slot])


def test_a_length_that_the_chunk_does_not_divide_is_refused() -> None:
    with pytest.raises(RuntimeError, match="unflatten"):
        chunking.split_chunks(torch.zeros(1, 1, 7), 3)


@pytest.mark.parametrize(("T", "C", "R", "before", "after"), GEOMETRIES)
def test_windows_end_at_the_border_of_their_round(T: int, C: int, R: int, before: int, after: int) -> None:
    inside = chunking.window_in_round(R * T // C, T // C, before, after, torch.device("cpu"))
    assert inside.shape == (R * T // C, before + 1 + after)
    for n, o in product(range(R * T // C), range(before + 1 + after)):
        first = n // (T // C) * (T // C)
        assert inside[n, o].item() == (first <= n - before + o < first + T // C)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("T", "C", "R", "before", "after"), GEOMETRIES)
def test_visibility_and_appearances_are_those_of_the_definition(
    T: int, C: int, R: int, before: int, after: int, options: dict[str, bool]
) -> None:
    order, buckets = layout_of(T, R, seed=T + R)
    layout = layout_options(C, before, after, options)
    visible = chunking.visible_slots(order, buckets, **layout)
    counts = chunking.count_appearances(order, buckets, **layout)
    shape = (B, H, R * T // C, C, C * (before + 1 + after))
    assert (visible is None) == all(options.values())
    visible = torch.ones(shape, dtype=torch.bool) if visible is None else visible.expand(shape)
    assert counts.shape == shape
    rows = definitions.windows(order, buckets, **layout)
    for (b, h, r, i), (chunk, place, slots) in rows.items():
        there = [slot.there for slot in slots]
        appearances = definitions.count_appearances(rows, b, h, i, R)
        expected = [appearances[slot.key] if slot.there else 0 for slot in slots]
        assert visible[b, h, chunk, place].tolist() == there, (b, h, r, i)
        assert torch.where(visible, counts, 0)[b, h, chunk, place].tolist() == expected, (b, h, r, i)


def test_options_do_hide_slots_and_keys_do_appear_repeatedly() -> None:
    """Otherwise the comparison above would compare constants."""
    order, buckets = layout_of(6, 1, seed=5)
    shares = []
    for options in OPTIONS[1:]:
        visible = chunking.visible_slots(order, buckets, **layout_options(3, 3, 2, options))
        assert visible is not None
        shares.append(visible.expand(B, H, 2, 3, 18).double().mean().item())
    assert len({0.0, 1.0, *shares}) == 5, shares
    order, buckets = layout_of(12, 3, seed=5)
    counts = chunking.count_appearances(order, buckets, **layout_options(4, 1, 1, OPTIONS[0]))
    assert counts.unique().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(("dtype", "apart"), [(torch.int16, 2**13), (torch.int32, 2**29)], ids=str)
def test_bucket_labels_cannot_overflow(dtype: torch.dtype, apart: int) -> None:
    """Times R = 8 these two ids differ by 2^16 and 2^32: equal, were the label made in the dtype of the ids."""
    buckets = torch.tensor([0, apart]).repeat_interleave(2).to(dtype).expand(1, 1, 8, 4)
    order = torch.arange(4).expand(1, 1, 8, 4)
    visible = chunking.visible_slots(
        order, buckets, **layout_options(4, 0, 0, {"wrap_around": True, "attend_across_buckets": False})
    )
    assert visible is not None
    assert visible[0, 0, 5].long().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_slot_arithmetic_is_made_in_64_bits(options: dict[str, bool]) -> None:
    """At T = 2^20, R = 8 a slot number takes 23 bits and (batch, position, head) easily 32: int64 holds them all."""
    order, buckets = layout_of(12, 8, seed=6)
    layout = layout_options(4, 1, 1, options)
    narrow = buckets.to(torch.int16)
    assert_wide_integers(lambda: chunking.count_appearances(order, narrow, **layout))
    assert_wide_integers(lambda: chunking.gather_rows(randn(B, 12, H, D, seed=1), order.flatten(2)))
    if not options["attend_across_buckets"]:
        assert_wide_integers(lambda: chunking.visible_slots(order, narrow, **layout))


@given(
    seed=st.integers(0, 2**31),
    C=st.integers(1, 4),
    chunks=st.integers(1, 4),
    R=st.integers(1, 3),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
def test_law_every_slot_is_seen_by_every_chunk_equally_often(
    seed: int, C: int, chunks: int, R: int, before: int, after: int
) -> None:
    """Each slot stands in exactly before + 1 + after windows, and every window is the first one, moved."""
    slots = torch.arange(R * chunks * C).view(1, 1, -1)
    windows = chunking.look_around(chunking.split_chunks(slots, C), before, after)
    assert (windows.flatten().bincount() == before + 1 + after).all()
    moved = (windows + C * (seed % 5)) % (R * chunks * C)
    assert torch.equal(windows.roll(-(seed % 5), dims=2), moved)


@given(seed=st.integers(0, 2**31), wrap=st.booleans(), across=st.booleans())
def test_law_appearances_sum_to_the_windows(seed: int, wrap: bool, across: bool) -> None:
    """Over the visible slots of a query, the sum of 1/count is the number of different keys it sees: an integer."""
    T, C, R = 12, 3, 3
    order, buckets = layout_of(T, R, seed=seed)
    layout = layout_options(C, 2, 1, {"wrap_around": wrap, "attend_across_buckets": across})
    visible = chunking.visible_slots(order, buckets, **layout)
    counts = chunking.count_appearances(order, buckets, **layout)
    seen = torch.ones_like(counts) if visible is None else visible.expand(counts.shape).long()
    shares = (seen.double() / counts.clamp(min=1)).sum(-1).flatten(2)
    by_query = torch.zeros(B, H, T, dtype=shares.dtype).scatter_add_(-1, order.flatten(2), shares)
    assert (by_query - by_query.round()).abs().max() < 1e-10
    assert by_query.round().min() >= 1
    assert by_query.round().max() <= T


def test_writes_nothing() -> None:
    x, (order, buckets) = randn(B, 12, H, D, seed=1), layout_of(12, 2, seed=2)
    options = layout_options(4, 1, 1, OPTIONS[-1])
    with untouched(x=x, order=order, buckets=buckets):
        chunking.look_around(chunking.split_chunks(chunking.gather_rows(x, order.flatten(2)), 4), 1, 1)
        chunking.visible_slots(order, buckets, **options)
        chunking.count_appearances(order, buckets, **options)


def test_window_of_the_own_chunk_alone_is_the_chunk() -> None:
    chunks = torch.rand(B, H, 3, 4, generator=generator(1))
    assert torch.equal(chunking.look_around(chunks, 0, 0), chunks)
