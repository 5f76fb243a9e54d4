"""Registration with ``AutoTokenizer``."""

from __future__ import annotations

import transformers

from flash_reformer.tokenization.byte_tokenizer import ReformerByteTokenizer
from flash_reformer.tokenization.tokenizer import ReformerTokenizer
from flash_reformer.tokenization.tokenizer_fast import ReformerTokenizerFast


def register(config_class: type) -> None:
    """Make ``AutoTokenizer`` resolve folders of ``config_class`` and the names of our classes to our classes.

    A folder that names a SentencePiece class, of whichever kind, gets the fast one: since version 5 ``AutoTokenizer``
    takes no notice of ``use_fast``. ``ReformerTokenizer.from_pretrained`` gives the other.
    """
    # The second call decides what a folder without a class name gets; the first makes the byte class known by name.
    transformers.AutoTokenizer.register(config_class, tokenizer_class=ReformerByteTokenizer, exist_ok=True)
    transformers.AutoTokenizer.register(
        config_class,
        slow_tokenizer_class=ReformerTokenizer,
        fast_tokenizer_class=ReformerTokenizerFast,
        exist_ok=True,
    )
