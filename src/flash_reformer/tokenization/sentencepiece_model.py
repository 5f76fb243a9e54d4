"""A SentencePiece model: the bytes of a ``.model`` file, checked once, and what the tokenizers ask of it."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

#: What SentencePiece writes for a space.
SPACE = "▁"

#: The messages of a ``.model`` file; they are made at import, where no type checker sees them.
MESSAGES: Any = sentencepiece_model_pb2


@dataclass(frozen=True)
class SentencePieceModel:
    """The bytes of a ``.model`` file; :func:`read_model` makes one and raises what is wrong with it."""

    data: bytes

    def __reduce__(self) -> tuple[type[SentencePieceModel], tuple[bytes]]:
        return type(self), (self.data,)

    @functools.cached_property
    def proto(self) -> Any:
        """The parsed file."""
        proto = MESSAGES.ModelProto()
        proto.ParseFromString(self.data)
        return proto

    @functools.cached_property
    def processor(self) -> Any:
        """SentencePiece itself, without sampling."""
        return self.make_processor({})

    def make_processor(self, sp_model_kwargs: Mapping[str, Any]) -> Any:
        """Return a new ``SentencePieceProcessor`` with these arguments, such as ``enable_sampling``."""
        processor = SentencePieceProcessor(**sp_model_kwargs)
        processor.LoadFromSerializedProto(self.data)
        return processor

    @property
    def kind(self) -> str:
        """``"unigram"``, ``"bpe"``, ``"word"`` or ``"char"``."""
        return str(MESSAGES.TrainerSpec.ModelType.Name(self.proto.trainer_spec.model_type)).lower()

    @property
    def byte_fallback(self) -> bool:
        """Whether characters outside the vocabulary become bytes."""
        return bool(self.proto.trainer_spec.byte_fallback)

    @property
    def space_at_end(self) -> bool:
        """Whether a space belongs to the word before it."""
        return bool(self.proto.trainer_spec.treat_whitespace_as_suffix)

    @property
    def adds_dummy_space(self) -> bool:
        """Whether a text is read as though a space stood before it (or after it, where spaces are at the end)."""
        return bool(self.proto.normalizer_spec.add_dummy_prefix)

    @property
    def unk_piece(self) -> str:
        """The name of the unknown token."""
        return next(name for _, name, _ in self.pieces("UNKNOWN"))

    def pieces(self, *types: str) -> Iterator[tuple[int, str, float]]:
        """Yield id, name and score of the entries of these types: ``NORMAL``, ``USER_DEFINED``, ``CONTROL``, ..."""
        wanted = {MESSAGES.ModelProto.SentencePiece.Type.Value(name) for name in types}
        for index, piece in enumerate(self.proto.pieces):
            if piece.type in wanted:
                yield index, piece.piece, piece.score

    @functools.cached_property
    def user_defined(self) -> frozenset[str]:
        """Symbols that its maker gave; they are never split, and normalisation leaves them alone."""
        return frozenset(name for _, name, _ in self.pieces("USER_DEFINED"))

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every entry with its id."""
        return {piece.piece: index for index, piece in enumerate(self.proto.pieces)}

    @functools.cached_property
    def merges_by_rank(self) -> bool:
        """Whether merging ranked pairs is all there is to it: BPE as it is trained.

        SentencePiece also merges a character that is no entry, and takes unused entries apart again.
        """
        if self.kind != "bpe" or any(self.pieces("UNUSED")):
            return False
        return all(char in self.vocabulary for _, name, _ in self.pieces("NORMAL") for char in name)

    @functools.cached_property
    def splits_at_spaces(self) -> bool:
        """Whether no entry holds a space but at its edge, so that words can be segmented one by one."""
        if not self.proto.normalizer_spec.escape_whitespaces or SPACE not in self.vocabulary:
            return False
        entries = (name for _, name, _ in self.pieces("NORMAL", "USER_DEFINED", "UNUSED"))
        return not any(SPACE in (name[:-1] if self.space_at_end else name[1:]) for name in entries)


def read_model(vocab_file: str | os.PathLike[str] | None) -> SentencePieceModel:
    """Read a ``.model`` file; ``ValueError`` naming ``vocab_file`` if it is missing, empty or something else."""
    if vocab_file is None:
        raise ValueError("vocab_file must be the path of a SentencePiece .model file, got None")
    path = Path(vocab_file)
    if not path.is_file():
        raise ValueError(f"vocab_file {path}: there is no such file")
    data = path.read_bytes()
    try:
        model = SentencePieceModel(data)
        model.processor.GetPieceSize()
    except RuntimeError as error:  # all that SentencePiece raises
        raise ValueError(
            f"vocab_file {path} ({len(data)} bytes) is no SentencePiece model, or damaged: {error}"
        ) from error
    return model
