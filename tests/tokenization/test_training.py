from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flash_reformer import ReformerTokenizer, ReformerTokenizerFast
from flash_reformer.tokenization import train_vocabulary
from tests.tokenization.corpus import ordinary

TEXTS = ordinary(250, seed=41)


def digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.iterdir()):
        yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.floor
@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_vocabulary_from_text(tmp_path: Path, model_type: str, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    trained = train_vocabulary(
        [file], tmp_path / "out", vocab_size=420, model_type=model_type, mask_token="[MASK]", character_coverage=1.0
    )
    assert (len(trained), trained.vocab_size) == (420, 420)
    assert trained.convert_ids_to_tokens([0, 1, 2, 3]) == ["<pad>", "<unk>", "</s>", "[MASK]"]
    assert (trained.pad_token_id, trained.unk_token_id, trained.eos_token_id, trained.mask_token_id) == (0, 1, 2, 3)
    texts = [*TEXTS[:40], "the [MASK] fox☃</s>"]
    ids = trained(texts).input_ids
    assert sum(map(len, ids)) < 0.9 * sum(map(len, texts))  # it learned pieces longer than a character
    assert 1 not in {index for row in ids[:-1] for index in row}
    for again in (
        ReformerTokenizer.from_pretrained(tmp_path / "out"),
        ReformerTokenizerFast.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    ):
        assert again(texts).input_ids == ids
        assert again.special_tokens_map == trained.special_tokens_map
    assert trained.decode(ids[-1], skip_special_tokens=True) == "the fox"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_bytes(tmp_path: Path, model_type: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n".join(TEXTS), encoding="utf-8")
    for folder, texts in (("a", TEXTS), ("b", TEXTS), ("c", [file]), ("d", TEXTS[1:])):
        train_vocabulary(texts, tmp_path / folder, vocab_size=400, model_type=model_type)
    first = dict(digests(tmp_path / "a"))
    assert sorted(first) == ["spiece.model", "tokenizer.json", "tokenizer_config.json"]
    assert dict(digests(tmp_path / "b")) == dict(digests(tmp_path / "c")) == first
    assert dict(digests(tmp_path / "d")) != first


def test_options_reach_the_trainer(tmp_path: Path) -> None:
    tokenizer = train_vocabulary(
        TEXTS,
        tmp_path,
        vocab_size=600,
        byte_fallback=True,
        normalization="identity",
        character_coverage=0.98,
        additional_special_tokens=["<q>", "<a>"],
    )
    assert tokenizer.convert_tokens_to_ids(["<q>", "<a>"]) == [3, 4]
    assert tokenizer.decode(tokenizer("☃ ﬁ").input_ids) == "☃ ﬁ"
    assert tokenizer.unk_token_id not in tokenizer("☃").input_ids


def test_long_lines_count(tmp_path: Path) -> None:
    # Left alone, the trainer drops lines of more than 4,192 bytes without a word.
    tokenizer = train_vocabulary(["zyx wvu " * 900], tmp_path, vocab_size=16)
    assert tokenizer.unk_token_id not in tokenizer("zyx wvu").input_ids


def test_overwriting_is_asked_for(tmp_path: Path) -> None:
    train_vocabulary(TEXTS, tmp_path, vocab_size=400)
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"output .* already holds a tokenizer \(spiece.model, .*\): overwrite"):
        train_vocabulary(TEXTS, tmp_path, vocab_size=410)
    assert len(train_vocabulary(TEXTS, tmp_path, vocab_size=410, overwrite=True)) == 410
    assert not (tmp_path / "special_tokens_map.json").exists()
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="output must be a folder, got the file"):
        train_vocabulary(TEXTS, file)


@pytest.mark.parametrize(
    ("texts", "arguments", "message"),
    [
        ([], {}, "texts hold no text"),
        (["", " \n\t"], {}, "texts hold no text"),
        (TEXTS, {"model_type": "word"}, "model_type must be one of bpe, unigram, got 'word'"),
        (TEXTS, {"normalization": "nfd"}, "normalization must be one of nmt_nfkc, .*, got 'nfd'"),
        (TEXTS, {"vocab_size": 3}, "vocab_size must be an integer of at least 4, got 3"),
        (TEXTS, {"character_coverage": 0.5}, r"character_coverage must lie in 0\.98\.\.1, got 0\.5"),
        (TEXTS, {"vocab_size": 50}, r"vocab_size 50 is less than the 3\d\d special tokens and characters"),
        (TEXTS, {"vocab_size": 9000}, r"vocab_size 9000 is more than this text has .*: it gives at most \d+"),
        (
            TEXTS,
            {"vocab_size": 9000, "model_type": "unigram"},
            r"vocab_size 9000 is more than this text has .*: it gives at most \d+",
        ),
        ([Path("no-such-file")], {}, "texts: there is no file no-such-file"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(
    tmp_path: Path, texts: list[str], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_vocabulary(texts, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_text_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"texts: .*latin.txt is not UTF-8 text, at byte 2"):
        train_vocabulary([file], tmp_path / "out")
    with pytest.raises(TypeError, match="texts must be a list of texts and paths, got the str 'a text'"):
        train_vocabulary("a text", tmp_path / "out")
    with pytest.raises(ValueError, match="lone surrogate"):
        train_vocabulary(["a\ud800"], tmp_path / "out")


def test_a_string_that_names_a_file_is_no_text(tmp_path):
    (tmp_path / "text.txt").write_text("some words of text")
    with pytest.raises(ValueError, match=r"names a file; .* give pathlib.Path"):
        train_vocabulary([str(tmp_path / "text.txt")], tmp_path / "made", vocab_size=10)
    assert not (tmp_path / "made").exists()
