"""Changes of what outlives a call, such as a model, which are undone whatever ends the block that they are for.

Python raises KeyboardInterrupt between any two calls, also between the one that changes something and the one that
notes how it is undone; and so come other exceptions of handlers of signals. How a change is undone is therefore noted
before it is made, and undoing goes on where an exception broke it off.

    @temporary_change
    def frozen(changes, model):
        for parameter in model.parameters():
            changes.set_attribute(parameter, "requires_grad", False)
        yield
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, MutableMapping
from contextlib import AbstractContextManager, ContextDecorator, contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


class Changes:
    """Changes, and how each is undone: by a function that may be called where its change was not made, or twice."""

    def __init__(self) -> None:
        self._undos: list[Callable[[], object]] = []

    def undo_by(self, undo: Callable[[], object]) -> None:
        """Note how the change that follows is undone."""
        self._undos.append(undo)

    def set_attribute(self, thing: object, name: str, value: object) -> None:
        """Set an attribute that the thing has."""
        self.undo_by(partial(setattr, thing, name, getattr(thing, name)))
        setattr(thing, name, value)

    def set_item(self, mapping: MutableMapping[K, V], key: K, value: V) -> None:
        """Set an item of a mapping."""
        self.undo_by(
            partial(mapping.__setitem__, key, mapping[key]) if key in mapping else partial(mapping.pop, key, None)
        )
        mapping[key] = value

    def undo(self) -> None:
        """Undo all changes, the last one first. An exception of one that is broken off is raised after the others."""
        broken_off: BaseException | None = None
        while self._undos:
            for _ in range(2):  # again, where an exception broke it off
                try:
                    self._undos[-1]()
                    break
                except BaseException as error:
                    broken_off = error
            self._undos.pop()
        if broken_off is not None:
            raise broken_off


class TemporaryChange(ContextDecorator, Generic[T]):
    """A context manager that is entered once, or a decorator; its changes are undone when it is left, or dropped.

    An exception that is raised in ``__enter__`` or ``__exit__``, at whatever moment, leaves no change behind. One that
    comes when neither has begun does, until its traceback is dropped: Ctrl-C during an operator, such as a matrix
    product, that is the last of a block is raised at the first instruction of ``__exit__``, as Python does for all
    context managers; after a call it is raised inside the block.

    Args:
        change: A generator function of changes, which makes them and yields what the block gets.
    """

    def __init__(self, change: Callable[[Changes], Iterator[T]]) -> None:
        self._change, self._changes, self._was_entered = change, Changes(), False
        self._generator = generator = _changed(change, self._changes)
        self._block: AbstractContextManager[T] = contextmanager(lambda: generator)()

    def _recreate_cm(self) -> TemporaryChange[T]:
        """The block of one call of a function that this one decorates."""
        return type(self)(self._change)

    def _entered_again(self) -> Exception:
        return RuntimeError("a context manager that is entered once was entered again")

    def __enter__(self) -> T:
        if self._was_entered:
            raise self._entered_again()
        self._was_entered = True
        try:
            value = self._block.__enter__()
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return value

    def __exit__(self, *error: Any) -> bool | None:
        try:
            swallows = self._block.__exit__(*error)
        finally:
            try:
                self._generator.close()  # where it was not reached
            finally:
                self._changes.undo()  # where it was broken off
        return swallows


def _changed(change: Callable[[Changes], Iterator[T]], changes: Changes) -> Generator[T]:
    try:
        yield from change(changes)
    finally:  # also where the block is dropped, which closes its generator
        changes.undo()


def temporary_change(function: Callable[Concatenate[Changes, P], Iterator[T]]) -> Callable[P, TemporaryChange[T]]:
    """``contextlib.contextmanager`` of a generator that takes ``Changes`` first, which are undone after the block."""

    @wraps(function)
    def block(*args: P.args, **kwargs: P.kwargs) -> TemporaryChange[T]:
        return TemporaryChange(lambda changes: function(changes, *args, **kwargs))

    return block
