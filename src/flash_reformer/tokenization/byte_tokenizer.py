"""``ReformerByteTokenizer``: one token per byte of UTF-8, as the published enwik8 Reformer reads text."""

from __future__ import annotations

import warnings
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from flash_reformer.tokenization.bytes import BYTE_OFFSET, EOS_ID, PAD_ID, VOCAB_SIZE
from flash_reformer.tokenization.inputs import WindowsMoveOn, refuse_surrogates

PAD = "<pad>"
EOS = "</s>"


def _byte_names() -> list[str]:
    """Name each byte by the printable character that byte-level vocabularies have given it since GPT-2."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(0x100)]


def _byte_vocabulary() -> dict[str, int]:
    return {PAD: PAD_ID, EOS: EOS_ID, **{name: byte + BYTE_OFFSET for byte, name in enumerate(_byte_names())}}


class ReformerByteTokenizer(WindowsMoveOn, TokenizersBackend):
    """Bytes of UTF-8 as tokens: ``id = byte + 2``, with padding at 0 and end of text at 1; 258 entries.

    Any text can be encoded and comes back exactly; nothing is normalised. Lengths count bytes, offsets count
    characters: each byte of "é" has the span of "é".

    "<pad>" and "</s>" in a text are the bytes of these words: the two tokens stand for no text, so no text can forge
    them. Tokens that you add (``mask_token=``, ``cls_token=``, ``additional_special_tokens=``, ``add_tokens``) are
    found in the text, unless ``split_special_tokens=True``; their ids begin at 258, so the model must be made with
    ``vocab_size=len(tokenizer)`` or resized by ``resize_token_embeddings(len(tokenizer))``.

    Args:
        errors: what decoding does with bytes that are not UTF-8 (a sample may end inside a character): a name that
            ``bytes.decode`` knows, such as ``"replace"``, ``"ignore"``, ``"strict"``, ``"surrogateescape"``,
            ``"backslashreplace"``. ``decode`` takes it per call, too.
        eos_token, pad_token: under their usual names they are ids 1 and 0. Another name is a new token at the end of
            the vocabulary, with a warning.
        add_eos_token: append the end-of-text token to every text. Off by default, as for the published model.
        additional_special_tokens: more tokens, from id 258.
        tokenizer_file: a ``tokenizer.json`` that this class saved.
        **kwargs: what every tokenizer takes: ``padding_side``, ``model_max_length``, ``mask_token``, ...

    Raises ``ValueError`` for an unknown ``errors`` and for a file with another vocabulary. Encoding raises it for text
    that is not Unicode (lone surrogates), decoding for ids outside the vocabulary.

    >>> tokenizer = ReformerByteTokenizer()
    >>> tokenizer("AB").input_ids
    [67, 68]
    >>> tokenizer.decode([67, 68, 1])
    'AB</s>'
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json"}
    model_input_names = ["input_ids", "attention_mask"]
    _tokenizer: Any

    def __init__(
        self,
        errors: str = "replace",
        eos_token: str | AddedToken | None = EOS,
        pad_token: str | AddedToken | None = PAD,
        add_eos_token: bool | None = None,
        additional_special_tokens: list[str | AddedToken] | None = None,
        tokenizer_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._check_errors(errors)
        self.errors = errors
        self._tokenizer = _backend() if tokenizer_file is None else _read_backend(tokenizer_file)
        if add_eos_token is None:
            add_eos_token = self._tokenizer.num_special_tokens_to_add(False) > 0
        for name, token in (("eos_token", eos_token), ("pad_token", pad_token)):
            if token is not None and self._tokenizer.token_to_id(str(token)) is None:
                warnings.warn(
                    f"{name}={str(token)!r} is not in the byte vocabulary and becomes a new token beyond its "
                    f"{VOCAB_SIZE} entries: call model.resize_token_embeddings(len(tokenizer))",
                    stacklevel=2,
                )
        if additional_special_tokens is not None:
            kwargs["extra_special_tokens"] = additional_special_tokens
        super().__init__(errors=errors, eos_token=eos_token, pad_token=pad_token, add_eos_token=add_eos_token, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Leave the file to ``__init__``: the base class would take vocabulary and merges out of it."""
        return kwargs

    @staticmethod
    def _check_errors(errors: str) -> None:
        try:
            b"\xff".decode("utf-8", errors)
        except UnicodeDecodeError:
            pass  # "strict", or one that behaves like it
        except (LookupError, TypeError) as error:
            raise ValueError(
                f"errors must be what bytes.decode takes ('strict', 'replace', 'ignore', 'surrogateescape', "
                f"'backslashreplace', ...), got {errors!r}"
            ) from error

    def _add_tokens(self, new_tokens: list[Any], special_tokens: bool = False) -> int:
        # What the backend knows as an added token it finds in texts; padding and end of text have no spelling there.
        found = [token for token in new_tokens if str(token) not in (PAD, EOS)]
        return super()._add_tokens(found, special_tokens=special_tokens)

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._encode_plus(text, text_pair, *args, **kwargs)
        except TypeError:
            refuse_surrogates(text, text_pair)
            raise

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        errors: str | None = None,
        **kwargs: Any,
    ) -> str:
        # Bytes come back as they were: no spaces are cleaned up. The backend's decoder knows only errors="replace".
        if errors is None:
            errors = self.errors
        else:
            self._check_errors(errors)
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        added = self._spelled(skip_special_tokens)
        data = bytearray()
        for token in ids:
            if BYTE_OFFSET <= token < VOCAB_SIZE:
                data.append(token - BYTE_OFFSET)
            elif token in added:
                data += added[token]
            else:
                raise ValueError(f"ids must lie in 0..{len(self) - 1}, got {token}")
        return data.decode("utf-8", errors)

    def _spelled(self, skip_special_tokens: bool) -> dict[int, bytes]:
        """Return the bytes that each token which is no byte decodes to."""
        spelled = {PAD_ID: PAD, EOS_ID: EOS, **{key: str(token) for key, token in self.added_tokens_decoder.items()}}
        if skip_special_tokens:
            special = {PAD_ID, EOS_ID, *self.all_special_ids}
            spelled = {key: "" if key in special else text for key, text in spelled.items()}
        return {key: text.encode() for key, text in spelled.items()}

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Return the text behind tokens as ``convert_ids_to_tokens`` and ``tokenize`` name them."""
        ids = [self._tokenizer.token_to_id(token) for token in tokens]
        if None in ids:
            raise ValueError(f"tokens must be in the vocabulary, got {tokens[ids.index(None)]!r}")
        return self._decode(ids)

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> Any:
        """Write nothing and return no path: the vocabulary is the scheme itself."""
        return ()

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: bytes are not learned. ``train_vocabulary`` trains a SentencePiece vocabulary."""
        raise NotImplementedError("a byte vocabulary is not trained: see flash_reformer.tokenization.train_vocabulary")


def _backend() -> Tokenizer:
    # No merges: byte-pair encoding then gives bytes. One "word" per text, since splitting it would gain nothing.
    backend = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_backend(path: str) -> Tokenizer:
    try:
        backend = Tokenizer.from_file(path)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer_file {path} cannot be read: {error}") from error
    if backend.get_vocab(with_added_tokens=False) != _byte_vocabulary():
        raise ValueError(
            f"tokenizer_file {path} does not hold the byte vocabulary ({VOCAB_SIZE} entries, id = byte + {BYTE_OFFSET})"
        )
    backend.no_padding()  # how some last call padded
    backend.no_truncation()
    return backend
