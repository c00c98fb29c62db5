"""Articles and plurals for messages.

a("SAE") == "an SAE"          count(1, "vector") == "1 vector"          count(2, "entry") == "2 entries"
"""

from __future__ import annotations

import re

_VOWEL_LETTERS = "AEFHILMNORSX"  # letters whose names begin with a vowel's sound: an SAE, an LLM, an NDArray


def a(noun: object) -> str:
    """Return the noun after "a" or "an", by its sound: an SAE, an int, an ndarray, a Clamp, a UserDict."""
    text = str(noun)
    if text.startswith("nd"):
        return f"an {text}"
    spelled = re.match(r"[A-Z](?:[A-Z0-9]|$)", text)
    if spelled:
        vowel = text[0] in _VOWEL_LETTERS
    else:
        vowel = text[:1].lower() in tuple("aeiou") and not re.match(r"(?:uni|use|usu|eu|one)", text, re.IGNORECASE)
    return f"{'an' if vowel else 'a'} {text}"


def count(number: int, noun: str) -> str:
    """Return the number and its noun, which is plural unless there is one: 1 vector, 0 vectors, 2 entries."""
    if number == 1:
        return f"1 {noun}"
    plural = f"{noun[:-1]}ies" if re.search(r"[^aeiou]y$", noun) else f"{noun}{'es' if noun.endswith('s') else 's'}"
    return f"{number:,} {plural}"
