"""``ReformerTokenizerFast``: the segmentation of ``ReformerTokenizer`` by the ``tokenizers`` library, with offsets."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from flash_reformer.tokenization.backend import make_backend
from flash_reformer.tokenization.exact import ExactTokenizer
from flash_reformer.tokenization.inputs import WindowsMoveOn, refuse_surrogates
from flash_reformer.tokenization.sentencepiece_model import SentencePieceModel, read_model
from flash_reformer.tokenization.special_tokens import EOS, UNK, resolve_special_tokens
from flash_reformer.tokenization.tokenizer import VOCAB_FILE, write_model
from flash_reformer.tokenization.tokenizer_json import (
    add_saved_tokens,
    model_from_file,
    read_tokenizer_file,
    write_tokenizer_file,
)

TOKENIZER_FILE = "tokenizer.json"


class ReformerTokenizerFast(WindowsMoveOn, TokenizersBackend):
    """Subwords by ``tokenizers``, with the ids of :class:`ReformerTokenizer` and the characters behind every token.

    Args:
        vocab_file: a SentencePiece ``.model`` file, Unigram or BPE.
        tokenizer_file: a ``tokenizer.json`` that this class or transformers' Reformer tokenizer saved. It is enough
            on its own; beside ``vocab_file`` only its added tokens count.
        eos_token, unk_token: as for :class:`ReformerTokenizer`.
        pad_token: "<pad>" if the vocabulary has it, otherwise none. A name given here that it lacks becomes a new
            token with the next free id, with a warning: the model needs ``resize_token_embeddings(len(tokenizer))``.
        additional_special_tokens: as for :class:`ReformerTokenizer`.
        **kwargs: what every tokenizer takes: ``mask_token``, ``padding_side``, ...; and ``add_eos_token=True`` to end
            every text with ``eos_token``.

    Offsets count characters of the text as given. A space belongs to the token whose "▁" it is; the "▁" that stands
    for no character has an empty span.

    ``backend_tokenizer`` is what ``save_pretrained`` writes to ``tokenizer.json`` for other readers. Asked directly,
    it normalises by the stock rules of ``tokenizers`` and may disagree on rare strings. Raises ``ValueError`` naming
    the file that is missing, damaged, or holds another kind of vocabulary.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE, "tokenizer_file": TOKENIZER_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    model = None
    _tokenizer: Any

    def __init__(
        self,
        vocab_file: str | None = None,
        tokenizer_file: str | None = None,
        eos_token: str | AddedToken | None = EOS,
        unk_token: str | AddedToken | None = UNK,
        pad_token: str | AddedToken | None = None,
        additional_special_tokens: list[str | AddedToken] | None = None,
        **kwargs: Any,
    ) -> None:
        model, backend, self._has_model_file = _load(vocab_file, tokenizer_file)
        self._tokenizer = ExactTokenizer(model, backend)
        if additional_special_tokens is not None:
            kwargs["extra_special_tokens"] = additional_special_tokens
        if (kwargs.pop("sp_model_kwargs", None) or {}).get("enable_sampling"):
            warnings.warn("sp_model_kwargs: only ReformerTokenizer samples segmentations", stacklevel=2)
        if kwargs.pop("special_tokens_pattern", None) == "eos":  # as ReformerTokenizer saves it
            kwargs.setdefault("add_eos_token", True)
        added = kwargs.get("added_tokens_decoder") or {}
        named = resolve_special_tokens(
            {"eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token},
            {*backend.get_vocab(), *map(str, added.values())},
            model.unk_piece,
            len(model.vocabulary),
        )
        super().__init__(**{**kwargs, **named})
        if self.add_eos_token:
            self.init_kwargs["special_tokens_pattern"] = "eos"  # for ReformerTokenizer to read

    @classmethod
    def _from_pretrained(cls, resolved_vocab_files: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        path = resolved_vocab_files.get("tokenizer_file")
        try:
            return super()._from_pretrained(resolved_vocab_files, *args, **kwargs)
        except (KeyError, json.JSONDecodeError):  # the base class looks into the file first, and trusts it
            if path is not None:
                read_tokenizer_file(path)
            raise

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the files to ``__init__``: the base class would take them apart by its own rules."""
        return kwargs

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The part that is saved; see the class."""
        backend: Tokenizer = self._tokenizer.backend
        return backend

    @property
    def can_save_slow_tokenizer(self) -> bool:
        """Whether a folder saved from here also loads as :class:`ReformerTokenizer`."""
        return self._has_model_file

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        refuse_surrogates(text, text_pair)
        return super()._encode_plus(text, text_pair, *args, **kwargs)

    def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        size = len(self)
        for index in [token_ids] if isinstance(token_ids, int) else token_ids:
            if not 0 <= index < size:  # the library leaves them out, or overflows
                raise ValueError(f"ids must lie in 0..{size - 1}, got {index}")
        text: str = super()._decode(token_ids, *args, **kwargs)
        return text

    def _save_pretrained(
        self,
        save_directory: Any,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        # What the last call padded and truncated to is no property of the tokenizer.
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        path = Path(save_directory) / (f"{filename_prefix}-{TOKENIZER_FILE}" if filename_prefix else TOKENIZER_FILE)
        write_tokenizer_file(str(path), self.backend_tokenizer, self._tokenizer.sp)
        return (*file_names, str(path), *self.save_vocabulary(str(save_directory), filename_prefix))

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> Any:
        """Write the ``.model`` file as it was read, byte for byte, and return its path as a tuple of one.

        A tokenizer that came from ``tokenizer.json`` alone has none, and writes nothing.
        """
        if not self._has_model_file:
            return ()
        return (write_model(self._tokenizer.sp, save_directory, filename_prefix),)

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: the rules of a SentencePiece model come from its own trainer."""
        raise NotImplementedError("see flash_reformer.tokenization.train_vocabulary and `flash-reformer tokenizer`")


def _load(vocab_file: str | None, tokenizer_file: str | None) -> tuple[SentencePieceModel, Tokenizer, bool]:
    """Return the model, its backend, and whether the model is a file's (not put together from a backend)."""
    if vocab_file is None and tokenizer_file is None:
        raise ValueError(f"vocab_file ({VOCAB_FILE}) or tokenizer_file (tokenizer.json) must be given, got neither")
    saved = None if tokenizer_file is None else read_tokenizer_file(tokenizer_file)
    if vocab_file is None:
        assert saved is not None
        return model_from_file(saved), saved.backend, False
    model = read_model(vocab_file)
    backend = make_backend(model)
    if saved is not None:
        add_saved_tokens(backend, saved, vocab_file)
    return model, backend, True
