"""Which special tokens a vocabulary has, and which would have to be added to it."""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import Any

from tokenizers import AddedToken

Name = str | AddedToken | None

EOS = "</s>"
UNK = "<unk>"
PAD = "<pad>"


def resolve_special_tokens(
    given: dict[str, Any], known: Container[str], unk_piece: str, vocab_size: int
) -> dict[str, Name]:
    """Return ``eos_token``, ``unk_token`` and ``pad_token`` so that none is new to the vocabulary unnoticed.

    The usual names ("</s>", "<unk>", "<pad>") hold where the vocabulary has them. Where it has not, there is no such
    token (the unknown token is then the one that every SentencePiece model has). Any other name, and "<pad>" given
    by name, is honoured: it becomes a new token, with a warning that the model must grow.
    """
    eos, unk, pad = given.get("eos_token"), given.get("unk_token"), given.get("pad_token")
    if str(eos) == EOS and EOS not in known:
        eos = None
    if unk is None or (str(unk) == UNK and UNK not in known):
        unk = unk_piece
    if pad is None and PAD in known:
        pad = PAD
    resolved = {"eos_token": eos, "unk_token": unk, "pad_token": pad}
    for name, token in resolved.items():
        if token is not None and str(token) not in known:
            warnings.warn(
                f"{name}={str(token)!r} is not among the {vocab_size} entries of the vocabulary and becomes a new "
                "token beyond them: call model.resize_token_embeddings(len(tokenizer)), or the model has no such id",
                stacklevel=3,
            )
    return resolved
