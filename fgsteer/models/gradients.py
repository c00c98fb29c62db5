"""Gradients where the caller has turned them off, and none of a model's weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from fgsteer.errors import DataError
from fgsteer.errors.changes import Changes, temporary_change

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def gradients_on() -> Iterator[None]:
    """A block, or as a decorator a function, in which gradients are taken, inside no_grad and inference_mode too."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def through_model(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that takes gradients through the model that is its first argument, as ``gradients_on`` does.

    The function raises DataError for a model whose weights were made inside ``torch.inference_mode``: torch takes no
    gradients through them.
    """

    @wraps(function)
    def with_gradients(*args: P.args, **kwargs: P.kwargs) -> R:
        model: Any = args[0]
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise DataError(
                "a model that was loaded or made inside torch.inference_mode",
                "one whose weights torch can take gradients through",
                "load it outside of inference_mode",
            )
        with gradients_on():
            return function(*args, **kwargs)

    return with_gradients


@temporary_change
def frozen(changes: Changes, model: nn.Module) -> Iterator[None]:
    """A block in which no parameter of the model requires grad, so that a backward pass computes none of theirs."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            changes.set_attribute(parameter, "requires_grad", False)
    yield
