"""Messages for users of Python, with the options of the command line in place of arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# what messages say to Python's users, and what it is called here, where a rule does not tell
_PHRASES = (
    (r"collect\(keep_pooled=True\)", "fgsteer collect without --no-pooled"),
    (r"collect again with sae=", "collect again without --no-sae, and with --sae"),
    (r"collect again with hookpoints=", "collect again with --hookpoint"),
    (r"fg\.load_model\(['\"]([^'\"]*)['\"]\)", r"--model \1"),
    (r"fg\.load_sae\(['\"]([^'\"]*)['\"]\)", r"--sae \1"),
    (r"set tokenizer\.chat_template or pass strings", "name a chat model with --model, or leave out --chat"),
    (r"call \.add\(coefficient\)[^;]*", "name the operation with --op"),
    (r"sae_id(?==| too)", "--sae-id"),
)
_ALIASES = {"hookpoints": "hookpoint", "target_ce_rise": "ce_rise", "keep_pooled": "pooled"}
_ARGUMENT = re.compile(r"(?<![-\w.?&/])([a-z_]+)=(\"[^\"]*\"|'[^']*'|[^\s,;)]*)")


def with_options(message: str, options: Mapping[str, tuple[str, str]]) -> str:
    """A message with the command's options in place of Python's arguments: "pass sae=" becomes "pass --sae".

    ``options`` is {parameter: (its option, the option that turns it off)}.
    """
    for pattern, words in _PHRASES:
        message = re.sub(pattern, words, message)

    def option(match: re.Match[str]) -> str:
        on, off = options.get(_ALIASES.get(match[1], match[1]), ("", ""))
        value = match[2].strip("\"'")
        if not on or (value == "False" and not off):
            return match[0]
        return off if value == "False" else on if value in ("", "True", "…") else f"{on} {value}"

    return _ARGUMENT.sub(option, message)


def options_of(command: Any) -> dict[str, tuple[str, str]]:
    """{parameter: (its longest option, the option that turns it off)} of a click command."""
    return {
        p.name: (max(p.opts, key=len), max(p.secondary_opts, key=len, default=""))
        for p in getattr(command, "params", ())
        if p.name and p.opts and p.opts[0].startswith("-")
    }
