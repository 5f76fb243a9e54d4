"""``tokenizer.json``: written so that other readers get along with it, read so that nothing is lost."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from flash_reformer.tokenization.sentencepiece_model import MESSAGES, SPACE, SentencePieceModel

_TYPE = MESSAGES.ModelProto.SentencePiece.Type
_SPACES = " {2,}"


@dataclass(frozen=True)
class TokenizerFile:
    """What a ``tokenizer.json`` holds: a backend and, apart from it, the names of the model's user-defined symbols."""

    path: str
    backend: Tokenizer
    user_defined: frozenset[str]


def write_tokenizer_file(path: str, backend: Tokenizer, model: SentencePieceModel) -> None:
    """Write a backend, with the user-defined symbols of the model among its added tokens.

    SentencePiece finds these symbols inside a text; other readers would not know them.
    """
    backend.save(path)
    symbols = {model.vocabulary[name]: name for name in model.user_defined}
    if symbols:
        file = Path(path)
        state = json.loads(file.read_text("utf-8"))
        added = {token["id"]: token for token in state["added_tokens"]}
        for index, name in symbols.items():
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
            added.setdefault(index, {"id": index, "content": name, **flags})
        state["added_tokens"] = [added[index] for index in sorted(added)]
        file.write_text(json.dumps(state, indent=2, ensure_ascii=False), encoding="utf-8")


def read_tokenizer_file(path: str) -> TokenizerFile:
    """Read a ``tokenizer.json``; ``ValueError`` naming ``tokenizer_file`` if it is missing or something else.

    Padding and truncation in it are left out: they are how some last call padded.
    """
    try:
        state = json.loads(Path(path).read_text("utf-8"))
        size = len(state["model"]["vocab"])
        symbols = [token for token in state["added_tokens"] if _is_user_defined(token, size)]
        state["added_tokens"] = [token for token in state["added_tokens"] if token not in symbols]
        backend = Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer_file {path} cannot be read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    return TokenizerFile(str(path), backend, frozenset(token["content"] for token in symbols))


def _is_user_defined(token: dict[str, Any], vocab_size: int) -> bool:
    # As written above. What users add as plain text has `normalized` set.
    return token["id"] < vocab_size and not token["special"] and not token["normalized"]


def add_saved_tokens(backend: Tokenizer, saved: TokenizerFile, vocab_file: str) -> None:
    """Give a backend made from ``vocab_file`` the added tokens and the post-processor that were saved beside it.

    Raises ``ValueError`` if the two files hold different vocabularies.
    """
    names = f"vocab_file {vocab_file} and tokenizer_file {saved.path}"
    if saved.backend.get_vocab(with_added_tokens=False) != backend.get_vocab(with_added_tokens=False):
        raise ValueError(f"{names} hold different vocabularies")
    for index, token in sorted(saved.backend.get_added_tokens_decoder().items()):
        add_token(backend, token)
        if backend.token_to_id(token.content) != index:
            raise ValueError(f"{names} do not go together: {token.content!r} has no place at {index}")
    if saved.backend.post_processor is not None:
        backend.post_processor = saved.backend.post_processor


def add_token(backend: Tokenizer, token: AddedToken) -> None:
    """Add a token as what it is, special or not."""
    if token.special:
        backend.add_special_tokens([token])
    else:
        backend.add_tokens([token])


def model_from_file(file: TokenizerFile) -> SentencePieceModel:
    """Return the SentencePiece model that a file was made from, as far as the file tells.

    Vocabulary, scores (Unigram), normalisation table and treatment of spaces are in it. Unused entries are not told
    from others. Raises ``ValueError`` for a file that comes from no SentencePiece model, or whose rules are not those
    that this package or transformers write for a Reformer.
    """
    source = f"tokenizer_file {file.path}"
    state = json.loads(file.backend.to_str())
    kind = state["model"].get("type")
    if kind not in ("BPE", "Unigram"):
        raise ValueError(f"{source} must hold a BPE or Unigram vocabulary made from a SentencePiece model, got {kind}")
    proto = MESSAGES.ModelProto()
    proto.trainer_spec.model_type = MESSAGES.TrainerSpec.ModelType.Value(kind.upper())
    proto.trainer_spec.byte_fallback = bool(state["model"].get("byte_fallback"))
    _add_rules(proto, state, source)
    _add_pieces(proto, state, source, file.user_defined)
    model = SentencePieceModel(proto.SerializeToString())
    try:
        model.processor.GetPieceSize()
    except RuntimeError as error:
        raise ValueError(f"{source} holds no vocabulary that SentencePiece can read: {error}") from error
    return model


def _add_rules(proto: Any, state: dict[str, Any], source: str) -> None:
    rules = proto.normalizer_spec
    rules.remove_extra_whitespaces = False
    for step in _steps(state["normalizer"], "normalizers"):
        if step["type"] == "Precompiled":
            rules.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and step["pattern"] in ({"Regex": _SPACES}, {"String": _SPACES}):
            rules.remove_extra_whitespaces = True
        elif step["type"] != "Strip":
            raise ValueError(f"{source} has a normalizer that no Reformer has: {step['type']}; give vocab_file as well")
    splitters = _steps(state["pre_tokenizer"], "pretokenizers")
    if [step["type"] for step in splitters] != ["Metaspace"] or splitters[0]["replacement"] != SPACE:
        found = [step["type"] for step in splitters]
        raise ValueError(f"{source} has pre-tokenizers that no Reformer has: {found}; give vocab_file as well")
    rules.add_dummy_prefix = splitters[0].get("prepend_scheme", "always") != "never"


def _steps(rule: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    if rule is None:
        return []
    return list(rule[members]) if rule["type"] == "Sequence" else [rule]


def _add_pieces(proto: Any, state: dict[str, Any], source: str, user_defined: frozenset[str]) -> None:
    model = state["model"]
    if model["type"] == "Unigram":
        names = [name for name, _ in model["vocab"]]
        scores = [score for _, score in model["vocab"]]
        unk_id = model["unk_id"]
    else:
        names = sorted(model["vocab"], key=model["vocab"].__getitem__)
        scores = [0.0] * len(names)  # merges have the say; SentencePiece only normalises
        unk_id = model["vocab"].get(model["unk_token"])
    if unk_id is None:
        raise ValueError(f"{source} has no unknown token, which every SentencePiece model has")
    special = {token["content"] for token in state["added_tokens"] if token["special"]}
    for index, (name, score) in enumerate(zip(names, scores, strict=True)):
        kind = "NORMAL"
        if index == unk_id:
            kind = "UNKNOWN"
        elif name in user_defined:
            kind = "USER_DEFINED"
        elif name in special or name in ("<s>", "</s>", "<pad>"):  # the trainer's names: no text is spelled so
            kind = "CONTROL"
        elif proto.trainer_spec.byte_fallback and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
            kind = "BYTE"
        proto.pieces.add(piece=name, score=score, type=_TYPE.Value(kind))
