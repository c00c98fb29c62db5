"""Text that is not trusted, made fit for where it goes: a terminal, JSON, Markdown; and without a secret in it.

escaped("a\\x1b[2J") == r"a\\x1b[2J"          markdown("# <b>") == r"\\# \\<b\\>"
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

# what moves a cursor, reorders text or cannot be seen: control, format, lone surrogate, separator of lines
_ACTING = ("Cc", "Cf", "Cs", "Zl", "Zp")
_JOINERS = "\u200c\u200d"  # of format, but letters of Persian and of emoji
_UNUSUAL = re.compile(r"[^ -~]")
_PUNCTUATION = re.compile(r"([!-/:-@\[-`{-~])")
_URL_SAFE = str.maketrans("+/", "-_")
_PART = 12  # characters of a secret that tell too much
_SHORTEST = 4  # of what is a secret at all: servers without keys are given an "x"


def escape_text(text: str, keep: str = "\n\t") -> str:
    """The text with control, direction and invisible characters as escapes, such as \\x1b, but those to keep."""

    def escape(found: re.Match[str]) -> str:
        return found[0].encode("unicode_escape").decode() if _acts(found[0]) and found[0] not in keep else found[0]

    return _UNUSUAL.sub(escape, text)


def json_text(value: object, **options: Any) -> str:
    """JSON in characters that can be seen; options as of json.dumps. Its line breaks are those of ``indent``."""

    def escape(found: re.Match[str]) -> str:
        units = found[0].encode("utf-16-be", "surrogatepass").hex()
        return re.sub("(....)", r"\\u\1", units) if _acts(found[0]) and found[0] != "\n" else found[0]

    return _UNUSUAL.sub(escape, json.dumps(value, **{"ensure_ascii": False, **options}))


def _acts(character: str) -> bool:
    return unicodedata.category(character) in _ACTING and character not in _JOINERS


def escape_markdown(text: object) -> str:
    """Text as one line of Markdown that means nothing but itself, in a paragraph, a heading or a table."""
    return _PUNCTUATION.sub(r"\\\1", " ".join(escape_text(str(text)).split()))


def markdown_code(text: object) -> str:
    """Text as a code span of Markdown, on one line."""
    line = escape_text(str(text), keep="") or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    ends = line[0] + line[-1]
    pad = " " if "`" in ends or (ends == "  " and line.strip(" ")) else ""  # one is taken off where both ends have one
    return f"{fence}{pad}{line}{pad}{fence}"


def redact(secret: str, text: str) -> str:
    """The text without a secret: cut out, or the text withheld where it holds a part of it or hides it in an escape.

    Escapes are those of JSON, URLs and HTML, and base64. What is shorter than 4 characters is no secret.
    """
    if len(secret) < _SHORTEST:
        return text
    text = text.replace(secret, "(key)")
    length = min(_PART, len(secret))
    parts = [secret[at : at + length] for at in range(len(secret) - length + 1)]
    told = any(part in form for form in _readings(text) for part in parts)
    return "(withheld: a part of the key is in it)" if told else text


def _readings(text: str) -> Iterator[str]:
    """A text as it stands, without up to three layers of escapes, and its words out of base64."""
    found = {text}
    for _ in range(3):
        found |= {undo(form) for form in found for undo in (_out_of_json, unquote, html.unescape)}
    yield from found
    for word in re.findall(r"[A-Za-z0-9+/_-]{6,}", text):
        for first in range(4):  # where a group of it may begin
            group = word[first:-1] if (len(word) - first) % 4 == 1 else word[first:]
            yield base64.urlsafe_b64decode(group.translate(_URL_SAFE) + "=" * (-len(group) % 4)).decode("latin-1")


def _out_of_json(text: str) -> str:
    text = re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", text)
