import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer.tokenization.bytes import BYTE_OFFSET, EOS_ID
from flash_reformer.training.data import Document, hold_out
from flash_reformer.training.packing import IGNORED_LABEL, PackedBlocks, pack


def documents(count: int, size: int = 40) -> list[Document]:
    rng = np.random.default_rng(0)
    return [Document(str(index), rng.integers(0, 256, size, dtype=np.uint8).tobytes()) for index in range(count)]


def test_pack_puts_an_end_around_every_document_and_keeps_every_byte():
    tokens = pack([Document("a", b"\x00\xff"), Document("b", b"AB")])
    assert tokens.ids.tolist() == [EOS_ID, 2, 257, EOS_ID, 67, 68, EOS_ID]
    assert tokens.ids.dtype == np.uint16
    assert tokens.byte_counts.tolist() == [0, 1, 1, 0, 1, 1, 0]
    assert tokens.words.tolist() == [-1, 0, 0, -1, 1, 1, -1]


@given(data=st.binary(min_size=1, max_size=70), length=st.integers(2, 17))
def test_blocks_predict_every_token_but_the_first_exactly_once(data, length):
    tokens = pack([Document("a", data)])
    blocks = PackedBlocks(tokens, length)
    seen = []
    for block in blocks:
        assert len(block["input_ids"]) == min(length, len(tokens.ids))
        seen += [label for label in block["labels"][1:].tolist() if label != IGNORED_LABEL]
        # Where a label counts it is the input itself: the model shifts.
        counts = block["labels"] != IGNORED_LABEL
        assert block["labels"][counts].tolist() == block["input_ids"][counts].tolist()
        assert block["labels"][0] == IGNORED_LABEL
    assert seen == tokens.ids[1:].tolist()
    assert blocks.predicted_tokens == len(seen)
    assert blocks.predicted_bytes == len(data)


def test_spread_takes_whole_blocks_from_one_end_to_the_other():
    blocks = PackedBlocks(pack(documents(30)), 64)
    some = blocks.spread(5)
    assert len(some) == 5
    assert all((block["labels"][1:] != IGNORED_LABEL).all() for block in some)
    assert some.starts[0] == 0
    assert some.starts[-1] == max(start for start in blocks.starts if start + 64 <= len(blocks.text.ids))
    assert some.predicted_tokens == 5 * 63
    ids = np.stack([block["input_ids"].numpy() for block in some])
    assert some.predicted_bytes == (ids[:, 1:] >= BYTE_OFFSET).sum()
    assert len(blocks.spread(10_000)) <= len(blocks)


def test_bits_per_byte_counts_what_ends_of_texts_cost():
    blocks = PackedBlocks(pack([Document("a", b"abc")]), 5)
    # Four predictions, a, b, c and the end, pay for three bytes.
    assert blocks.bits_per_byte(math.log(2)) == pytest.approx(4 / 3)


@pytest.mark.parametrize("count", [3, 50])
def test_hold_out_leaves_nothing_on_both_sides_and_loses_nothing(count):
    texts = documents(count)
    split = hold_out(texts, 0.2)
    train = b"".join(document.data for document in split.train)
    held_out = b"".join(document.data for document in split.held_out)
    assert len(train) + len(held_out) == count * 40
    assert 0.1 < len(held_out) / (count * 40) < 0.3
    if count >= 20:
        assert not {d.data for d in split.train} & {d.data for d in split.held_out}
        assert {d.data for d in split.train} | {d.data for d in split.held_out} == {d.data for d in texts}
    else:
        assert [a.data + b.data for a, b in zip(split.train, split.held_out, strict=True)] == [d.data for d in texts]


def test_hold_out_goes_by_content_so_copies_stay_together_and_order_does_not_matter():
    texts = documents(40)
    copies = [Document("copy of " + document.name, document.data) for document in texts]
    split = hold_out([*texts, *copies], 0.1)
    assert not {d.data for d in split.train} & {d.data for d in split.held_out}
    again = hold_out([*copies, *texts[::-1]], 0.1)
    assert {d.data for d in again.held_out} == {d.data for d in split.held_out}


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, math.nan])
def test_hold_out_refuses_fractions_that_leave_a_side_empty(fraction):
    with pytest.raises(ValueError, match="held_out must lie strictly between 0 and 1"):
        hold_out(documents(3), fraction)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="the text is empty"):
        hold_out([Document("a", b"")], 0.1)
    with pytest.raises(ValueError, match="the text is empty"):
        PackedBlocks(pack([]), 8)
    with pytest.raises(ValueError, match="a holds 1 byte"):
        hold_out([Document("a", b"x")], 0.1)
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        PackedBlocks(pack(documents(1)), 1)
    with pytest.raises(ValueError, match="eval_sequences must be at least 1"):
        PackedBlocks(pack(documents(1)), 8).spread(0)
