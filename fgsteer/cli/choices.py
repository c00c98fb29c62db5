"""Lists from tables in help texts and in shell completion: plugins add to tables, so they are read when asked for.

typer.Option(help="One of {bench methods}.", autocompletion=completion("bench methods"))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from typer.core import TyperCommand

from fgsteer import export
from fgsteer.activations.token_rules import TOKEN_RULES
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.evaluation.judges.table import judge_names
from fgsteer.interventions.scopes import SCOPES, describe_scopes
from fgsteer.interventions.table import OPERATIONS
from fgsteer.methods import specs
from fgsteer.selection.names import RANKINGS


def _shipped_models() -> list[str]:
    """Return the names of the models that fgsteer ships SAEs for, from a table that --help does not load."""
    from fgsteer.models.shipped import SHIPPED

    return list(SHIPPED)


# The names that stand for {key} in a help text. What they are read from imports no torch.
CHOICES: Mapping[str, Callable[[], list[str]]] = {
    "build methods": lambda: [method.name for method in specs("build")],
    "bench methods": lambda: [method.name for method in specs("bench")],
    "sweep methods": lambda: [method.name for method in specs("sweep")],
    "judges": judge_names,
    "coherence judges": lambda: judge_names("coherence"),
    "exports": lambda: [row.name for row in export.specs()],
    "operations": lambda: list(OPERATIONS),
    "shipped models": _shipped_models,
    "scopes": lambda: list(SCOPES),
    "token rules": lambda: list(TOKEN_RULES),
    "rankings": lambda: list(RANKINGS),
}
# The texts that stand for {key} likewise. The character \b keeps the lines of a paragraph as they are.
DESCRIPTIONS: Mapping[str, Callable[[], str]] = {
    "what exports write": lambda: "\b\n" + "\n".join(f"{row.name:<12} {row.writes}" for row in export.specs()),
    "what scopes steer": describe_scopes,
    "export options": lambda: "; ".join(
        f"{row.name}: {', '.join(f'{option.name} ({option.summary})' for option in row.options)}"
        for row in export.specs()
        if row.options
    ),
}


class CommandWithChoices(TyperCommand):
    """A command whose help lists what is in tables where it says ``{key}``, a key of CHOICES or DESCRIPTIONS."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the lists filled in, and without upper bounds that nobody reaches."""
        self.help = with_choices(self.help or "")
        for parameter in self.params:
            parameter.help = with_choices(getattr(parameter, "help", None) or "")  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)
        formatter.buffer = [re.sub(rf"(\d+)<=x<={MAX_COUNT}", r"at least \1", text) for text in formatter.buffer]


def with_choices(text: str) -> str:
    """Put what is in tables in place of its keys in braces."""
    for key, names in CHOICES.items():
        if f"{{{key}}}" in text:
            text = text.replace(f"{{{key}}}", ", ".join(names()))
    for key, describe in DESCRIPTIONS.items():
        if f"{{{key}}}" in text:
            text = text.replace(f"{{{key}}}", describe())
    return text


def completion(key: str) -> Callable[[str], list[str]]:
    """Return the function that completes an option whose values are the names of a table."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in CHOICES[key]() if name.startswith(incomplete)]

    return complete
