"""The application, and what every command does before it runs: no output is an input, and none is being written."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, get_type_hints

import typer

from fgsteer.cli.choices import CommandWithChoices
from fgsteer.cli.outputs import check_apart, lock_output, may_be_path
from fgsteer.cli.printing import say
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.version import library_version

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        say(f"fgsteer {library_version()}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Steer language models with the features of sparse autoencoders."""


class Command(CommandWithChoices):
    """A command that writes to no file that it reads, and to none that another process is writing."""

    def invoke(self, ctx: Any) -> Any:
        """Run it. Raises DataError for an output that is an input too, BusyError for one that is being written."""
        hints = get_type_hints(inspect.unwrap(self.callback)) if self.callback else {}
        paths = [p for p in self.params if may_be_path(p.name or "", str(hints.get(p.name or "")))]
        check_apart({max(p.opts, key=len): (p.name, ctx.params.get(p.name)) for p in paths})
        for output in filter(None, map(ctx.params.get, ("out", "html"))):
            if not Ranks.from_env().rank:  # of several processes, the first one writes
                ctx.with_resource(lock_output(output, str(self.name)))
        return super().invoke(ctx)
