"""Beside transformers' own Reformer tokenizer: what is saved by one loads in the other, and where the two differ.

transformers 5 has one class, BPE only, under both names. From 5.17 to 5.23 it did not change.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer
from transformers.models.reformer.tokenization_reformer import ReformerTokenizer as TheirTokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from flash_reformer import ReformerByteTokenizer, ReformerConfig, ReformerTokenizer, ReformerTokenizerFast
from tests.tokenization.corpus import adversarial, ordinary

ModelFile = Callable[[str], str]
# Without what transformers reads otherwise: half widths that combine, and spaces at the end of a text.
ORDINARY = [text.strip() for text in ordinary(200, seed=31) if "ｷ" not in text]


@pytest.fixture
def theirs(model_file: ModelFile, tmp_path: Path) -> TheirTokenizer:
    folder = tmp_path / "model file only"
    folder.mkdir()
    shutil.copy(model_file("bpe"), folder / "spiece.model")
    return TheirTokenizer.from_pretrained(folder)


@pytest.mark.floor
def test_ours_has_the_ids_of_theirs(model_file: ModelFile, theirs: TheirTokenizer) -> None:
    assert len(ORDINARY) > 100
    for ours in (ReformerTokenizer(model_file("bpe")), ReformerTokenizerFast(model_file("bpe"))):
        assert len(ours) == len(theirs)
        assert (ours.eos_token_id, ours.unk_token_id, ours.pad_token) == (
            theirs.eos_token_id,
            theirs.unk_token_id,
            None,
        )
        assert ours(ORDINARY).input_ids == theirs(ORDINARY).input_ids


@pytest.mark.floor
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {"padding": True},
        {"padding": True, "padding_side": "left", "pad_to_multiple_of": 7},
        {"padding": "max_length", "max_length": 40, "truncation": True},
        {"truncation": "longest_first", "max_length": 9, "return_overflowing_tokens": True, "padding": True},
        {"truncation": True, "max_length": 11, "stride": 4, "return_overflowing_tokens": True},
        {"return_special_tokens_mask": True, "return_length": True, "return_token_type_ids": True},
        {"add_special_tokens": False, "padding": True, "return_tensors": "np"},
    ],
)
def test_arguments_mean_what_they_mean_there(
    model_file: ModelFile, theirs: TheirTokenizer, arguments: dict[str, object], pairs: bool
) -> None:
    if pairs and arguments.get("truncation") == "longest_first":
        arguments = {**arguments, "truncation": "only_second", "max_length": 60}
    theirs.pad_token = theirs.eos_token
    ours = ReformerTokenizerFast(model_file("bpe"), pad_token="</s>")
    texts = ORDINARY[:25], [text[::-1] for text in ORDINARY[:25]] if pairs else None
    if "truncation" in arguments:
        texts = [text[:40].strip() for text in ORDINARY[:25]], texts[1]
    a, b = theirs(*texts, **arguments), ours(*texts, **arguments)
    assert set(a) == set(b)
    for key in a:
        assert [list(row) if hasattr(row, "__len__") else row for row in a[key]] == [
            list(row) if hasattr(row, "__len__") else row for row in b[key]
        ]
    for index in range(len(a["input_ids"])):
        assert a.sequence_ids(index) == b.sequence_ids(index)
        assert a.word_ids(index) == b.word_ids(index)


@pytest.mark.floor
def test_what_they_save_loads_here(model_file: ModelFile, theirs: TheirTokenizer, tmp_path: Path) -> None:
    saved = theirs.save_pretrained(tmp_path / "theirs")
    assert sorted(Path(path).name for path in saved) == ["tokenizer.json", "tokenizer_config.json"]
    ours = ReformerTokenizerFast.from_pretrained(tmp_path / "theirs")
    assert ours(ORDINARY).input_ids == theirs(ORDINARY).input_ids
    # They make "<s>" a special token; beyond that their file says all that the model does.
    exact = ReformerTokenizerFast(model_file("bpe"), additional_special_tokens=["<s>"])
    texts = adversarial(400, seed=32)
    assert ours(texts).input_ids == exact(texts).input_ids
    assert type(AutoTokenizer.from_pretrained(tmp_path / "theirs")) is ReformerTokenizerFast
    with pytest.raises(ValueError, match="which only ReformerTokenizerFast reads"):
        ReformerTokenizer.from_pretrained(tmp_path / "theirs")


@pytest.mark.floor
@pytest.mark.parametrize("kind", [ReformerTokenizer, ReformerTokenizerFast])
def test_what_we_save_loads_there(
    model_file: ModelFile, tmp_path: Path, kind: type[ReformerTokenizer] | type[ReformerTokenizerFast]
) -> None:
    ours = kind(model_file("bpe"), mask_token="[MASK]", additional_special_tokens=["<q>"])
    ours.save_pretrained(tmp_path)
    theirs = TheirTokenizer.from_pretrained(tmp_path)
    assert (len(theirs), theirs.mask_token_id, theirs.eos_token_id) == (752, ours.mask_token_id, 2)
    texts = [*ORDINARY, "the[MASK] fox", "<q>"]
    assert theirs(texts).input_ids == ours(texts).input_ids
    if kind is ReformerTokenizerFast:  # and the general class reads the file by itself
        general = TokenizersBackend(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert general(ORDINARY).input_ids == ours(ORDINARY).input_ids


@pytest.mark.floor
def test_where_they_differ_sentencepiece_is_with_us(model_file: ModelFile, theirs: TheirTokenizer) -> None:
    judge = SentencePieceProcessor(model_file=model_file("bpe"))
    ours = ReformerTokenizerFast(model_file("bpe"))
    for text in ("ｶﾞｷﾞ", "the ", "ﬁ\u0308", "e\u0301\u0323"):
        assert ours(text).input_ids == judge.Encode(text)
        assert theirs(text).input_ids != judge.Encode(text), text
    begin = judge.PieceToId("<s>")
    assert begin in theirs("<s>").input_ids
    assert begin not in ours("<s>").input_ids


@pytest.mark.floor
def test_auto_tokenizer_finds_our_classes(model_file: ModelFile, tmp_path: Path) -> None:
    # A folder as the published checkpoints have it: model, config, and perhaps the class's name of some version.
    shutil.copy(model_file("bpe"), tmp_path / "spiece.model")
    ReformerConfig(vocab_size=750).save_pretrained(tmp_path)
    for name in (None, "ReformerTokenizer", "ReformerTokenizerFast"):
        if name is not None:
            config = {
                "tokenizer_class": name,
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "additional_special_tokens": [],
            }
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        for use_fast in (True, False):  # which transformers 5 takes no notice of
            found = AutoTokenizer.from_pretrained(tmp_path, use_fast=use_fast)
            assert type(found) is ReformerTokenizerFast
            assert found(ORDINARY).input_ids == ReformerTokenizer.from_pretrained(tmp_path)(ORDINARY).input_ids
    ReformerByteTokenizer().save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink()
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ReformerByteTokenizer


def test_other_models_keep_their_tokenizers() -> None:
    mapping = transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING
    assert mapping[ReformerConfig] is ReformerTokenizerFast
    assert mapping[transformers.BertConfig].__module__.startswith("transformers.")
