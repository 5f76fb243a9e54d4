"""Special and added tokens in a text: both tokenizers look for them here, before SentencePiece sees what is between."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

from tokenizers import AddedToken


@dataclass(frozen=True)
class Found:
    """A stretch of a text: an added token with its id, or plain text with none.

    ``start`` and ``end`` are its place; with ``lstrip`` or ``rstrip`` a token takes the spaces beside it.
    """

    content: str
    index: int | None
    start: int
    end: int


class AddedTokens:
    """Finds tokens in texts from left to right, the longest first where several begin.

    Args:
        tokens: added tokens by id. ``normalized`` makes no difference: all are looked for in the text as given.
        user_defined: symbols of the model; as plain tokens they are left to SentencePiece, which finds them itself.
    """

    def __init__(self, tokens: Mapping[int, AddedToken], user_defined: Container[str]) -> None:
        self._ids = {
            token.content: index
            for index, token in tokens.items()
            if token.content and (token.special or token.content not in user_defined)
        }
        spellings: list[str] = []
        for content in sorted(self._ids, key=len, reverse=True):
            token = tokens[self._ids[content]]
            spelled = f"(?P<t{len(spellings)}>{re.escape(content)})"
            if token.single_word:
                spelled = f"(?<![^ ]){spelled}(?![^ ])"
            spellings.append(r"\s*" * token.lstrip + spelled + r"\s*" * token.rstrip)
        self._pattern = re.compile("|".join(spellings)) if spellings else None

    def split(self, text: str) -> Iterator[Found]:
        """Yield the stretches of a text in order, none of them empty."""
        end = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            if end < match.start():
                yield Found(text[end : match.start()], None, end, match.start())
            content = match[str(match.lastgroup)]
            end = match.end()
            yield Found(content, self._ids[content], match.start(), end)
        if end < len(text):
            yield Found(text[end:], None, end, len(text))
