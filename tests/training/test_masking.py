import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash_reformer.training.data import Document
from flash_reformer.training.masking import MaskedBlocks, Masking, WordBlocks
from flash_reformer.training.packing import IGNORED_LABEL, pack
from flash_reformer.training.vocabulary import NO_WORD

MASK = 999
ORDINARY = torch.arange(500, 600)


def masking(probability: float = 0.15) -> Masking:
    return Masking(MASK, probability, ORDINARY)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shares_are_those_of_the_recipe():
    ids = torch.arange(400).expand(200, 400)
    hidden, labels = masking().apply(ids, torch.arange(400).expand(200, 400), generator())
    chosen = labels != IGNORED_LABEL
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    kinds = hidden[chosen]
    assert (kinds == MASK).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (kinds == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    replaced = kinds[(kinds != MASK) & (kinds != ids[chosen])]
    assert ((replaced >= 500) & (replaced < 600)).all()
    assert len(replaced.unique()) > 80


@given(data=st.data(), seed=st.integers(0, 10))
def test_words_are_hidden_whole_and_white_space_never(data, seed):
    words = torch.tensor(data.draw(st.lists(st.lists(st.integers(-1, 5), min_size=9, max_size=9), min_size=1)))
    ids = torch.arange(words.numel()).view_as(words)
    _, labels = masking(0.4).apply(ids, words, generator(seed))
    chosen = labels != IGNORED_LABEL
    assert not chosen[words == NO_WORD].any()
    for row in range(len(words)):
        for word in words[row].unique():
            assert len(chosen[row][words[row] == word].unique()) == 1
        assert chosen[row].any() == (words[row] != NO_WORD).any()


def test_numbers_of_words_may_begin_anywhere():
    ids, words = torch.arange(20).view(2, 10), torch.arange(20).view(2, 10)
    first = masking(0.5).apply(ids, words, generator())
    again = masking(0.5).apply(ids, words + 10_000_000, generator())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_blocks_hold_every_token_once_with_its_word():
    text = pack([Document("a", b"one two  three four five six")])
    blocks = WordBlocks(text, 8)
    assert [len(block["input_ids"]) for block in blocks] == [8] * len(blocks)
    assert blocks.starts.tolist() == [0, 8, 16, 24]
    assert blocks[0]["words"].tolist() == [-1, 0, 0, 0, -1, 1, 1, 1]
    single = WordBlocks(text, 8, by_token=True)
    assert single[0]["words"].tolist() == [-1, 1, 2, 3, -1, 5, 6, 7]
    assert single.spread(2)[0]["words"].tolist() == single[0]["words"].tolist()


def test_held_out_rows_are_masked_once_and_for_all():
    text = pack([Document("a", b"one two three four five six seven " * 4)])
    blocks = WordBlocks(text, 16)
    first, again = (MaskedBlocks(blocks, masking(), 3) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["labels"], b["labels"])
    other = MaskedBlocks(blocks, masking(), 4)
    assert any(not torch.equal(a["labels"], b["labels"]) for a, b in zip(first, other, strict=True))


def test_rows_of_white_space_are_not_judged():
    text = pack([Document("a", b"word" + b" " * 60)])
    assert len(MaskedBlocks(WordBlocks(text, 16), masking(), 0)) == 1
