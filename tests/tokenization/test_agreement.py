"""The fast tokenizer gives SentencePiece's ids: on ordinary text, and on thousands of strings meant to part them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

from flash_reformer import ReformerTokenizer, ReformerTokenizerFast
from tests.tokenization.corpus import MODELS, PIECES, adversarial, ordinary

ModelFile = Callable[[str], str]
ADVERSARIAL = adversarial(1500, seed=5)
ORDINARY = ordinary(150, seed=3)


def disagreements(theirs: list[list[int]], ours: list[list[int]], texts: list[str]) -> list[str]:
    assert len(theirs) == len(ours) == len(texts)
    return [text for text, a, b in zip(texts, theirs, ours, strict=True) if a != b]


@pytest.mark.parametrize("name", MODELS)
def test_fast_gives_the_ids_of_sentencepiece(model_file: ModelFile, name: str) -> None:
    judge = SentencePieceProcessor(model_file=model_file(name))
    fast = ReformerTokenizerFast(model_file(name))
    texts = ORDINARY + ADVERSARIAL
    ids = fast(texts, split_special_tokens=True).input_ids
    assert len({index for row in ids for index in row}) > 300
    assert disagreements(judge.Encode(texts, out_type=int), ids, texts) == []


@pytest.mark.floor
@pytest.mark.parametrize("name", ["bpe", "unigram", "unigram_bytes", "bpe_symbols", "unigram_symbols"])
def test_slow_and_fast_agree_where_special_tokens_stand_in_the_text(model_file: ModelFile, name: str) -> None:
    added = {"mask_token": "[MASK]", "additional_special_tokens": ["<q>", "<sep>"]}
    slow, fast = ReformerTokenizer(model_file(name), **added), ReformerTokenizerFast(model_file(name), **added)
    slow.add_tokens(["newword", "the"])
    fast.add_tokens(["newword", "the"])
    texts = [f"{a}[MASK]{b}</s> {a}<q><unk><sep>newword{b}" for a, b in zip(ADVERSARIAL, ORDINARY * 3, strict=False)]
    ids = fast(texts).input_ids
    assert all(fast.mask_token_id in row and fast.eos_token_id in row for row in ids)
    assert len(slow) == len(fast)
    assert disagreements(slow(texts).input_ids, ids, texts) == []
    for text, row in zip(texts[:200], ids, strict=False):
        assert slow.tokenize(text) == fast.tokenize(text)
        for skip in (False, True):
            assert slow.decode(row, skip_special_tokens=skip) == fast.decode(row, skip_special_tokens=skip)


def test_each_way_of_the_fast_tokenizer_is_needed(model_file: ModelFile) -> None:
    # What this package adds to `tokenizers` makes a difference: without SentencePiece's normaliser, and without its
    # word on near ties, ids differ on these very strings.
    texts = ADVERSARIAL
    theirs = SentencePieceProcessor(model_file=model_file("unigram")).Encode(texts, out_type=int)
    fast = ReformerTokenizerFast(model_file("unigram"))
    backend = fast.backend_tokenizer
    backend.encode_special_tokens = True
    stock = [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]
    assert len(disagreements(theirs, stock, texts)) > 0.02 * len(texts)
    exact = fast._tokenizer
    normalized = [exact.sp.processor.Normalize(text) for text in texts]
    unaided = [encoding.ids for encoding in exact._segmenter.encode_batch(normalized)]
    assert 0 < len(disagreements(theirs, unaided, texts)) < 0.2 * len(texts)


def test_models_made_by_hand(tmp_path: Path) -> None:
    # Entries whose characters are none, and unused ones: no trainer makes them, but vocabularies are edited.
    dice = random.Random(0)
    texts = ["".join(dice.choice("aab c") for _ in range(dice.randint(1, 30))) for _ in range(300)]
    for name, hidden in {"no b": {"b": None}, "unused": {"aa": 5, "ab": 5}, "plain": {}}.items():
        proto = sentencepiece_model_pb2.ModelProto()
        proto.trainer_spec.model_type = proto.trainer_spec.BPE
        for rank, piece in enumerate(["<unk>", "▁", "a", "b", "c", "ab", "aa", "aab", "▁a", "aabaa", "▁ab"]):
            kind = hidden.get(piece, 2 if rank == 0 else 1)
            if kind is not None:
                proto.pieces.add(piece=piece, score=-rank, type=kind)
        file = tmp_path / f"{name}.model"
        file.write_bytes(proto.SerializeToString())
        fast = ReformerTokenizerFast(str(file))
        assert fast._tokenizer.sp.merges_by_rank == (not hidden)
        theirs = SentencePieceProcessor(model_file=str(file)).Encode(texts, out_type=int)
        normalized = [fast._tokenizer.sp.processor.Normalize(text) for text in texts]
        unaided = [encoding.ids for encoding in fast._tokenizer._segmenter.encode_batch(normalized)]
        assert bool(disagreements(theirs, unaided, texts)) == bool(hidden)
        assert disagreements(theirs, fast(texts).input_ids, texts) == []


def test_long_texts(model_file: ModelFile) -> None:
    text = " ".join(ordinary(1500, seed=8))
    assert len(text) > 100_000
    for name in ("bpe", "unigram"):
        theirs = SentencePieceProcessor(model_file=model_file(name)).Encode(text, out_type=int)
        assert ReformerTokenizerFast(model_file(name))(text).input_ids == theirs


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_hypothesis_finds_no_disagreement(model_file: ModelFile, name: str) -> None:
    judge = SentencePieceProcessor(model_file=model_file(name))
    fast = ReformerTokenizerFast(model_file(name))
    # Surrogates are no text: both refuse them.
    letters = st.characters(exclude_categories=["Cs"])
    strings = st.one_of(st.text(letters), st.lists(st.sampled_from(PIECES)).map("".join))

    @settings(max_examples=60)
    @given(st.lists(strings, min_size=25, max_size=60))
    def agree(texts: list[str]) -> None:
        ids = fast(texts, split_special_tokens=True).input_ids
        assert disagreements(judge.Encode(texts, out_type=int), ids, texts) == []

    agree()


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_control_symbols_come_from_no_text(model_file: ModelFile, name: str) -> None:
    fast, slow = ReformerTokenizerFast(model_file(name)), ReformerTokenizer(model_file(name))
    begin = slow.sp_model.PieceToId("<s>")
    assert slow.sp_model.IsControl(begin)
    for spelled in ("<s>", "＜s＞", "a<s>b", "<​s>"):
        for tokenizer in (fast, slow):
            assert begin not in tokenizer(spelled).input_ids
            assert not set(tokenizer.all_special_ids) & set(tokenizer("＜/s＞ ＜unk＞").input_ids) - {fast.unk_token_id}
            # What is a special token counts where it is written out, unless asked not to.
            assert tokenizer.eos_token_id in tokenizer("a</s>b").input_ids
            assert tokenizer.eos_token_id not in tokenizer("a</s>b", split_special_tokens=True).input_ids


@pytest.mark.parametrize("name", ["bpe", "unigram"])
@pytest.mark.parametrize("text", ["", " ", "\n", "\x07", "\u200b", "   \t "])
def test_texts_that_normalise_to_nothing(model_file: ModelFile, name: str, text: str) -> None:
    for tokenizer in (ReformerTokenizer(model_file(name)), ReformerTokenizerFast(model_file(name))):
        assert tokenizer(text).input_ids == []
        assert tokenizer([text, "a"]).input_ids[0] == []
        assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("name", ["bpe", "unigram_bytes"])
def test_words_given_one_by_one_are_texts_of_their_own(model_file: ModelFile, name: str) -> None:
    words = ["the", "", "ﬁx</s>", "....", "e\u0301te\u0301", "the quick"]
    judge = SentencePieceProcessor(model_file=model_file(name))
    slow, fast = ReformerTokenizer(model_file(name)), ReformerTokenizerFast(model_file(name))
    encoding = fast(words, is_split_into_words=True, return_offsets_mapping=True)
    assert encoding.input_ids == slow(words, is_split_into_words=True).input_ids
    assert encoding.word_ids() == sorted(encoding.word_ids())
    assert set(encoding.word_ids()) == {0, 2, 3, 4, 5}
    fourth = [span for span, word in zip(encoding.offset_mapping, encoding.word_ids(), strict=True) if word == 4]
    assert fourth[-1][1] == len(words[4])
    assert len(fourth) == len(judge.Encode(words[4], out_type=int))
