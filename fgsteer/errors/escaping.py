"""Text that is not trusted, made safe for where it goes: a terminal, JSON, Markdown; and without a secret in it.

escape_text("a\\x1b[2J") == r"a\\x1b[2J"          escape_markdown("# <b>") == r"\\# \\<b\\>"
"""

from __future__ import annotations

import base64
import html
import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

# categories that move a cursor, reorder text or cannot be seen: control, format, lone surrogate, line separator
_ACTIVE = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # of the category format, but parts of Persian words and of emoji
_UNUSUAL = re.compile(r"[^ -~]")
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_URL_SAFE = str.maketrans("+/", "-_")
_SECRET_PART = 12  # characters of a secret that give too much away
_SHORTEST_SECRET = 4  # characters; servers without keys are given an "x"


def escape_text(text: str, keep: str = "\n\t") -> str:
    """Escape control, direction and invisible characters, as in \\x1b, except those to keep."""

    def escape(match: re.Match[str]) -> str:
        is_escaped = _is_active(match[0]) and match[0] not in keep
        return match[0].encode("unicode_escape").decode() if is_escaped else match[0]

    return _UNUSUAL.sub(escape, text)


def json_text(value: object, **options: Any) -> str:
    """Write JSON in visible characters; options as for json.dumps. Its only line breaks are those of ``indent``."""

    def escape(match: re.Match[str]) -> str:
        units = match[0].encode("utf-16-be", "surrogatepass").hex()
        return re.sub("(....)", r"\\u\1", units) if _is_active(match[0]) and match[0] != "\n" else match[0]

    return _UNUSUAL.sub(escape, json.dumps(value, **{"ensure_ascii": False, **options}))


def _is_active(character: str) -> bool:
    """Tell whether a character does something other than show itself."""
    return unicodedata.category(character) in _ACTIVE and character not in _JOINERS


def escape_markdown(text: object) -> str:
    """Escape a text as one line of Markdown that shows as it is, in a paragraph, a heading or a table."""
    return _PUNCTUATION.sub(r"\\\1", " ".join(escape_text(str(text)).split()))


def markdown_code(text: object) -> str:
    """Write a text as a code span of Markdown, on one line."""
    line = escape_text(str(text), keep="") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    ends = line[0] + line[-1]
    pad = " " if "`" in ends or (ends == "  " and line.strip(" ")) else ""  # Markdown removes one at both ends
    return f"{fence}{pad}{line}{pad}{fence}"


def redact(secret: str, text: str) -> str:
    """Remove a secret from a text; withhold the text where it holds a part of the secret or hides it in an escape.

    Escapes are those of JSON, URLs and HTML, and base64. What is shorter than 4 characters is no secret.
    """
    if len(secret) < _SHORTEST_SECRET:
        return text
    text = text.replace(secret, "(key)")
    length = min(_SECRET_PART, len(secret))
    parts = [secret[at : at + length] for at in range(len(secret) - length + 1)]
    is_exposed = any(part in form for form in _unescaped_forms(text) for part in parts)
    return "(withheld: a part of the key is in it)" if is_exposed else text


def _unescaped_forms(text: str) -> Iterator[str]:
    """Yield a text as it stands, without up to three layers of escapes, and its words decoded from base64."""
    forms = {text}
    for _ in range(3):
        forms |= {undo(form) for form in forms for undo in (_unescape_json, unquote, html.unescape)}
    yield from forms
    for word in re.findall(r"[A-Za-z0-9+/_-]{6,}", text):
        for first in range(4):  # where a group of it may begin
            group = word[first:-1] if (len(word) - first) % 4 == 1 else word[first:]
            yield base64.urlsafe_b64decode(group.translate(_URL_SAFE) + "=" * (-len(group) % 4)).decode("latin-1")


def _unescape_json(text: str) -> str:
    """Undo the escapes of JSON in a text."""
    text = re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", text)
