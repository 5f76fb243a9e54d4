"""``ReformerTokenizer``: SentencePiece, as the published Reformer of "Crime and Punishment" reads text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from flash_reformer.tokenization.added_tokens import AddedTokens
from flash_reformer.tokenization.backend import make_decoder
from flash_reformer.tokenization.inputs import refuse_surrogates
from flash_reformer.tokenization.sentencepiece_model import SentencePieceModel, read_model
from flash_reformer.tokenization.special_tokens import EOS, UNK, resolve_special_tokens

VOCAB_FILE = "spiece.model"


class ReformerTokenizer(SentencePieceBackend):
    """Subwords by SentencePiece itself. :class:`ReformerTokenizerFast` gives the same ids, and offsets.

    Special and added tokens are found in the text first (not with ``split_special_tokens=True``); each stretch between
    them is a text of its own to SentencePiece. No other text becomes a control symbol.

    Args:
        vocab_file: a SentencePiece ``.model`` file of any kind.
        eos_token, unk_token: under their usual names they are what the vocabulary has, and nothing where it has no
            such entry. Another name that it lacks is a new token, with a warning.
        additional_special_tokens: more special tokens. Those that the vocabulary lacks get ids from its size on; then
            the model needs ``resize_token_embeddings(len(tokenizer))``.
        sp_model_kwargs: arguments of ``SentencePieceProcessor``. ``{"enable_sampling": True, "alpha": 0.1,
            "nbest_size": -1}`` draws another segmentation at each call (Unigram; BPE drops merges); nothing but
            ``sentencepiece.set_random_generator_seed`` makes the draws repeatable.
        **kwargs: what every tokenizer takes: ``pad_token``, ``mask_token``, ``padding_side``, ...; and
            ``add_eos_token=True`` to end every text with ``eos_token``.

    Raises ``ValueError`` naming ``vocab_file`` if that is missing or no SentencePiece model.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    _finder: AddedTokens | None = None

    def __init__(
        self,
        vocab_file: str | None = None,
        eos_token: str | AddedToken | None = EOS,
        unk_token: str | AddedToken | None = UNK,
        additional_special_tokens: list[str | AddedToken] | None = None,
        sp_model_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        tokenizer_file = kwargs.pop("tokenizer_file", None)
        if vocab_file is None and tokenizer_file is not None:
            raise ValueError(
                f"vocab_file ({VOCAB_FILE}) is missing beside {tokenizer_file}, which only ReformerTokenizerFast reads"
            )
        self.model = read_model(vocab_file)
        if additional_special_tokens is not None:
            kwargs["extra_special_tokens"] = additional_special_tokens
        if kwargs.pop("add_eos_token", False):
            kwargs["special_tokens_pattern"] = "eos"
        # A folder of the fast tokenizer lists user-defined symbols as added tokens. SentencePiece finds them itself.
        added = {
            index: token
            for index, token in (kwargs.pop("added_tokens_decoder", None) or {}).items()
            if token.special or str(token) not in self.model.user_defined
        }
        known = {*self.model.vocabulary, *map(str, added.values())}
        named = resolve_special_tokens(
            {**kwargs, "eos_token": eos_token, "unk_token": unk_token},
            known,
            self.model.unk_piece,
            len(self.model.vocabulary),
        )
        super().__init__(
            vocab_file=str(vocab_file),
            sp_model_kwargs=sp_model_kwargs or {},
            added_tokens_decoder=added,
            **{**kwargs, **named, "legacy": True},
        )
        if self.special_tokens_pattern is not None:
            self.init_kwargs["special_tokens_pattern"] = self.special_tokens_pattern  # or it would not be saved
        # The base class adds special tokens by name, and so forgets what an AddedToken says about spaces.
        for token in (*self._special_tokens_map.values(), *self._extra_special_tokens):
            if isinstance(token, AddedToken):
                self._added_tokens_decoder[self._added_tokens_encoder[token.content]] = token
        self._finder = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sp_model": None, "_finder": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # The processor's own pickle does not hold its arguments in every version.
        self.sp_model = self.model.make_processor(self.sp_model_kwargs)

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        refuse_surrogates(text, text_pair)
        return super()._encode_plus(text, text_pair, *args, **kwargs)

    def tokenize(
        self, text: str, pair: str | None = None, add_special_tokens: bool = False, **kwargs: Any
    ) -> list[str]:
        """Return the pieces of a text by name; what the vocabulary lacks is ``unk_token``."""
        split = kwargs.get("split_special_tokens")
        if self.split_special_tokens if split is None else split:
            return self._tokenize(text)
        tokens: list[str] = []
        if self._finder is None:
            self._finder = AddedTokens(self._added_tokens_decoder, self.model.user_defined)
        for found in self._finder.split(text):
            tokens += [found.content] if found.index is not None else self._tokenize(found.content)
        return tokens

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        # By id: SentencePiece names an unknown stretch by its characters, and these may spell a control symbol.
        return [self.sp_model.IdToPiece(index) for index in self.sp_model.Encode(text, out_type=int)]

    def _update_trie(self, unique_no_split_tokens: list[str] | None = None) -> None:
        super()._update_trie(unique_no_split_tokens)
        self._finder = None  # tokens have changed

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        found = [
            token
            for token in new_tokens
            if special_tokens or getattr(token, "special", False) or str(token) not in self.model.user_defined
        ]
        added: int = super()._add_tokens(found, special_tokens=special_tokens)
        return added

    def _convert_id_to_token(self, index: int) -> str:
        if not 0 <= index < self.vocab_size:
            raise ValueError(f"ids must lie in 0..{len(self) - 1}, got {index}")
        name: str = super()._convert_id_to_token(index)
        return name

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text behind tokens."""
        text: str = make_decoder(self.model).decode(tokens)
        return text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Write the ``.model`` file as it was read, byte for byte; returns its path as a tuple of one."""
        return (write_model(self.model, save_directory, filename_prefix),)


def write_model(model: SentencePieceModel, save_directory: str, filename_prefix: str | None) -> str:
    """Write a model's bytes under the name that tokenizers look for, and return the path.

    Raises ``ValueError`` if ``save_directory`` is no folder.
    """
    folder = Path(save_directory)
    if not folder.is_dir():
        raise ValueError(f"save_directory must be a folder, got {save_directory}")
    path = folder / (f"{filename_prefix}-{VOCAB_FILE}" if filename_prefix else VOCAB_FILE)
    path.write_bytes(model.data)
    return str(path)
