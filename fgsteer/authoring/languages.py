"""In which language a text is, as far as its letters and its most frequent words tell.

language_of("Where is the station?")        'English'
"""

from __future__ import annotations

import unicodedata
from collections import Counter

from fgsteer.authoring.similarity import words_of

LEAST_SHARE = 0.12  # of a text's words, that are among the frequent words of its language
_FREQUENT = {
    "English": "the and of to is in that it for with was you are this be not on as have at from i my your we what how",
    "Spanish": "el la los las de que y en un una es por con para se no su lo como más pero está del al mi muy qué tu",
    "French": "le la les des de du et en un une est que qui dans pour pas sur au avec ce il elle je vous nous mais",
    "German": "der die das und ist nicht ein eine zu den mit von auf für im dem ich sie es sich auch wie aber wir",
    "Italian": "il lo la gli le di che e è un una per non con sono del della si come ma più nel i mi questo",
    "Portuguese": "o a os as de que e em um uma é para com não se do da no na por mais como mas você seu",
}
_LANGUAGES = {name: frozenset(words.split()) for name, words in _FREQUENT.items()}
_JAPANESE = ("HIRAGANA", "KATAKANA")


def script_of(text: str) -> str:
    """The script of most letters of a text, as Unicode names it ("Latin", "Cyrillic"); "" without letters."""
    counts = Counter(unicodedata.name(letter, "").partition(" ")[0] for letter in text if letter.isalpha())
    if any(counts[kana] for kana in _JAPANESE) and sum(counts[kana] for kana in (*_JAPANESE, "CJK")) > counts["LATIN"]:
        return "Japanese"
    return counts.most_common(1)[0][0].capitalize() if counts else ""


def language_of(text: str) -> str:
    """The language of a text in Latin letters, by its most frequent words; of others the script; "" where unknown."""
    script = script_of(text)
    if script != "Latin":
        return script
    words = words_of(text)
    hits = Counter({name: sum(word in frequent for word in words) for name, frequent in _LANGUAGES.items()})
    (best, most), (_, second) = hits.most_common(2)
    return best if most > second and most >= LEAST_SHARE * len(words) else ""
