"""Scopes: which tokens of a text an intervention changes.

    all          every token
    prompt       the tokens of the prompt
    generated    the tokens after the prompt: the first of them is chosen unsteered, at the prompt's last token
    reply        the last token of the prompt and every token after it, so that the first word is steered too
    last_prompt  the last token of the prompt alone
    first:N      the first N tokens of the prompt
    last:N       the last N tokens of the prompt
    ends:N,M     the first N and the last M tokens of the prompt, each of them once
    at:N,M       the tokens of the prompt at these positions, where 0 is its first token, a start token too

Which tokens of a running pass these are, ``fgsteer.steering.positions`` decides. So that ``--help`` stays quick, this
module imports no torch.
"""

from __future__ import annotations

import re
from typing import Literal


class TokenScope(str):
    """A scope that counts tokens of the prompt, as ``first``, ``last``, ``ends`` and ``at`` make it: "first:5"."""

    __slots__ = ()


Scope = Literal["all", "prompt", "generated", "reply", "last_prompt", "last_prompt_on"] | TokenScope
"""The scopes as arguments; "last_prompt_on" is the earlier name of "reply"."""
SCOPES: tuple[Scope, ...] = ("all", "prompt", "generated", "reply", "last_prompt")
RENAMED_SCOPES: dict[str, Scope] = {"last_prompt_on": "reply"}
COUNTED = re.compile(r"(first|last):[1-9]\d{0,8}|ends:[1-9]\d{0,8},[1-9]\d{0,8}|at:\d{1,9}(,\d{1,9})*")
_SUMMARIES: dict[Scope, str] = {
    "all": "every token of prompt and text",
    "prompt": "the prompt alone",
    "generated": "the tokens that are generated, though the first of them is chosen unsteered",
    "reply": "from the last token of the prompt on, which steers all that is generated, its first word too",
    "last_prompt": "the last token of the prompt alone",
}
_COUNTED_SUMMARY = "first:N, last:N, ends:N,M, at:N,M: these tokens of the prompt alone, the first being 0"


def is_of_prompt(scope: Scope) -> bool:
    """Whether a scope holds tokens of the prompt alone."""
    return scope not in ("all", "generated", "reply")


def counted(scope: Scope) -> tuple[str, tuple[int, ...]] | None:
    """("last", (how many,)), ("ends", (how many, how many)) or the like of a scope that counts; None for the others."""
    kind, colon, numbers = scope.partition(":")
    return (kind, tuple(int(number) for number in numbers.split(","))) if colon else None


def describe_scopes() -> str:
    """What each scope steers, for help texts."""
    return "; ".join([*(f"{scope}: {_SUMMARIES[scope]}" for scope in SCOPES), _COUNTED_SUMMARY])
