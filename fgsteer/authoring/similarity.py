"""Texts that are the same but for case and punctuation, and texts that nearly are.

near_duplicates(["the bride wore a white ring", "the bride wore a white ring today"])       [(0, 1, 0.8)]
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

SIMILAR = 0.8  # shared shingles, as a share of all, from which two texts are near duplicates
SHINGLE_WORDS = 3
_WORD = re.compile(r"\w+")
Shingle = tuple[str, ...]


def words_of(text: str) -> list[str]:
    """The words of a text, in small letters."""
    return _WORD.findall(text.casefold())


def plain_form(text: str) -> str:
    """A text without case, punctuation and the width of its spaces; itself where it has no word."""
    return " ".join(words_of(text)) or text.strip()


def shingles(text: str) -> frozenset[Shingle]:
    """The runs of three words of a text; of a shorter one the one run that it is."""
    words = words_of(text)
    if len(words) <= SHINGLE_WORDS:
        return frozenset([tuple(words)])
    return frozenset(tuple(words[n : n + SHINGLE_WORDS]) for n in range(len(words) - SHINGLE_WORDS + 1))


def near_duplicates(texts: Sequence[str], similar: float = SIMILAR) -> list[tuple[int, int, float]]:
    """Find pairs of texts of which ``|A ∩ B|/|A ∪ B|`` of their shingles is at least ``similar``.

    Two such sets share one of the ``|A| − ⌈similar·|A|⌉ + 1`` rarest shingles of each, so that only texts that do are
    compared. Texts of equal ``plain_form`` count too.

    Returns:
        (number, later number, share) of each pair, in order.
    """
    sets = [shingles(text) for text in texts]
    frequency = Counter(shingle for one in sets for shingle in one)
    seen: dict[Shingle, list[int]] = defaultdict(list)
    found = []
    for number, one in enumerate(sets):
        rarest = sorted(one, key=lambda shingle: (frequency[shingle], shingle))
        rarest = rarest[: len(one) - math.ceil(similar * len(one) - 1e-9) + 1]
        for other in sorted({n for shingle in rarest for n in seen[shingle]}):
            share = len(one & sets[other]) / len(one | sets[other])
            if share >= similar:
                found.append((other, number, share))
        for shingle in rarest:
            seen[shingle].append(number)
    return sorted(found)
