"""The application, and what every command does before it runs: no output is an input, and none is being written."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand

from fgsteer.cli.outputs import check_apart, lock_output, may_be_path
from fgsteer.storage.ranks import Ranks

app = typer.Typer(
    help="Steer language models with the features of sparse autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

HELP_LISTS: dict[str, Callable[[], str]] = {}
"""What stands for "{name}" in help texts. The list is made when help is shown, so that it has what plugins add."""


class Command(TyperCommand):
    """A command that writes to no file that it reads, and to none that another process is writing."""

    def invoke(self, ctx: Any) -> Any:
        """Run it. Raises DataError for an output that is an input too, BusyError for one that is being written."""
        hints = get_type_hints(inspect.unwrap(self.callback)) if self.callback else {}
        paths = [p for p in self.params if may_be_path(p.name or "", str(hints.get(p.name or "")))]
        check_apart({max(p.opts, key=len): (p.name, ctx.params.get(p.name)) for p in paths})
        for output in filter(None, map(ctx.params.get, ("out", "html"))):
            if not Ranks.here().rank:  # of several processes, the first one writes
                ctx.with_resource(lock_output(output, str(self.name)))
        return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with lists from the tables of methods, judges and exports filled in."""
        self.help = filled(self.help)
        for parameter in self.params:
            if text := getattr(parameter, "help", None):
                parameter.help = filled(text)  # type: ignore[attr-defined]
        super().format_help(ctx, formatter)


def filled(text: str | None) -> str | None:
    """A help text with the lists of ``HELP_LISTS`` in place of their names in braces."""
    for name, make in HELP_LISTS.items():
        if text and f"{{{name}}}" in text:
            text = text.replace(f"{{{name}}}", make())
    return text
