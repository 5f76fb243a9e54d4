"""No token beyond the model's vocabulary comes unasked and unsaid; sampling; the words of the slow class."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import SentencePieceProcessor

from flash_reformer import ReformerTokenizer, ReformerTokenizerFast
from flash_reformer.tokenization import train_vocabulary
from tests.tokenization.corpus import ordinary

ModelFile = Callable[[str], str]
Either = type[ReformerTokenizer] | type[ReformerTokenizerFast]
EITHER = pytest.mark.parametrize("kind", [ReformerTokenizer, ReformerTokenizerFast])


@pytest.mark.floor
@EITHER
def test_padding_is_what_the_vocabulary_has(model_file: ModelFile, kind: Either) -> None:
    without = kind(model_file("bpe"))
    assert (without.pad_token, without.pad_token_id) == (None, None)
    assert len(without) == without.vocab_size == 750
    with pytest.raises(ValueError, match="does not have a padding token"):
        without(["a", "bcd the"], padding=True)
    having = kind(model_file("bpe_symbols"))
    assert (having.pad_token, having.pad_token_id, len(having)) == ("<pad>", 3, 750)
    batch = having(["a", "bcd the"], padding=True)
    assert batch.input_ids[0][-1] == 3
    assert batch.attention_mask[0][-1] == 0


@EITHER
def test_a_new_padding_token_says_that_the_model_must_grow(model_file: ModelFile, tmp_path: Path, kind: Either) -> None:
    message = r"pad_token='<pad>' is not among the 750 entries .*resize_token_embeddings\(len\(tokenizer\)\)"
    with pytest.warns(UserWarning, match=message):
        tokenizer = kind(model_file("bpe"), pad_token="<pad>")
    assert (tokenizer.pad_token_id, len(tokenizer), tokenizer.vocab_size) == (750, 751, 750)
    tokenizer.save_pretrained(tmp_path)
    for again in (ReformerTokenizer.from_pretrained(tmp_path), ReformerTokenizerFast.from_pretrained(tmp_path)):
        assert (again.pad_token_id, len(again)) == (750, 751)  # and says no more: it is in the folder
    tokenizer = kind(model_file("bpe"), pad_token="</s>")
    assert (tokenizer.pad_token_id, len(tokenizer)) == (2, 750)


@EITHER
def test_names_that_the_model_has_not(tmp_path: Path, kind: Either) -> None:
    file = tmp_path / "own.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ordinary(60, seed=3)),
        model_prefix=str(tmp_path / "own"),
        vocab_size=500,
        model_type="bpe",
        eos_id=-1,
        unk_piece="<what>",
        minloglevel=2,
    )
    tokenizer = kind(str(file))
    assert (tokenizer.eos_token, tokenizer.unk_token, tokenizer.unk_token_id) == (None, "<what>", 0)
    assert len(tokenizer) == 500
    assert tokenizer("☃").input_ids == SentencePieceProcessor(model_file=str(file)).Encode("☃")
    with pytest.warns(UserWarning, match="eos_token='<end>' is not among the 500 entries"):
        assert kind(str(file), eos_token="<end>").eos_token_id == 500


@EITHER
def test_additional_tokens_come_in_order(model_file: ModelFile, kind: Either) -> None:
    tokenizer = kind(model_file("unigram"), additional_special_tokens=["<one>", "<two>"], mask_token="[MASK]")
    size = tokenizer.vocab_size
    assert tokenizer.convert_tokens_to_ids(["[MASK]", "<one>", "<two>"]) == [size, size + 1, size + 2]
    ids = tokenizer("a<two>b").input_ids
    assert size + 2 in ids
    assert tokenizer.decode(ids) == "a<two> b"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a b"


@pytest.mark.floor
@EITHER
def test_end_of_text_on_request(model_file: ModelFile, tmp_path: Path, kind: Either) -> None:
    plain = kind(model_file("bpe"))
    tokenizer = kind(model_file("bpe"), add_eos_token=True)
    one, two = plain("the fox").input_ids, plain("jumps").input_ids
    tokenizer.save_pretrained(tmp_path)
    for again in (
        tokenizer,
        ReformerTokenizer.from_pretrained(tmp_path),
        ReformerTokenizerFast.from_pretrained(tmp_path),
    ):
        assert again("the fox").input_ids == [*one, 2]
        assert again("the fox", "jumps").input_ids == [*one, 2, *two, 2]
        assert again("the fox", add_special_tokens=False).input_ids == one


@EITHER
def test_ids_outside_the_vocabulary_are_refused(model_file: ModelFile, kind: Either) -> None:
    tokenizer = kind(model_file("bpe"), mask_token="[MASK]")
    assert tokenizer.decode([750]) == "[MASK]"
    for bad in (751, 10**6, -1, -100):
        with pytest.raises(ValueError, match=rf"ids must lie in 0\.\.750, got {bad}"):
            tokenizer.decode([4, bad])


def test_lone_surrogates_are_refused(model_file: ModelFile) -> None:
    for kind in (ReformerTokenizer, ReformerTokenizerFast):
        with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at character 2"):
            kind(model_file("bpe"))(["fine", ("ok", "ab\ud800")])


def test_subword_sampling(model_file: ModelFile, tmp_path: Path) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    plain = ReformerTokenizer(model_file("unigram"))
    kwargs = {"enable_sampling": True, "alpha": 0.1, "nbest_size": -1}
    sampling = ReformerTokenizer(model_file("unigram"), sp_model_kwargs=kwargs)
    assert len({tuple(plain(text).input_ids) for _ in range(5)}) == 1
    drawn = {tuple(sampling(text).input_ids) for _ in range(20)}
    assert len(drawn) > 10
    assert {sampling.decode(row) for row in drawn} == {text}
    sampling.save_pretrained(tmp_path)
    for again in (pickle.loads(pickle.dumps(sampling)), ReformerTokenizer.from_pretrained(tmp_path)):
        assert len({tuple(again(text).input_ids) for _ in range(20)}) > 10
    with pytest.warns(UserWarning, match="only ReformerTokenizer samples"):
        fast = ReformerTokenizerFast.from_pretrained(tmp_path)
    assert fast(text).input_ids == plain(text).input_ids


@EITHER
@pytest.mark.parametrize(
    ("text", "decoded"),
    [("the fox", "the fox"), (" the  fox ", "the fox"), ("e\u0301 ﬁx", "é fix"), ("…", "...")],
)
def test_decoding(model_file: ModelFile, kind: Either, text: str, decoded: str) -> None:
    for name in ("bpe", "unigram", "bpe_bytes", "bpe_suffix", "bpe_plain_start"):
        tokenizer = kind(model_file(name))
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == decoded
        assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == decoded
        assert tokenizer.batch_decode([ids, []]) == [decoded, ""]


@EITHER
def test_bytes_decode_to_characters(model_file: ModelFile, kind: Either) -> None:
    tokenizer = kind(model_file("unigram_bytes"))
    ids = tokenizer("the ☃ 𐌰 fox").input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "the ☃ 𐌰 fox"


def test_the_trained_folder_fits_the_default_config(tmp_path: Path) -> None:
    tokenizer = train_vocabulary(ordinary(60, seed=3), tmp_path, vocab_size=500)
    from flash_reformer import ReformerConfig

    config = ReformerConfig()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (config.pad_token_id, config.eos_token_id) == (0, 2)
