"""Dropout decisions on the device: which entries are kept is a function of the seed, the row and the column.

A tile needs one 64-bit mix per row and per column, and a 32-bit hash per entry. Columns come in pairs: column c belongs
to pair ``c // 2`` and takes the half of the pair's word that its parity, ``c % 2``, says.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

#: Dropout probabilities are rounded to multiples of one in so many: a decision takes 16 of a hash's 32 bits.
DROPOUT_STEPS = 2**16
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
_MIX_2 = tl.constexpr(0x94D049BB133111EB - 2**64)
_COLUMNS = tl.constexpr(0x632BE59BD9B4E019)
_HASH_1 = tl.constexpr(0x7FEB352D)
_HASH_2 = tl.constexpr(0x846CA68B - 2**32)
# Where a shift is followed by one of these, zeros come in, as for unsigned words.
_LOW_34 = tl.constexpr(2**34 - 1)
_LOW_37 = tl.constexpr(2**37 - 1)
_LOW_17 = tl.constexpr(2**17 - 1)
_LOW_16 = tl.constexpr(2**16 - 1)


def threshold_of(p: float) -> int:
    """Return the first of the numbers from 0 to 65,535 that is kept: on the host, the THRESHOLD of :func:`keep`."""
    return round(p * DROPOUT_STEPS)


@triton.jit
def _splitmix(seed, steps):
    """Return the lower halves of well-mixed 64-bit words."""
    state = seed + (steps.to(tl.int64) + 1) * _GOLDEN
    state = (state ^ ((state >> 30) & _LOW_34)) * _MIX_1
    state = (state ^ ((state >> 27) & _LOW_37)) * _MIX_2
    # What this shift brings in lies above the lower half.
    return (state ^ (state >> 31)).to(tl.int32)


@triton.jit
def row_words(seed, rows):
    """Return an int32 word per row; ``seed`` is an int64 scalar, rows are counted over the whole matrix, in int64."""
    return _splitmix(seed, rows)


@triton.jit
def column_words(seed, pairs):
    """Return an int32 word per pair of columns."""
    return _splitmix(seed ^ _COLUMNS, pairs)


@triton.jit
def keep(row_word, column_word, parity, THRESHOLD: tl.constexpr):
    """Return whether entries are kept, given the words of their row and pair and the parity of their column.

    Arguments broadcast. THRESHOLD is the probability of being dropped times 2**16, rounded.
    """
    # 32-bit products wrap around; said explicitly, since triton's interpreter takes it for a mistake.
    word = tl.mul(row_word ^ column_word, _HASH_1, sanitize_overflow=False)
    word = tl.mul(word ^ ((word >> 15) & _LOW_17), _HASH_2, sanitize_overflow=False)
    word = word ^ ((word >> 16) & _LOW_16)
    return ((word >> (parity.to(tl.int32) * 16)) & _LOW_16) >= THRESHOLD
