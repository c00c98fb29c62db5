"""Functions set on a module itself, over those of its class, and taken off in any order.

shadow(model, "generate", steered, changes)
refuse_copies(model, changes)
with shadowed([(model, "generate", steered)]): ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from torch import nn

from fgsteer.errors import SteeringError
from fgsteer.errors.changes import Changes, temporary_change


def shadow(module: nn.Module, name: str, value: Callable[..., Any], changes: Changes) -> None:
    """Set a function on the module itself until the changes are undone; what others set meanwhile stays in place."""
    shadow_set = _Shadow(vars(module).get(name), value)
    value.__dict__["_fgsteer_shadow"] = shadow_set

    def undo() -> None:
        shadow_set.gone = True
        if vars(module).get(name) is not value:  # another function lies over it, and calls through it
            return
        below = shadow_set.below
        while (under := _shadow_of(below)) is not None and under.gone:
            below = under.below
        delattr(module, name) if below is None else setattr(module, name, below)

    changes.undo_by(undo)
    setattr(module, name, value)


@temporary_change
def shadowed(changes: Changes, functions: Iterable[tuple[nn.Module, str, Callable[..., Any]]]) -> Iterator[None]:
    """Set functions on modules for the block, each given as a module, a name there and the function."""
    for module, name, value in functions:
        shadow(module, name, value, changes)
    yield


def as_new_function(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function as another object: compiled graphs do not watch for new hooks, but for another forward."""

    @wraps(forward)
    def steered(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return steered


class _Shadow:
    """A function that was set, what the module itself had before, and whether it was taken off."""

    def __init__(self, below: Any, value: Callable[..., Any]) -> None:
        self.below, self.value, self.gone = below, value, False


def _shadow_of(function: Any) -> _Shadow | None:
    """The shadow that a function is; None for one that merely wraps such a function and copied its attributes."""
    mark = getattr(function, "_fgsteer_shadow", None)
    return mark if isinstance(mark, _Shadow) and mark.value is function else None


def refuse(module: nn.Module, name: str, changes: Changes, got: str, expected: str, change: str) -> None:
    """Make a method of the module raise SteeringError until the changes are undone, where it has such a method."""

    def refused(*_: Any, **__: Any) -> Any:
        raise SteeringError(got, expected, change)

    if callable(getattr(module, name, None)):
        shadow(module, name, refused, changes)


def refuse_copies(module: nn.Module, changes: Changes) -> None:
    """Refuse to copy or pickle a module until the changes are undone: ``copy`` and ``pickle`` ask it for its state."""
    refuse(
        module,
        "__getstate__",
        changes,
        f"a copy of a {type(module).__name__} that is being steered, by copy, pickle or torch.save",
        "a copy that is made before or after the block",
        "inside the block weights alone may be saved, by state_dict() or save_pretrained(folder)",
    )
