"""Scopes: which tokens of a text an intervention changes.

    all             every token
    prompt          the tokens of the prompt
    generated       the tokens after the prompt
    last_prompt_on  the last token of the prompt and every token after it

Which tokens of a running pass these are, ``fgsteer.steering.positions`` decides.
"""

from __future__ import annotations

from typing import Literal, get_args

Scope = Literal["all", "prompt", "generated", "last_prompt_on"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
