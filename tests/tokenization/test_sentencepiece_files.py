"""What is saved comes back: as either class, by AutoTokenizer, byte for byte; what is broken is refused by name."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from flash_reformer import ReformerConfig, ReformerTokenizer, ReformerTokenizerFast
from tests.tokenization.corpus import adversarial, ordinary

ModelFile = Callable[[str], str]
Either = type[ReformerTokenizer] | type[ReformerTokenizerFast]
EITHER = pytest.mark.parametrize("kind", [ReformerTokenizer, ReformerTokenizerFast])
TEXTS = [*ordinary(20, seed=21), *adversarial(150, seed=22), "the [MASK]fox</s> <q> word"]
SPECIAL = {"mask_token": "[MASK]", "additional_special_tokens": ["<q>"]}


@pytest.mark.floor
@EITHER
@pytest.mark.parametrize("name", ["bpe", "unigram", "bpe_symbols", "unigram_bytes", "bpe_suffix"])
def test_a_saved_folder_loads_as_either_class(model_file: ModelFile, tmp_path: Path, kind: Either, name: str) -> None:
    tokenizer = kind(model_file(name), **SPECIAL)
    tokenizer.add_tokens(["word"])
    ids = tokenizer(TEXTS).input_ids
    saved = tokenizer.save_pretrained(tmp_path)
    assert all(Path(path).is_file() for path in saved)
    assert (tmp_path / "spiece.model").read_bytes() == Path(model_file(name)).read_bytes()
    for with_config in (False, True):
        if with_config:
            ReformerConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
        for load, wanted in (
            (ReformerTokenizer.from_pretrained, ReformerTokenizer),
            (ReformerTokenizerFast.from_pretrained, ReformerTokenizerFast),
            (AutoTokenizer.from_pretrained, ReformerTokenizerFast),
        ):
            again = load(tmp_path)
            assert type(again) is wanted
            assert again(TEXTS).input_ids == ids
            assert again.special_tokens_map == tokenizer.special_tokens_map
            assert len(again) == len(tokenizer)


@EITHER
def test_pickles_and_copies(model_file: ModelFile, kind: Either) -> None:
    tokenizer = kind(model_file("unigram_symbols"), **SPECIAL)
    tokenizer.add_tokens(["word"])
    for again in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert again(TEXTS).input_ids == tokenizer(TEXTS).input_ids
        assert again.decode(again(TEXTS[0]).input_ids) == tokenizer.decode(tokenizer(TEXTS[0]).input_ids)
        again.add_tokens(["of its own"])
        assert len(again) == len(tokenizer) + 1


@EITHER
def test_the_model_file_outlives_its_folder(model_file: ModelFile, tmp_path: Path, kind: Either) -> None:
    file = tmp_path / "gone.model"
    shutil.copy(model_file("bpe"), file)
    tokenizer = kind(str(file))
    data = file.read_bytes()
    file.unlink()
    (path,) = pickle.loads(pickle.dumps(tokenizer)).save_vocabulary(str(tmp_path), filename_prefix="mine")
    assert Path(path) == tmp_path / "mine-spiece.model"
    assert Path(path).read_bytes() == data
    with pytest.raises(ValueError, match="save_directory must be a folder, got"):
        tokenizer.save_vocabulary(str(tmp_path / "nowhere"))


@pytest.mark.floor
@pytest.mark.parametrize("name", ["bpe", "unigram", "bpe_symbols", "unigram_symbols", "bpe_bytes", "unigram_identity"])
def test_tokenizer_json_is_enough_for_the_fast_class(model_file: ModelFile, tmp_path: Path, name: str) -> None:
    tokenizer = ReformerTokenizerFast(model_file(name), **SPECIAL)
    tokenizer.save_pretrained(tmp_path / "both")
    wanted = tokenizer(TEXTS, return_offsets_mapping=True)
    folder = tmp_path / "both"
    for generation in ("first", "second"):  # what was put together is saved and put together again
        (folder / "spiece.model").unlink(missing_ok=True)
        again = ReformerTokenizerFast.from_pretrained(folder)
        found = again(TEXTS, return_offsets_mapping=True)
        assert found.input_ids == wanted.input_ids
        assert found.offset_mapping == wanted.offset_mapping
        assert type(AutoTokenizer.from_pretrained(folder)) is ReformerTokenizerFast
        with pytest.raises(ValueError, match=r"vocab_file \(spiece.model\) is missing .* only ReformerTokenizerFast"):
            ReformerTokenizer.from_pretrained(folder)
        folder = tmp_path / generation
        saved = again.save_pretrained(folder)
        assert sorted(Path(path).name for path in saved) == ["tokenizer.json", "tokenizer_config.json"]
        assert again.save_vocabulary(str(folder)) == ()


def test_rules_that_tokenizer_json_cannot_hold_are_refused(model_file: ModelFile, tmp_path: Path) -> None:
    ReformerTokenizerFast(model_file("bpe_suffix")).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json has a normalizer .*: Replace; give vocab_file as well"):
        ReformerTokenizerFast.from_pretrained(tmp_path)


@EITHER
def test_a_missing_or_damaged_model_is_named(model_file: ModelFile, tmp_path: Path, kind: Either) -> None:
    whole = Path(model_file("bpe")).read_bytes()
    for name, data in {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"no model at all"}.items():
        file = tmp_path / f"{name}.model"
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"vocab_file .*{name}.model \({len(data)} bytes\) is no SentencePiece"):
            kind(str(file))
    with pytest.raises(ValueError, match=r"vocab_file .*nowhere.model: there is no such file"):
        kind(str(tmp_path / "nowhere.model"))
    with pytest.raises(ValueError, match="vocab_file"):
        kind()
    folder = tmp_path / "folder"
    kind(model_file("bpe")).save_pretrained(folder)
    (folder / "spiece.model").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"vocab_file .*spiece.model \(7 bytes\) is no SentencePiece"):
        kind.from_pretrained(folder)


def test_files_that_do_not_go_together_are_refused(model_file: ModelFile, tmp_path: Path) -> None:
    ReformerTokenizerFast(model_file("bpe")).save_pretrained(tmp_path)
    shutil.copy(model_file("unigram"), tmp_path / "spiece.model")
    with pytest.raises(ValueError, match=r"vocab_file .* and tokenizer_file .* hold different vocabularies"):
        ReformerTokenizerFast.from_pretrained(tmp_path)
    (tmp_path / "spiece.model").unlink()
    for broken in ("{}", "{"):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match=r"tokenizer_file .* cannot be read"):
            ReformerTokenizerFast.from_pretrained(tmp_path)


def test_files_of_other_tokenizers_are_refused(model_file: ModelFile, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    ReformerTokenizerFast(model_file("bpe")).backend_tokenizer.save(str(file))
    good = json.loads(file.read_text("utf-8"))
    changes = {
        "pre-tokenizers that no Reformer has: \\['Whitespace'\\]": {"pre_tokenizer": {"type": "Whitespace"}},
        "normalizer that no Reformer has: Lowercase": {"normalizer": {"type": "Lowercase"}},
        "no unknown token": {"model": {**good["model"], "unk_token": None}},
    }
    for message, change in changes.items():
        file.write_text(json.dumps({**good, **change}), encoding="utf-8")
        with pytest.raises(ValueError, match=f"tokenizer_file .*{message}"):
            ReformerTokenizerFast(tokenizer_file=str(file))


def test_kinds_of_model(tmp_path: Path) -> None:
    import io

    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(ordinary(50, seed=1)),
        model_writer=written,
        vocab_size=150,
        model_type="char",
        minloglevel=2,
    )
    file = tmp_path / "char.model"
    file.write_bytes(written.getvalue())
    assert ReformerTokenizer(str(file)).tokenize("the") == ["▁", "t", "h", "e"]
    with pytest.raises(ValueError, match="vocab_file must hold a Unigram or BPE model, got a char model"):
        ReformerTokenizerFast(str(file))
