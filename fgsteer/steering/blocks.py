"""A block of steering: a context manager that is entered once, or a decorator.

Block(lambda changes: steered(changes, model, …))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from fgsteer.errors import SteeringError
from fgsteer.errors.changes import TemporaryChange

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
_SUSPENDING = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


class Block(TemporaryChange[T]):
    """A context manager that is entered once, or a decorator of a function: what ``steer`` returns."""

    def _entered_again(self) -> SteeringError:
        return SteeringError(
            "a steer block that is entered again",
            "a block that is entered once",
            "call steer(…) anew for each with statement",
        )

    def __call__(self, function: F) -> F:
        """The function, run in a block of its own at each call. Raises SteeringError for a generator or coroutine."""
        if any(suspends(function) for suspends in _SUSPENDING):
            raise SteeringError(
                f"steer as a decorator of {function.__name__}, which returns before it has run",
                "a plain function to decorate, not a generator or coroutine",
                "write the with statement, with steer(…), inside the function",
            )
        return super().__call__(function)
