"""The rules by which tokens of a text are selected; ``tokens.py`` applies them. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal, get_args

NamedTokenRule = Literal["all", "last", "answer", "letter", "tail"]
TokenRule = NamedTokenRule | int  # a number is the index of a token
TOKEN_RULES: tuple[str, ...] = get_args(NamedTokenRule)
