"""Scopes: which tokens of a text an intervention changes.

    all        every token
    prompt     the tokens of the prompt
    generated  the tokens after the prompt: the first of them is chosen unsteered, at the prompt's last token
    reply      the last token of the prompt and every token after it, so that the first word is steered too

Which tokens of a running pass these are, ``fgsteer.steering.positions`` decides. So that ``--help`` stays quick, this
module imports no torch.
"""

from __future__ import annotations

from typing import Literal

Scope = Literal["all", "prompt", "generated", "reply", "last_prompt_on"]
"""The scopes as arguments; "last_prompt_on" is the earlier name of "reply"."""
SCOPES: tuple[Scope, ...] = ("all", "prompt", "generated", "reply")
RENAMED_SCOPES: dict[str, Scope] = {"last_prompt_on": "reply"}
_SUMMARIES: dict[Scope, str] = {
    "all": "every token of prompt and text",
    "prompt": "the prompt alone",
    "generated": "the tokens that are generated, though the first of them is chosen unsteered",
    "reply": "from the last token of the prompt on, which steers all that is generated, its first word too",
}


def describe_scopes() -> str:
    """What each scope steers, for help texts."""
    return "; ".join(f"{scope}: {_SUMMARIES[scope]}" for scope in SCOPES)
