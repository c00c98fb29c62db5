"""Ctrl-C comes before or after a change of something that outlives a call, such as a model, and never amid it.

Python raises KeyboardInterrupt between any two calls, also between the one that sets a hook and the one that notes how
it comes off. The model would then stay steered.

    @whole_contextmanager
    def as_new_forward(module, forward):
        before, module.forward = module.forward, forward
        try:
            yield
        finally:
            module.forward = before
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import partial, wraps
from types import FrameType
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
# signals whose handlers may raise: Ctrl-C, and what ends a process or limits the time of a call
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGALRM", "SIGHUP") if hasattr(signal, name))


class HeldSignals:
    """A block during which Python's handlers of signals wait; they are called when it ends.

    Handlers run in the main thread alone, so that there is nothing to hold in any other.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._came: list[tuple[int, FrameType | None]] = []

    def __enter__(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):  # neither the system's own nor one of C code
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:  # of a handler that was not held yet
            self._give_back()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._give_back()
        except BaseException:  # of a handler that was given back already
            self._give_back()
            raise
        finally:
            self._call(self._came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came.append((number, frame))

    def _give_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _call(self, came: list[tuple[int, FrameType | None]]) -> None:
        for number, frame in came[:1]:
            try:
                self._handlers[number](number, frame)
            finally:
                self._call(came[1:])


class WholeBlock(ContextDecorator, Generic[T]):
    """A context manager that is entered once, and whose beginning and end each run as a whole: signals wait for them.

    Where one then ends the call of ``__enter__``, the block is left again. What Python cannot close is the moment
    between the last call of a block and the first of ``__exit__``, of some 50 ns.

    Args:
        make: A function that makes the context manager; called when the block is entered.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make = make
        self._was_entered = False
        self._inside: AbstractContextManager[T] | None = None  # what is to be left

    def _recreate_cm(self) -> WholeBlock[T]:
        """The block of one call of a function that this one decorates."""
        return type(self)(self._make)

    def _entered_again(self) -> Exception:
        return RuntimeError("a context manager that is entered once was entered again")

    def __enter__(self) -> T:
        if self._was_entered:
            raise self._entered_again()
        self._was_entered = True
        try:
            with HeldSignals():
                self._inside = self._make()
                return self._inside.__enter__()
        except BaseException as error:  # also of a signal that waited until here
            self._leave(type(error), error, error.__traceback__)
            raise

    def __exit__(self, *error: Any) -> bool | None:
        try:
            return self._leave(*error)
        except BaseException as late:  # of a signal that came before they wait
            self._leave(type(late), late, late.__traceback__)
            raise

    def _leave(self, *error: Any) -> bool | None:
        """Leave the block unless that is done."""
        with HeldSignals():
            inside, self._inside = self._inside, None
            return None if inside is None else inside.__exit__(*error)


def whole_contextmanager(function: Callable[P, Iterator[T]]) -> Callable[P, WholeBlock[T]]:
    """``contextlib.contextmanager``, whose code before and after the block runs as a whole."""
    make = contextmanager(function)

    @wraps(function)
    def block(*args: P.args, **kwargs: P.kwargs) -> WholeBlock[T]:
        return WholeBlock(partial(make, *args, **kwargs))

    return block
