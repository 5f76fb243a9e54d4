"""The byte scheme of the published enwik8 Reformer: every byte is one token, ``id = byte + 2``."""

from collections.abc import Iterable

PAD_ID = 0
EOS_ID = 1
BYTE_OFFSET = 2
VOCAB_SIZE = 256 + BYTE_OFFSET


def encode_bytes(data: bytes) -> list[int]:
    """Return the token ids of ``data``; no end-of-text token is appended.

    >>> encode_bytes(b"AB")
    [67, 68]
    """
    if not isinstance(data, bytes | bytearray):
        raise TypeError(f"data must be bytes, got {type(data).__name__}: encode text with .encode('utf-8') first")
    return [byte + BYTE_OFFSET for byte in data]


def decode_bytes(ids: Iterable[int]) -> bytes:
    """Return the bytes behind ``ids``; padding (0) and end-of-text (1) stand for no byte and are left out.

    Raises ``ValueError`` for an id outside 0..257.

    >>> decode_bytes([67, 68, 1, 0])
    b'AB'
    """
    data = bytearray()
    for token in ids:
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"ids must lie in 0..{VOCAB_SIZE - 1}, got {token}")
        if token >= BYTE_OFFSET:
            data.append(token - BYTE_OFFSET)
    return bytes(data)
