"""Printing to the terminal: results as text or as JSON, progress, and text that any console can show."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fgsteer.display.progress import Report, in_terminal, reporting
from fgsteer.errors import escaping
from fgsteer.errors.escaping import escape_text
from fgsteer.storage.ranks import Ranks

SECONDS_BETWEEN_LINES = 15.0  # of progress where standard error is no terminal


def prepare_streams() -> None:
    """Make standard output and error write characters that their encoding lacks as escapes, such as \\u2603."""
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="backslashreplace")


def say(text: str = "", *, err: bool = False) -> None:
    """Print a line to standard output, or to standard error; control characters are printed as escapes."""
    print(escape_text(text), file=sys.stderr if err else sys.stdout, flush=True)


def json_text(value: object, indent: int | None = None) -> str:
    """JSON in which only those characters are escaped that the console cannot encode or would act on."""
    text = escaping.json_text(value, indent=indent)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = escaping.json_text(value, indent=indent, ensure_ascii=True)
    return text


def show(value: Any, as_json: bool, print_text: Callable[[Any], None]) -> None:
    """Print a result as JSON, or as text for a reader. Of several processes only the first prints."""
    if Ranks.from_env().rank:
        return
    if as_json:
        say(json_text(value))
    else:
        print_text(value)


def console(**options: Any) -> Any:
    """A terminal of rich that prints text as it is, without markup, and control characters as escapes."""
    from rich.console import Console
    from rich.segment import Segment

    class Screen(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else escape_text(text), style, control)

    return Screen(highlight=False, markup=False, emoji=False, **options)


def progress_bar(what: str, total: int | None, as_json: bool) -> AbstractContextManager[Report]:
    """A block with a progress bar on a terminal; it gets a function to report how many are done (and of how many)."""
    return reporting(False if as_json else None, what, total)


@contextmanager
def progress_lines(what: str, as_json: bool) -> Iterator[Report]:
    """As ``progress_bar``; where standard error is no terminal, a line to it now and then if the work takes a while."""
    if in_terminal() or Ranks.from_env().rank:
        with progress_bar(what, None, as_json) as report:
            yield report
        return
    began = said = time.monotonic()

    def report_line(done: int, total: int | None = None, note: Any = None) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and done:
            said = now
            left = f", about {duration((now - began) * (total - done) / done)} left" if total else ""
            say(f"{what}: {done}{f' of {total}' if total else ''}{left}", err=True)

    yield report_line


def duration(seconds: float) -> str:
    """A time in words: 40 s, 3 min, 2 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
