"""Text as a reader takes it: other alphabets' look-alikes, width forms, accents and invisible characters made plain. One
character at a time, so that every position leads back to the original, and a text may be folded in pieces."""

from __future__ import annotations

import functools
import unicodedata
from typing import NamedTuple

# Look-alikes that NFKD leaves alone: Cyrillic, Greek, Armenian, Cherokee and some signs, with the Latin letter that they pass
# for (a part of Unicode's confusables, TR 39).
_LOOK_ALIKES = {
    "a": "аɑαᴀ", "b": "ЬвᏏʙΒβ", "c": "сϲᴄⅽ", "d": "ԁɗᴅⅾ", "e": "еҽєᴇε℮", "f": "ғꜰϝ", "g": "ɡցɢ", "h": "һհʜНΗ", "i": "іıɩιᴉӏɪ",
    "j": "јϳᴊ", "k": "кκᴋ", "l": "ⅼʟ|", "m": "мⅿᴍΜ", "n": "пոηɴΝ", "o": "оοσօ০ᴏ", "p": "рρᴘ", "q": "ԛզ", "r": "гᴦʀ", "s": "ѕꜱʂ",
    "t": "тτᴛ", "u": "υսᴜʋц", "v": "ѵνᴠⅴ", "w": "ԝѡɯᴡω", "x": "хχⅹ×", "y": "уүγʏУ", "z": "ᴢʐΖ",
    "-": "‐‑‒–—―−", "'": "’‘ʼ`´", '"': "“”„«»",
}  # fmt: skip
_PLAIN = {ord(odd): plain for plain, odds in _LOOK_ALIKES.items() for odd in odds}
# Default-ignorable: zero width, direction marks, variation selectors, soft hyphen, tags.
_INVISIBLE_RANGES = (
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x200B, 0x200F),
    (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164), (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0),
    (0xE0001, 0xE0001), (0xE007F, 0xE007F), (0xE0100, 0xE01EF),
)  # fmt: skip
_INVISIBLE = frozenset(code for low, high in _INVISIBLE_RANGES for code in range(low, high + 1))
_TAG_LETTERS = range(0xE0020, 0xE007F)  # an invisible copy of ASCII: it is made visible


class Folded(NamedTuple):
    """text, and for each of its characters (and its end) the position in the original."""

    text: str
    origins: list[int] | range


@functools.lru_cache(maxsize=4096)
def _fold_char(char: str) -> str:
    code = ord(char)
    if code in _INVISIBLE:
        return ""
    if code in _TAG_LETTERS:
        return chr(code - 0xE0000).lower()
    if code in _PLAIN:
        return _PLAIN[code]
    plain = []
    for part in unicodedata.normalize("NFKD", char):
        if not unicodedata.combining(part) and ord(part) not in _INVISIBLE:
            part = _PLAIN.get(ord(part), part).casefold()
            plain.append("".join(_PLAIN.get(ord(p), p) for p in part))
    return "".join(plain)


def fold(text: str) -> Folded:
    if text.isascii():
        return Folded(text.lower().replace("`", "'").replace("|", "l"), range(len(text) + 1))
    parts = [_fold_char(char) for char in text]
    origins: list[int] = []
    for i, part in enumerate(parts):
        origins += [i] * len(part)
    origins.append(len(text))
    return Folded("".join(parts), origins)


def hidden(text: str) -> int:
    """How many characters of a text cannot be seen at all."""
    return 0 if text.isascii() else sum(ord(c) in _INVISIBLE or ord(c) in _TAG_LETTERS for c in text)
