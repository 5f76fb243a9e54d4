"""Text to token ids and back."""

from flash_reformer.tokenization.bytes import decode_bytes, encode_bytes

__all__ = ["decode_bytes", "encode_bytes"]
