"""A vocabulary from your own text: SentencePiece's trainer, saved so that both tokenizers load it."""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceTrainer

from flash_reformer.tokenization.inputs import refuse_surrogates
from flash_reformer.tokenization.special_tokens import EOS, PAD, UNK
from flash_reformer.tokenization.tokenizer import VOCAB_FILE
from flash_reformer.tokenization.tokenizer_fast import TOKENIZER_FILE, ReformerTokenizerFast

MODEL_TYPES = ("bpe", "unigram")
NORMALIZATIONS = ("nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf", "identity")

# `ReformerConfig` has padding at 0 and end of text at 2 by default.
_PAD_ID, _UNK_ID, _EOS_ID = 0, 1, 2
_OWN_FILES = (VOCAB_FILE, TOKENIZER_FILE, "tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
# Unigram's sums depend on how many threads share the text, so the number is part of the result.
_THREADS = 4


def train_vocabulary(
    texts: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    vocab_size: int = 320,
    model_type: str = "bpe",
    character_coverage: float = 0.9995,
    byte_fallback: bool = False,
    normalization: str = "nmt_nfkc",
    mask_token: str | None = None,
    additional_special_tokens: Sequence[str] = (),
    overwrite: bool = False,
) -> ReformerTokenizerFast:
    """Train a SentencePiece vocabulary and save it as a tokenizer's folder; the same input gives the same bytes.

    Entries 0, 1 and 2 are "<pad>", "<unk>" and "</s>", as ``ReformerConfig`` expects by default.

    Args:
        texts: paths (``Path``) of UTF-8 files and texts (``str``). Every line is a sentence of its own.
        output: the folder to write: ``spiece.model``, ``tokenizer.json`` and ``tokenizer_config.json``.
        vocab_size: number of entries, special tokens included.
        model_type: ``"bpe"`` (as in the published Reformer) or ``"unigram"``.
        character_coverage: share of the characters of the text that get entries; the others are unknown, or bytes.
        byte_fallback: write characters outside the vocabulary as bytes. Takes 256 entries.
        normalization: SentencePiece's name of the rules that text goes through first.
        mask_token: for masked language models, such as ``"[MASK]"``; an entry of the vocabulary.
        additional_special_tokens: more entries that only stand for themselves.
        overwrite: replace a tokenizer that is already in ``output``.

    Returns:
        The saved tokenizer, loaded. ``ReformerTokenizer.from_pretrained(output)`` loads the other class.

    Raises:
        ValueError: what is wrong with an argument; no text; more entries than the text has material for (the message
            says how many it has); fewer than it has characters.
    """
    _check(vocab_size, model_type, character_coverage, normalization)
    folder = Path(output)
    present = [name for name in _OWN_FILES if (folder / name).exists()]
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {folder}")
    if present and not overwrite:
        raise ValueError(
            f"output {folder} already holds a tokenizer ({', '.join(present)}): overwrite (--overwrite) replaces it"
        )
    symbols = [*([mask_token] if mask_token else []), *additional_special_tokens]
    data = _train(
        list(_lines(texts)),
        vocab_size=vocab_size,
        model_type=model_type,
        character_coverage=character_coverage,
        byte_fallback=byte_fallback,
        normalization_rule_name=normalization,
        control_symbols=symbols,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in present:
        (folder / name).unlink()
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / VOCAB_FILE).write_bytes(data)
        tokenizer = ReformerTokenizerFast(
            str(Path(scratch) / VOCAB_FILE),
            mask_token=mask_token,
            additional_special_tokens=list(additional_special_tokens) or None,
        )
        tokenizer.save_pretrained(folder)
    loaded: ReformerTokenizerFast = ReformerTokenizerFast.from_pretrained(folder)
    return loaded


def _check(vocab_size: int, model_type: str, character_coverage: float, normalization: str) -> None:
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization must be one of {', '.join(NORMALIZATIONS)}, got {normalization!r}")
    if not isinstance(vocab_size, int) or vocab_size < 4:
        raise ValueError(f"vocab_size must be an integer of at least 4, got {vocab_size!r}")
    if not 0.98 <= character_coverage <= 1:  # SentencePiece's own limits
        raise ValueError(f"character_coverage must lie in 0.98..1, got {character_coverage}")


def _lines(texts: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    if isinstance(texts, str | os.PathLike):
        raise TypeError(f"texts must be a list of texts and paths, got the {type(texts).__name__} {str(texts)[:80]!r}")
    for each in texts:
        if isinstance(each, str) and len(each) < 1024 and "\n" not in each and os.path.isfile(each):
            raise ValueError(f"texts: {each!r} names a file; a string is a text itself, so give pathlib.Path({each!r})")
        text = each if isinstance(each, str) else _read(Path(each))
        refuse_surrogates(text)
        yield from (line for line in text.split("\n") if line.strip())


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"texts: there is no file {path}")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"texts: {path} is not UTF-8 text, at byte {error.start}") from error


def _train(lines: list[str], *, vocab_size: int, **arguments: Any) -> bytes:
    if not lines:
        raise ValueError("texts hold no text: every line is empty")
    written = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=written,
            vocab_size=vocab_size,
            pad_id=_PAD_ID,
            unk_id=_UNK_ID,
            eos_id=_EOS_ID,
            bos_id=-1,
            pad_piece=PAD,
            unk_piece=UNK,
            eos_piece=EOS,
            max_sentence_length=1 + max(len(line.encode()) for line in lines),  # longer lines it drops, unsaid
            num_threads=_THREADS,
            minloglevel=2,
            **arguments,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), vocab_size)) from error
    return written.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    """Say what SentencePiece says, in words of our arguments."""
    too_high = re.search(r"Vocabulary size too high .*<= (\d+)", message)
    if too_high:
        return f"vocab_size {vocab_size} is more than this text has material for: it gives at most {too_high[1]}"
    too_low = re.search(r"(\d+) vs (\d+)", message) if "smaller than required_chars" in message else None
    if too_low:
        return (
            f"vocab_size {vocab_size} is less than the {too_low[2]} special tokens and characters of this text: raise "
            "it, or lower character_coverage"
        )
    return f"SentencePiece cannot train on this text: {message}"
