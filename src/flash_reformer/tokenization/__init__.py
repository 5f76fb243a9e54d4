"""Text to token ids and back."""

from flash_reformer.tokenization.byte_tokenizer import ReformerByteTokenizer
from flash_reformer.tokenization.bytes import decode_bytes, encode_bytes
from flash_reformer.tokenization.tokenizer import ReformerTokenizer
from flash_reformer.tokenization.tokenizer_fast import ReformerTokenizerFast
from flash_reformer.tokenization.training import train_vocabulary

__all__ = [
    "ReformerByteTokenizer",
    "ReformerTokenizer",
    "ReformerTokenizerFast",
    "decode_bytes",
    "encode_bytes",
    "train_vocabulary",
]
