"""From start and end logits to spans of a text. Letters: T tokens of one window, W windows.

A long context is read in overlapping windows, so that one piece of text may stand in several of them, and every window
has logits of its own. The score of a span is a probability: of all pairs of a start and an end token that stand in the
context of one window, which one would be drawn with weights ``exp(start logit + end logit)``. With a single window that
is the softmax over starts times the softmax over ends, both over the context alone. Pairs that are the same text, in
another window or after their borders were moved to those of words, add up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """One window's tokens.

    Attributes:
        start_logits, end_logits: ``[T]``.
        offsets: ``[T, 2]`` first character and the one behind the last, in the text that each token is of.
        in_context: ``[T]`` bool: which tokens may start or end an answer.
    """

    start_logits: Tensor
    end_logits: Tensor
    offsets: Tensor
    in_context: Tensor


@dataclass(frozen=True)
class Span:
    """Characters ``[start, end)`` of the context and their score."""

    score: float
    start: int
    end: int


def find_spans(
    windows: list[Window], context: str, *, top_k: int, max_answer_len: int, align_to_words: bool, with_none: bool
) -> list[Span]:
    """Return up to ``top_k`` spans, the likeliest first; equal ones in order of their place.

    Args:
        windows: all windows of one context.
        context: the text.
        top_k: how many spans.
        max_answer_len: tokens that a span may have.
        align_to_words: move borders that stand inside a word (letters, digits, underscores) to its ends.
        with_none: let "no answer" compete, as ``Span(score, 0, 0)``. Its weight is that of the first token of a window
            as start and as end, in the window where that is smallest: all of them must find nothing.
    """
    borders = _Borders(context, align_to_words)
    totals = [_log_total(window) for window in windows]
    none = torch.stack([window.start_logits[0].double() + window.end_logits[0].double() for window in windows]).min()
    total = torch.stack([*totals, none] if with_none else totals).logsumexp(0)
    found = [_score_places(window, borders, max_answer_len, total) for window in windows]
    places, scores = _add_up(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    if with_none:
        places = torch.cat([torch.zeros(1, dtype=places.dtype), places])
        scores = torch.cat([(none - total).exp().unsqueeze(0), scores])
    # Places are in order, and a stable sort keeps it among equals.
    order = scores.sort(descending=True, stable=True).indices[:top_k].tolist()
    return [Span(min(scores[i].item(), 1.0), *borders.of(int(places[i]))) for i in order]  # sums round


def _log_total(window: Window) -> Tensor:
    """Return the logarithm of the summed weights of all pairs of one window."""
    logits = torch.stack([window.start_logits, window.end_logits]).double()
    return logits.masked_fill(~window.in_context, -torch.inf).logsumexp(1).sum()


def _score_places(window: Window, borders: _Borders, max_answer_len: int, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return places of one window, as numbers, in order, and their scores; time and memory go by T * max_answer_len."""
    tokens = list(zip(window.in_context.tolist(), window.offsets.tolist(), strict=True))
    pairs = [borders.around(*offsets) if inside else None for inside, offsets in tokens]
    allowed = torch.tensor([pair is not None for pair in pairs])
    starts, ends = (torch.tensor([pair[side] if pair else 0 for pair in pairs]) for side in (0, 1))
    start_logits, end_logits = window.start_logits.double(), window.end_logits.double()
    T = len(tokens)
    places, scores = [], []
    for length in range(min(max_answer_len, T)):
        real = allowed[: T - length] & allowed[length:]
        places.append(borders.number(starts[: T - length], ends[length:])[real])
        scores.append((start_logits[: T - length] + end_logits[length:] - total).exp()[real])
    return _add_up(torch.cat(places), torch.cat(scores))


def _add_up(places: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return each place once, in order, with the sum of its scores."""
    unique, index = places.unique(return_inverse=True)
    return unique, torch.zeros(len(unique), dtype=scores.dtype).index_add_(0, index, scores)


class _Borders:
    """Where an answer that starts or ends with a token has its borders: a start does not depend on the end."""

    def __init__(self, context: str, align_to_words: bool) -> None:
        self._context = context
        self._base = len(context) + 1
        self._first = list(range(len(context)))
        self._behind = list(range(1, self._base))
        if align_to_words:
            inside = [character.isalnum() or character == "_" for character in context]
            for place in range(1, len(context)):
                if inside[place] and inside[place - 1]:
                    self._first[place] = self._first[place - 1]
            for place in range(len(context) - 2, -1, -1):
                if inside[place] and inside[place + 1]:
                    self._behind[place] = self._behind[place + 1]

    def around(self, start: int, end: int) -> tuple[int, int] | None:
        """Return the borders of an answer of this token alone, or None for one that stands for no text.

        No answer starts or ends in white space.
        """
        text = self._context[start:end]
        bare = text.strip()
        if not bare:
            return None
        start += len(text) - len(text.lstrip())
        return self._first[start], self._behind[start + len(bare) - 1]

    def number(self, starts: Tensor, ends: Tensor) -> Tensor:
        """Return one number for each pair of borders; it grows with the start, then with the end."""
        return starts * self._base + ends

    def of(self, number: int) -> tuple[int, int]:
        """Return the borders behind a number."""
        return divmod(number, self._base)
