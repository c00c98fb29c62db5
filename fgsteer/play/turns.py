"""Turns: one piece of work at a time on a model, in the order in which it was asked for, each told its place.

turns = Turns()
async for event in turns.take(lambda: iter([{"event": "text"}])): ...

Work is an iterator of events, which a thread of its own reads. Who waits gets ``{"event": "queue", "place": n}``.
Closing the async iterator, as a closed tab does, closes the work's iterator at its next event and then frees the turn.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Any

from fgsteer.errors import BusyError, FgsteerError

Event = dict[str, Any]
Events = Generator[Event]
Work = Callable[[], Events]
MAX_WAITING = 32
_END = object()


class Turns:
    """Who waits for the model, and who has it."""

    def __init__(self) -> None:
        self._waiting: list[object] = []
        self._changed = asyncio.Event()  # a new one after each change

    @property
    def waiting(self) -> int:
        """How many have or wait for the model."""
        return len(self._waiting)

    async def take(self, work: Work) -> AsyncGenerator[Event]:
        """The events of some work, when its turn has come; before that its place in the queue, 1 for the next.

        Raises BusyError where too many wait, and what the work raises.
        """
        if len(self._waiting) > MAX_WAITING:
            raise BusyError(f"{len(self._waiting)} requests that wait for the model", "fewer", "try again later")
        ticket = object()
        self._waiting.append(ticket)
        started = False
        try:
            async for place in self._places(ticket):
                yield {"event": "queue", "place": place}
            started = True
            async with aclosing(self._run(work, ticket)) as events:
                async for event in events:
                    yield event
        finally:
            if not started:
                self._leave(ticket)

    async def _places(self, ticket: object) -> AsyncGenerator[int]:
        """The place of a ticket whenever it changes, until it is first."""
        told = -1
        while (place := self._waiting.index(ticket)) > 0:
            if place != told:
                told = place
                yield place  # meanwhile it may change
            else:
                await self._changed.wait()

    def _leave(self, ticket: object) -> None:
        """Give the turn, or the place in the queue, to who is next. It awaits nothing, so no cancelling stops it."""
        self._waiting.remove(ticket)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _run(self, work: Work, ticket: object) -> AsyncGenerator[Event]:
        """Read the work's events in a thread; the turn ends with the thread, also where nobody reads any more."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Any] = asyncio.Queue()
        closed = threading.Event()

        def read() -> None:
            last: Any = _END
            try:
                with closing(work()) as iterator:
                    for event in iterator:
                        if closed.is_set():
                            break
                        loop.call_soon_threadsafe(events.put_nowait, event)
            except BaseException as error:  # the reader raises it
                last = error
            try:
                loop.call_soon_threadsafe(self._leave, ticket)
                loop.call_soon_threadsafe(events.put_nowait, last)
            except RuntimeError:  # the loop has ended, and everybody has left
                return

        threading.Thread(target=read, name="fgsteer.play", daemon=True).start()
        try:
            while (event := await events.get()) is not _END:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            closed.set()


def error_event(error: BaseException) -> Event:
    """What the page shows of an error: the message of one of fgsteer's, and of others that something went wrong."""
    if isinstance(error, FgsteerError):
        return {"event": "error", "message": str(error)}
    return {
        "event": "error",
        "message": f"Something went wrong: {type(error).__name__}. The terminal of fgsteer play says more.",
    }
