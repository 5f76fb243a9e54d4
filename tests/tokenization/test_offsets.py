"""Offsets are those of the text as given, whatever became of it."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
from sentencepiece import SentencePieceProcessor

from flash_reformer import ReformerByteTokenizer, ReformerTokenizer, ReformerTokenizerFast
from tests.tokenization.corpus import MODELS, adversarial, ordinary

ModelFile = Callable[[str], str]


def spans(tokenizer: ReformerTokenizerFast, text: str) -> list[tuple[str, str]]:
    """Return every token with the characters it stands for."""
    encoding = tokenizer(text, return_offsets_mapping=True)
    return [(token, text[a:b]) for token, (a, b) in zip(encoding.tokens(), encoding.offset_mapping, strict=True)]


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> ReformerTokenizerFast:
    """A vocabulary of single characters, so that every normalised character is a token."""
    from flash_reformer.tokenization.training import train_vocabulary

    text = " ".join("abcdefghiklmnopqrstuvwxyz.é가かが")
    return train_vocabulary([text], tmp_path_factory.mktemp("letters"), vocab_size=34, character_coverage=1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", [("▁", ""), ("a", "a"), ("b", "b")]),
        ("  a   b ", [("▁", ""), ("a", "a"), ("▁", "   "), ("b", "b")]),
        ("aﬁb", [("▁", ""), ("a", "a"), ("f", "ﬁ"), ("i", "ﬁ"), ("b", "b")]),
        ("e\u0301x", [("▁", ""), ("é", "e\u0301"), ("x", "x")]),
        ("x\x07y", [("▁", ""), ("x", "x\x07"), ("y", "y")]),
        ("…a", [("▁", ""), (".", "…"), (".", "…"), (".", "…"), ("a", "a")]),
        ("\u1100\u1161か\u3099", [("▁", ""), ("가", "\u1100\u1161"), ("が", "か\u3099")]),
        ("a\n\tb", [("▁", ""), ("a", "a"), ("▁", "\n\t"), ("b", "b")]),
        ("a😀😀b", [("▁", ""), ("a", "a"), ("<unk>", "😀😀"), ("b", "b")]),
        ("a</s> b", [("▁", ""), ("a", "a"), ("</s>", "</s>"), ("▁", ""), ("b", "b")]),
        ("a\u00a0 </s>e\u0301", [("▁", ""), ("a", "a"), ("</s>", "</s>"), ("▁", ""), ("é", "e\u0301")]),
    ],
)
def test_worked_by_hand(letters: ReformerTokenizerFast, text: str, expected: list[tuple[str, str]]) -> None:
    assert spans(letters, text) == expected


@pytest.mark.parametrize("name", [name for name in MODELS if "bytes" not in name])
def test_every_span_normalises_to_its_token(model_file: ModelFile, name: str) -> None:
    judge = SentencePieceProcessor(model_file=model_file(name))
    fast = ReformerTokenizerFast(model_file(name))
    checked = 0
    for text in ordinary(120, seed=2):
        for token, span in spans(fast, text):
            if token != "<unk>" and span:
                checked += 1
                # Alone, a span gets a dummy space, and loses a space at its start or end.
                wanted, found = token.strip("▁"), judge.Normalize(span).strip("▁")
                expands = any(len(judge.Normalize(char).strip("▁")) > 1 for char in span)  # "½" is "1⁄2"
                assert wanted == found or (expands and wanted in found), (text, token, span)
    assert checked > 1500


@pytest.mark.floor
@pytest.mark.parametrize("name", MODELS)
def test_spans_move_forward_and_miss_nothing(model_file: ModelFile, name: str) -> None:
    judge = SentencePieceProcessor(model_file=model_file(name))
    fast = ReformerTokenizerFast(model_file(name))
    texts = ordinary(60, seed=4) + adversarial(250, seed=6)
    for text, row in zip(texts, fast(texts, return_offsets_mapping=True).offset_mapping, strict=True):
        assert all(0 <= start <= end <= len(text) for start, end in row)
        assert [start for start, _ in row] == sorted(start for start, _ in row)
        covered = {place for start, end in row for place in range(start, end)}
        missed = {char for place, char in enumerate(text) if place not in covered}
        # What no token stands for is what the model reads as nothing.
        assert not any(judge.Normalize(char).strip("▁") for char in missed), (text, missed)


def test_bytes_have_the_span_of_their_character(model_file: ModelFile) -> None:
    for name in ("bpe_bytes", "unigram_bytes"):
        fast = ReformerTokenizerFast(model_file(name))
        found = spans(fast, "the ☃aaaa☃ end")  # with a run that Unigram leaves to SentencePiece
        bytes_of = [(token, span) for token, span in found if span == "☃"]
        assert bytes_of == [("<0xE2>", "☃"), ("<0x98>", "☃"), ("<0x83>", "☃")] * 2
        assert found[-1][1].endswith("end"[-1])


@pytest.mark.parametrize("name", ["bpe", "unigram"])
def test_questions_and_contexts_in_strides(model_file: ModelFile, name: str) -> None:
    fast = ReformerTokenizerFast(model_file(name), pad_token="</s>")
    question, context = "Who eats… ﬁsh?", "  ".join(ordinary(12, seed=9)) + " e\u0301nd...... "
    whole = fast(context, return_offsets_mapping=True)
    for side in ("right", "left"):
        rows = fast(
            question,
            context,
            truncation="only_second",
            max_length=60,
            stride=11,
            padding="max_length",
            padding_side=side,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        assert len(rows.input_ids) > 3
        seen = []
        for index, (ids, offsets) in enumerate(zip(rows.input_ids, rows.offset_mapping, strict=True)):
            sequences = rows.sequence_ids(index)
            assert len(ids) == len(offsets) == len(sequences) == 60
            first = [span for span, sequence in zip(offsets, sequences, strict=True) if sequence == 0]
            assert first == fast(question, return_offsets_mapping=True).offset_mapping
            assert all(span == (0, 0) for span, sequence in zip(offsets, sequences, strict=True) if sequence is None)
            seen += [(token, span) for token, span, number in zip(ids, offsets, sequences, strict=True) if number == 1]
        assert set(seen) == set(zip(whole.input_ids, whole.offset_mapping, strict=True))
        assert list(rows["overflow_to_sample_mapping"]) == [0] * len(rows.input_ids)


def test_questions_about_places(letters: ReformerTokenizerFast) -> None:
    encoding = letters("aﬁ  bé", "e\u0301x", return_offsets_mapping=True)
    assert encoding.tokens() == ["▁", "a", "f", "i", "▁", "b", "é", "▁", "é", "x"]
    assert encoding.char_to_token(1) == 2
    assert [encoding.char_to_token(place) for place in range(6)] == [1, 2, 4, 4, 5, 6]
    assert encoding.char_to_token(1, sequence_index=1) == 8
    assert encoding.char_to_token(2, sequence_index=1) == 9
    assert encoding.char_to_token(3, sequence_index=1) is None
    assert encoding.token_to_chars(4) == (2, 4)
    assert encoding.char_to_word(4) == 1
    assert encoding.word_to_chars(1) == (2, 6)
    assert encoding.word_to_tokens(1) == (4, 7)
    again = pickle.loads(pickle.dumps(encoding))
    assert again.token_to_chars(4) == (2, 4)
    assert again.offset_mapping == encoding.offset_mapping


def test_words_count_through_special_tokens(letters: ReformerTokenizerFast) -> None:
    encoding = letters("a b</s>c d")
    assert encoding.tokens() == ["▁", "a", "▁", "b", "</s>", "▁", "c", "▁", "d"]
    assert encoding.word_ids() == [0, 0, 1, 1, 2, 3, 3, 4, 4]


def test_spaces_around_tokens_that_take_them(model_file: ModelFile) -> None:
    from tokenizers import AddedToken

    for stripping in ({"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}):
        token = AddedToken("[M]", special=True, **stripping)
        slow = ReformerTokenizer(model_file("bpe"), mask_token=token)
        fast = ReformerTokenizerFast(model_file("bpe"), mask_token=token)
        for text in ("the  [M]  fox", "[M]", "the[M]fox [M][M] x", " [M] "):
            encoding = fast(text, return_offsets_mapping=True)
            assert encoding.input_ids == slow(text).input_ids, (stripping, text)
        start, end = fast("the  [M]  fox", return_offsets_mapping=True).offset_mapping[-1 - len(fast("fox").input_ids)]
        assert (start, end) == (5 - 2 * bool(token.lstrip), 8 + 2 * bool(token.rstrip))


@pytest.mark.parametrize("stride", [8, 9])
def test_windows_that_would_not_move_on_are_refused(stride):
    tokenizer = ReformerByteTokenizer()
    asked = {"truncation": True, "max_length": 8, "return_overflowing_tokens": True}
    assert len(tokenizer("word " * 9, stride=7, **asked)["input_ids"]) > 1
    with pytest.raises(ValueError, match=f"stride must be less than max_length=8, got {stride}"):
        tokenizer("word " * 9, stride=stride, **asked)
