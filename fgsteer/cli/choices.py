"""Names from tables in help texts and in shell completion: plugins add to tables, so they are listed when asked for.

typer.Option(help="One of {bench methods}.", autocompletion=completion("bench methods"))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from typer.core import TyperCommand

from fgsteer.methods import specs

# The names that stand for {key} in a help text. What they are read from imports no torch.
CHOICES: Mapping[str, Callable[[], list[str]]] = {
    "build methods": lambda: [method.name for method in specs("build")],
    "bench methods": lambda: [method.name for method in specs("bench")],
    "sweep methods": lambda: [method.name for method in specs("sweep")],
}


class CommandWithChoices(TyperCommand):
    """A command whose help lists the names of tables where its options' help says ``{key}``, a key of CHOICES."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the names filled in."""
        for parameter in self.params:
            parameter.help = with_choices(getattr(parameter, "help", None) or "")  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def with_choices(text: str) -> str:
    """Put the names of tables in place of their keys in braces."""
    for key, names in CHOICES.items():
        if f"{{{key}}}" in text:
            text = text.replace(f"{{{key}}}", ", ".join(names()))
    return text


def completion(key: str) -> Callable[[str], list[str]]:
    """Return the function that completes an option whose values are the names of a table."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in CHOICES[key]() if name.startswith(incomplete)]

    return complete
