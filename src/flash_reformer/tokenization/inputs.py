"""What every tokenizer asks of its input before it starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Half of a UTF-16 pair: a Python string may hold one, UTF-8 has no bytes for it.
_SURROGATE = re.compile("[\ud800-\udfff]")


def refuse_surrogates(*inputs: Any) -> None:
    """Raise ``ValueError`` if any text inside ``inputs`` (texts, and lists of them to any depth) is not Unicode text.

    Python reads undecodable file names and bytes (``errors="surrogateescape"``) as lone surrogates.
    """
    for text in _texts(inputs):
        found = _SURROGATE.search(text)
        if found:
            raise ValueError(
                f"text must be valid Unicode, got the lone surrogate U+{ord(found[0]):04X} at character "
                f"{found.start()}: decode the bytes with errors='replace', or encode them with encode_bytes"
            )


def refuse_stride(stride: int, max_length: int | None, truncates: bool) -> None:
    """Raise ``ValueError`` where windows would not move on: the Rust library panics."""
    if truncates and max_length is not None and stride and stride >= max_length:
        raise ValueError(f"stride must be less than max_length={max_length}, got {stride}: windows would not move on")


class WindowsMoveOn:
    """Put before a base class on `tokenizers`: refuses strides at which the Rust library panics."""

    def set_truncation_and_padding(
        self, padding_strategy: Any, truncation_strategy: Any, max_length: int, stride: int, *args: Any, **kwargs: Any
    ) -> None:
        """Set what the base class sets; windows that would not move on are refused."""
        refuse_stride(stride, max_length, truncation_strategy.value != "do_not_truncate")
        super().set_truncation_and_padding(  # type: ignore[misc]
            padding_strategy, truncation_strategy, max_length, stride, *args, **kwargs
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)
