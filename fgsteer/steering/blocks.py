"""A block of steering: a context manager that is entered once, or a decorator.

Block(lambda: steered(model, …))
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Generic, TypeVar

from fgsteer.errors import SteeringError

T = TypeVar("T")
_SUSPENDING = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)


class Block(Generic[T]):
    """A context manager that is entered once, or a decorator of a function: what ``steer`` returns.

    Args:
        make: A function that makes the context manager of one block.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make = make
        self._entered: AbstractContextManager[T] | None = None

    def __enter__(self) -> T:
        if self._entered is not None:
            raise SteeringError(
                "a steer block that is entered again",
                "a block that is entered once",
                "call steer(…) anew for each with statement",
            )
        self._entered = self._make()
        return self._entered.__enter__()

    def __exit__(self, *error: Any) -> None:
        assert self._entered is not None
        self._entered.__exit__(*error)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, run in a block of its own at each call. Raises SteeringError for a generator or coroutine."""
        if any(suspends(function) for suspends in _SUSPENDING):
            raise SteeringError(
                f"steer as a decorator of {function.__name__}, which returns before it has run",
                "a plain function to decorate, not a generator or coroutine",
                "write the with statement, with steer(…), inside the function",
            )

        @wraps(function)
        def steered(*args: Any, **kwargs: Any) -> Any:
            with Block(self._make):
                return function(*args, **kwargs)

        return steered
