"""What ``steer`` returns: a context manager that is entered once, or a decorator.

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
    """What ``steer`` returns: a context manager that is entered once, or a decorator of a function."""

    def __init__(self, make: Callable[[], AbstractContextManager[T]]) -> None:
        self._make = make
        self._steered: AbstractContextManager[T] | None = None

    def __enter__(self) -> T:
        if self._steered is not None:
            raise SteeringError("a steer block that is entered again", "one entry", "call steer(…) for each block")
        self._steered = self._make()
        return self._steered.__enter__()

    def __exit__(self, *error: Any) -> None:
        assert self._steered is not None
        self._steered.__exit__(*error)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of which runs in a block of its own. Raises SteeringError for one that suspends."""
        if any(suspends(function) for suspends in _SUSPENDING):
            raise SteeringError(
                f"steer as a decorator of {function.__name__}, which returns before it has run",
                "a plain function",
                "enter steer inside it, with a with statement",
            )

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with Block(self._make):
                return function(*args, **kwargs)

        return inside
