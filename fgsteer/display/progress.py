"""Progress of long work: a bar where a person watches, a function where one is given, else nothing.

    with reporting(progress, "collecting texts", total) as report:
        report(done)
        report(done, total, note=lambda: f"loss {loss:.3f}")        beside a bar; it is called where a bar is shown

This is the one place that decides. With ``progress=None`` there is a bar when standard error is a terminal, or when
the code runs in a notebook; pipes, log files and tests get no output. ``progress=False`` silences it, and a function is
called with what is done. Work that is done as a part of other work shows no bar of its own.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

from fgsteer.display.tables import html_text
from fgsteer.errors import ArgumentError
from fgsteer.errors.escaping import escape_text
from fgsteer.storage.ranks import Ranks

Report = Callable[..., None]  # takes the number done and, where it is known late, the number in all, and a note
Note = Callable[[], str] | None  # what is said beside a bar
Progress = Report | bool | None  # the argument of the public functions

SECONDS_BETWEEN_UPDATES = 0.25  # of a bar in a notebook
_REPORTING: ContextVar[bool] = ContextVar("fgsteer_reporting", default=False)  # whether a block is entered
_SCREEN = threading.Lock()  # held by the one bar that a screen has room for


@contextmanager
def reporting(progress: Progress, description: str, total: int | None = None) -> Iterator[Report]:
    """A block of work that reports how much of it is done, to the function that the block gets.

    Args:
        progress: None for a bar where a person watches, False for nothing, or a function to call instead.
        description: What is being done, such as "collecting texts".
        total: How much there is to do, or None where that is not known.

    Raises:
        ArgumentError: ``progress`` is something else.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise ArgumentError(
            f"progress = {progress!r:.60}",
            "None, True, False or a function",
            "pass progress=False for no bar",
        )
    inside = _REPORTING.get()
    token = _REPORTING.set(True)
    try:
        if callable(progress):
            yield partial(_without_note, progress)
        elif progress is False or inside or not (in_notebook() or in_terminal()) or not _SCREEN.acquire(blocking=False):
            yield _nothing
        else:
            try:
                bar = _notebook_bar if in_notebook() else _terminal_bar
                with bar(escape_text(description, keep=""), total) as report:
                    yield report
            finally:
                _SCREEN.release()
    finally:
        _REPORTING.reset(token)


def in_terminal() -> bool:
    """Whether standard error is a terminal, and this process the first of those that share the work."""
    return sys.stderr is not None and sys.stderr.isatty() and Ranks.from_env().rank == 0


def in_notebook() -> bool:
    """Whether the code runs in a notebook, of Jupyter or one of its kin."""
    if "IPython" not in sys.modules:
        return False
    from rich.console import Console

    return Console().is_jupyter


def _nothing(done: int, total: int | None = None, note: Note = None) -> None:
    """Take a report, and show nothing."""


def _without_note(progress: Report, *counts: int, note: Note = None) -> None:
    """Call a function of the user with what is done, and how much there is if that is said."""
    progress(*counts)


def _with_note(description: str, note: Note) -> str:
    return description if note is None else f"{description}, {escape_text(note(), keep='')}"


@contextmanager
def _terminal_bar(description: str, total: int | None) -> Iterator[Report]:
    """A bar on standard error that is gone when the block ends."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    screen = Console(stderr=True, highlight=False, markup=False, emoji=False)
    piped = sys.stdout is None or not sys.stdout.isatty()  # what is printed then belongs there, and not on the screen
    with Bars(*columns, console=screen, transient=True, redirect_stdout=not piped) as bars:
        task = bars.add_task(description, total=total)

        def report(done: int, of: int | None = total, note: Note = None) -> None:
            bars.update(task, completed=done, total=of, description=_with_note(description, note))

        yield report


@contextmanager
def _notebook_bar(description: str, total: int | None) -> Iterator[Report]:
    """A bar below the cell, once the work takes a while; it is emptied when the block ends."""
    from IPython.display import HTML, display

    handle: Any = None
    updated = time.monotonic()

    def report(done: int, of: int | None = total, note: Note = None) -> None:
        nonlocal handle, updated
        if time.monotonic() - updated < SECONDS_BETWEEN_UPDATES:
            return
        updated = time.monotonic()
        bar = HTML(_bar_html(_with_note(description, note), done, of))
        if handle is None:
            handle = display(bar, display_id=True)
        else:
            handle.update(bar)

    try:
        yield report
    finally:
        if handle is not None:
            handle.update(HTML(""))


def _bar_html(description: str, done: int, total: int | None) -> str:
    ends = f' value="{done}" max="{total}"' if total else ""
    number = f"{done:,} of {total:,}" if total else f"{done:,}"
    return f"<progress{ends}></progress> {html_text(description)}: {number}"
