from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flash_reformer import ReformerByteTokenizer, ReformerConfig
from flash_reformer.tokenization import decode_bytes, encode_bytes

TEXT = "aé👩‍👧\0 \n\t<pad></s><unk>e\u0301 ▁\u0085\ufeff"


@pytest.fixture
def tokenizer() -> ReformerByteTokenizer:
    return ReformerByteTokenizer()


@pytest.mark.floor
def test_the_scheme_of_the_published_model(tokenizer: ReformerByteTokenizer) -> None:
    assert len(tokenizer) == tokenizer.vocab_size == 258
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, None)
    assert tokenizer(TEXT).input_ids == [byte + 2 for byte in TEXT.encode()]
    assert tokenizer("a")["attention_mask"] == [1]
    every = bytes(range(256))
    assert tokenizer.decode(encode_bytes(every), errors="surrogateescape").encode("utf-8", "surrogateescape") == every


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = ReformerByteTokenizer()
    ids = tokenizer(text).input_ids
    assert ids == encode_bytes(text.encode())
    assert tokenizer.decode(ids) == text


@given(st.binary())
def test_any_bytes_decode_as_python_decodes_them(data: bytes) -> None:
    for errors in ("replace", "ignore", "backslashreplace", "surrogateescape"):
        tokenizer = ReformerByteTokenizer(errors=errors)
        assert tokenizer.decode(encode_bytes(data)) == data.decode("utf-8", errors)


def test_errors_are_chosen_once_or_per_call(tokenizer: ReformerByteTokenizer) -> None:
    broken = encode_bytes("aé".encode()[:-1])
    assert tokenizer.decode(broken) == "a\ufffd"
    assert tokenizer.decode(broken, errors="ignore") == "a"
    assert tokenizer.batch_decode([broken, broken], errors="backslashreplace") == ["a\\xc3", "a\\xc3"]
    with pytest.raises(UnicodeDecodeError):
        ReformerByteTokenizer(errors="strict").decode(broken)
    for wrong in ("no-such-handler", "xmlcharrefreplace", 3):
        with pytest.raises(ValueError, match=r"errors must be what bytes\.decode takes"):
            ReformerByteTokenizer(errors=wrong)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="errors must be"):
            tokenizer.decode(broken, errors=wrong)


def test_batches_pad_on_either_side(tokenizer: ReformerByteTokenizer) -> None:
    right = tokenizer(["ab", "cdé"], padding=True, return_tensors="pt")
    assert right.input_ids.tolist() == [[99, 100, 0, 0], [101, 102, 0xC3 + 2, 0xA9 + 2]]
    assert right.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    left = tokenizer(["ab", "cdé"], padding="max_length", max_length=5, padding_side="left", return_tensors="pt")
    assert left.input_ids.tolist() == [[0, 0, 0, 99, 100], [0, 101, 102, 0xC3 + 2, 0xA9 + 2]]
    assert left.attention_mask.tolist() == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 1]]
    assert tokenizer.batch_decode(left.input_ids, skip_special_tokens=True) == ["ab", "cdé"]
    assert tokenizer.decode(left.input_ids[0]) == "<pad><pad><pad>ab"
    assert isinstance(tokenizer("a", return_tensors="pt").input_ids, torch.Tensor)
    cut = tokenizer("abcdef", truncation=True, max_length=4, stride=1, return_overflowing_tokens=True)
    assert [tokenizer.decode(row) for row in cut.input_ids] == ["abcd", "def"]


@pytest.mark.floor
def test_end_of_text_on_request(tmp_path: Path) -> None:
    tokenizer = ReformerByteTokenizer(add_eos_token=True)
    assert tokenizer("ab").input_ids == [99, 100, 1]
    assert tokenizer("a", "b").input_ids == [99, 1, 100, 1]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [99, 100]
    assert tokenizer("abcdef", truncation=True, max_length=3).input_ids == [99, 100, 1]
    assert tokenizer.decode([99, 1]) == "a</s>"
    assert tokenizer.decode([99, 1], skip_special_tokens=True) == "a"
    tokenizer.save_pretrained(tmp_path)
    assert ReformerByteTokenizer.from_pretrained(tmp_path)("ab").input_ids == [99, 100, 1]
    assert ReformerByteTokenizer.from_pretrained(tmp_path, add_eos_token=False)("ab").input_ids == [99, 100]


def test_no_text_forges_padding_or_end_of_text(tokenizer: ReformerByteTokenizer) -> None:
    for words in ("<pad>", "</s>", "a</s><pad>b"):
        for split in (True, False):
            assert tokenizer(words, split_special_tokens=split).input_ids == encode_bytes(words.encode())
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>"]) == [0, 1]


@pytest.mark.floor
def test_added_tokens_follow_the_bytes() -> None:
    tokenizer = ReformerByteTokenizer(mask_token="[MASK]", additional_special_tokens=["<q>"])
    assert len(tokenizer) == 260
    assert (tokenizer.mask_token_id, tokenizer.convert_tokens_to_ids("<q>")) == (258, 259)
    ids = tokenizer("a[MASK]é<q>").input_ids
    assert ids == [99, 258, 0xC3 + 2, 0xA9 + 2, 259]
    assert tokenizer.decode(ids) == "a[MASK]é<q>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "aé"
    assert tokenizer("[MASK]", split_special_tokens=True).input_ids == encode_bytes(b"[MASK]")
    assert tokenizer.add_special_tokens({"cls_token": "[CLS]"}) == 1
    assert tokenizer("[CLS]a").input_ids == [260, 99]
    assert tokenizer.add_tokens(["word"]) == 1
    assert tokenizer.decode(tokenizer("a word").input_ids, skip_special_tokens=True) == "a word"


def test_offsets_are_characters(tokenizer: ReformerByteTokenizer) -> None:
    encoding = tokenizer(TEXT, return_offsets_mapping=True)
    wanted = [(place, place + 1) for place, char in enumerate(TEXT) for _ in char.encode()]
    assert encoding.offset_mapping == wanted
    assert encoding.char_to_token(2) == 3
    assert encoding.token_to_chars(4) == (2, 3)


@pytest.mark.floor
@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_and_contexts_in_strides(side: str) -> None:
    tokenizer = ReformerByteTokenizer(add_eos_token=True)
    question, context = "Wer é?", "ältere 👩‍👧 Männer, " * 9
    rows = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=48,
        stride=7,
        padding="max_length",
        padding_side=side,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert len(rows.input_ids) > 4
    seen: dict[int, str] = {}
    data = context.encode()
    for index, (ids, offsets) in enumerate(zip(rows.input_ids, rows.offset_mapping, strict=True)):
        assert len(ids) == 48
        placed = list(zip(ids, offsets, rows.sequence_ids(index), strict=True))
        assert decode_bytes([token for token, _, number in placed if number == 0]) == question.encode()
        own = [(token, span) for token, span, number in placed if number == 1]
        assert decode_bytes([token for token, _ in own]) in data
        assert all((token - 2) in context[a:b].encode() and b == a + 1 for token, (a, b) in own)
        seen.update({a: context[a:b] for _, (a, b) in own})
        assert all(span == (0, 0) for _, span, number in placed if number is None)
    assert "".join(seen[place] for place in sorted(seen)) == context


@pytest.mark.floor
def test_a_saved_folder_is_the_same_tokenizer(tmp_path: Path) -> None:
    tokenizer = ReformerByteTokenizer(errors="ignore", mask_token="[MASK]", padding_side="left", model_max_length=99)
    tokenizer.add_tokens(["word"])
    tokenizer(["a", "bc"], padding=True, padding_side="right", truncation=True, max_length=5)
    tokenizer.save_pretrained(tmp_path)
    text = "[MASK] a word </s>"
    for folder in ("without config.json", "with config.json"):
        if folder == "with config.json":
            ReformerConfig(vocab_size=260).save_pretrained(tmp_path)
        for again in (
            ReformerByteTokenizer.from_pretrained(tmp_path),
            AutoTokenizer.from_pretrained(tmp_path),
            AutoTokenizer.from_pretrained(tmp_path, use_fast=False),
        ):
            assert type(again) is ReformerByteTokenizer
            assert again(text).input_ids == tokenizer(text).input_ids
            assert (again.errors, again.mask_token_id, len(again)) == ("ignore", 258, 260)
            assert (again.padding_side, again.model_max_length) == ("left", 99)
            assert len(again("abcdefgh").input_ids) == 8  # no truncation left over from a call


def test_the_last_call_is_not_saved(tmp_path: Path) -> None:
    tokenizer = ReformerByteTokenizer()
    tokenizer(["a", "bc"], padding="max_length", padding_side="left", truncation=True, max_length=5)
    tokenizer.save_pretrained(tmp_path)
    again = ReformerByteTokenizer.from_pretrained(tmp_path)
    assert (again.padding_side, again.backend_tokenizer.truncation, again.backend_tokenizer.padding) == (
        "right",
        None,
        None,
    )


def test_pickles_and_copies() -> None:
    tokenizer = ReformerByteTokenizer(errors="ignore", mask_token="[MASK]", add_eos_token=True)
    for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert again("[MASK]é").input_ids == tokenizer("[MASK]é").input_ids == [258, 0xC3 + 2, 0xA9 + 2, 1]
        assert again.decode([99, 0xC3 + 2]) == "a"


def test_padding_may_be_another_token(tmp_path: Path) -> None:
    tokenizer = ReformerByteTokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer(["a", "bc"], padding=True).input_ids == [[99, 1], [100, 101]]
    tokenizer.save_pretrained(tmp_path)
    assert ReformerByteTokenizer.from_pretrained(tmp_path).pad_token_id == 1
    with pytest.warns(UserWarning, match=r"pad_token='\[PAD\]' .* beyond its 258 entries: .*resize_token_embeddings"):
        assert ReformerByteTokenizer(pad_token="[PAD]").pad_token_id == 258
    assert ReformerByteTokenizer(pad_token=None).pad_token is None


def test_tokens_by_name(tokenizer: ReformerByteTokenizer) -> None:
    names = tokenizer.tokenize("é x")
    assert len(set(tokenizer.get_vocab())) == 258
    assert tokenizer.convert_tokens_to_ids(names) == tokenizer("é x").input_ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("é x").input_ids) == names
    assert tokenizer.convert_tokens_to_string(names) == "é x"
    with pytest.raises(ValueError, match="tokens must be in the vocabulary, got 'nothing'"):
        tokenizer.convert_tokens_to_string(["nothing"])


@pytest.mark.parametrize("bad", [258, 1000, -1, -100])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: ReformerByteTokenizer, bad: int) -> None:
    with pytest.raises(ValueError, match=rf"ids must lie in 0..257, got {bad}"):
        tokenizer.decode([99, bad])


def test_what_is_no_text_is_refused(tokenizer: ReformerByteTokenizer) -> None:
    for given_ in ("a\ud800b", ["ok", "a\udfff"]):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D(800|FFF) at character 1"):
            tokenizer(given_)
    with pytest.raises(ValueError, match="text input must be of type"):
        tokenizer(3)


def test_foreign_files_are_refused(tokenizer: ReformerByteTokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    state["model"]["vocab"]["A"], state["model"]["vocab"]["B"] = 68, 67
    file.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"tokenizer_file .*tokenizer.json does not hold the byte vocabulary"):
        ReformerByteTokenizer.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_file .*tokenizer.json cannot be read"):
        ReformerByteTokenizer(tokenizer_file=str(file))
    with pytest.raises(NotImplementedError, match="train_vocabulary"):
        tokenizer.train_new_from_iterator(["a"], 300)
