"""Which language a text is in, well enough to choose a model: by script, and for Latin letters by the commonest words."""

from __future__ import annotations

import re

# The ten or so words that are everywhere in one language and hardly in the others.
_COMMON = {
    "en": "the of and to is that what how for with are this you it",
    "de": "der die das und ist nicht ein eine wie ich zu mit auf für den von was",
    "fr": "le la les des est une et que pour dans qui pas du comment quelle vous je",
    "es": "el los las es una y que por para con cómo qué del se mi está",
    "it": "il di che è un una per non con sono come della gli quale perché mi",
    "pt": "o os é um uma que não para com como em do da você por qual",
    "nl": "de het een en van is niet dat hoe ik voor met zijn wat op te",
    "pl": "i w nie na się jest to że jak z do co czy mi jakie",
    "sv": "och att det är en som på för med inte hur jag vad till av",
    "tr": "ve bir bu için ne nasıl mı de da ile çok değil bana olarak",
}
_WORDS = {language: frozenset(words.split()) for language, words in _COMMON.items()}
# Scripts that (nearly) settle it. Kana before Han: Japanese has both.
_SCRIPTS = {
    "ja": r"[\u3040-\u30ff]", "ko": r"[\uac00-\ud7af\u1100-\u11ff]", "zh": r"[\u4e00-\u9fff\u3400-\u4dbf]",
    "ru": r"[\u0400-\u04ff]", "el": r"[\u0370-\u03ff]", "ar": r"[\u0600-\u06ff]", "he": r"[\u0590-\u05ff]",
    "hi": r"[\u0900-\u097f]", "th": r"[\u0e00-\u0e7f]",
}  # fmt: skip
_SCRIPT_PATTERNS = {language: re.compile(pattern) for language, pattern in _SCRIPTS.items()}
_WORD = re.compile(r"[^\W\d_]+")
LANGUAGES = (*_WORDS, *_SCRIPTS)
_LOOKED_AT = 2000  # characters


def language_of(text: str) -> str | None:
    """One of LANGUAGES, or None when the text does not tell."""
    text = text[:_LOOKED_AT].lower()
    words = _WORD.findall(text)
    letters = sum(map(len, words))
    if not letters:
        return None
    counts = {language: len(pattern.findall(text)) for language, pattern in _SCRIPT_PATTERNS.items()}
    if counts["ja"] * 10 > letters:
        return "ja"
    script = max(counts, key=counts.__getitem__)
    if counts[script] * 2 > letters:
        return script
    scores = {language: sum(word in known for word in words) for language, known in _WORDS.items()}
    first, second = sorted(scores, key=scores.__getitem__, reverse=True)[:2]
    return first if scores[first] > scores[second] else None
