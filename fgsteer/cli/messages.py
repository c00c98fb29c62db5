"""Messages that are written for users of Python, with the options of the command line in place of arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

# What messages say to users of Python, and what they say here, where the rule for arguments does not do.
PHRASES = (
    (r"\bcollect\(keep_pooled=True\)", "fgsteer collect without --no-pooled"),
    (r"\bcollect again with sae=", "collect again without --no-sae, and with --sae"),
    (r"\bcollect again with hookpoints=", "collect again with --hookpoint"),
    (r"\bfg\.load_model\(['\"]([^'\"]*)['\"]\)", r"--model \1"),
    (r"\bfg\.load_sae\(['\"]([^'\"]*)['\"]\)", r"--sae \1"),
    (r"\bset tokenizer\.chat_template, or pass strings", "name a chat model with --model, or leave out --chat"),
    (r"\bsae_id(?==| too)", "--sae-id"),
    (r"\bthe option (?=[\w.{}]+=)", "--set "),
)
_ALIASES = {"hookpoints": "hookpoint", "target_ce_rise": "ce_rise", "keep_pooled": "pooled"}
_ARGUMENT = re.compile(r"(?<![-\w.?&/])(?<!--set )([a-z_]+)=(\"[^\"]*\"|'[^']*'|[^\s,;)]*)")


def with_options(message: str, options: Mapping[str, tuple[str, str]]) -> str:
    """A message with the command's options in place of Python's arguments: "pass sae=" becomes "pass --sae".

    ``options`` is {parameter: (its option, the option that turns it off)}.
    """
    for pattern, words in PHRASES:
        message = re.sub(pattern, partial(_in_same_case, words), message, flags=re.IGNORECASE)

    def option(match: re.Match[str]) -> str:
        on, off = options.get(_ALIASES.get(match[1], match[1]), ("", ""))
        end = "." if match[2].endswith(".") and match.end() == len(message) else ""
        value = match[2].removesuffix(end).strip("\"'")
        if not on or (value == "False" and not off):
            return match[0]
        return (off if value == "False" else on if value in ("", "True", "…") else f"{on} {value}") + end

    return _ARGUMENT.sub(option, message)


def _in_same_case(words: str, match: re.Match[str]) -> str:
    """The words for a match, with a capital letter where the match begins a sentence."""
    text = match.expand(words)
    return text[0].upper() + text[1:] if match[0][0].isupper() else text


def options_of(command: Any) -> dict[str, tuple[str, str]]:
    """{parameter: (its longest option, the option that turns it off)} of a click command."""
    return {
        p.name: (max(p.opts, key=len), max(p.secondary_opts, key=len, default=""))
        for p in getattr(command, "params", ())
        if p.name and p.opts and p.opts[0].startswith("-")
    }
