"""Philox4x32-10, the counter-based generator of Random123 (https://doi.org/10.1145/2063384.2063405)."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

Word = TypeVar("Word", int, Tensor)  # 32 bits in a Python int or in each element of an int64 tensor

_LOW = 0xFFFFFFFF


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Word, Word, Word, Word]:
    """Ten rounds over a counter of four words with a key of two; gives four words.

    The products wrap in int64, which keeps all 64 bits; `>> 32` is then arithmetic, so its sign bits are masked off.
    """
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW)
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def philox_words(seed: Word, position: Word) -> tuple[Word, Word, Word, Word]:
    """The words for the 64-bit key `seed` and the 128-bit counter `position` (its upper half is 0)."""
    zero = position & 0
    return philox4x32((position & _LOW, (position >> 32) & _LOW, zero, zero), (seed & _LOW, (seed >> 32) & _LOW))


def philox_first_word(seed: Word, position: Word) -> Word:
    return philox_words(seed, position)[0]
