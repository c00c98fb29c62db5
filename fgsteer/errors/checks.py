"""Check the types of arguments before a public function does any work, which is done under torch's usual defaults.

What is expected of an argument is what its annotation says, where that is one of the annotations known here.

    @checked
    def describe(model: nn.Module, tokenizer: PreTrainedTokenizerBase, sae: SAE, *, top: int = 20) -> ...
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from numbers import Real
from pathlib import Path
from typing import Any, ParamSpec, TypeGuard, TypeVar

from torch import Tensor, nn
from torch.utils import _contextlib as no_grad

from fgsteer.errors import ArgumentError, DataError
from fgsteer.errors.defaults import has_usual_defaults, usual_defaults
from fgsteer.errors.wording import a

P = ParamSpec("P")
R = TypeVar("R")
PACKAGE = str(Path(__file__).resolve().parents[1])
# of frames that no caller of this package wrote; "<string>" is that of the constructors that dataclasses generate
_INNER_FILES = (PACKAGE, contextlib.__file__, no_grad.__file__, "<string>")


def is_whole_number(value: object) -> TypeGuard[int]:
    """Tell whether a value is an integer of Python, numpy or torch; True and False are not."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return "bool" not in str(getattr(value, "dtype", ""))


def is_number(value: object) -> bool:
    """Tell whether a value is one real number of Python, numpy or torch that a float holds; True and False are not."""
    if callable(getattr(value, "item", None)):  # of an array or a tensor of one element
        try:
            value = value.item()  # type: ignore[attr-defined]
        except (RuntimeError, ValueError):
            return False
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(name: str, value: object) -> None:
    """Raise ArgumentError unless the value is one real number."""
    if not is_number(value):
        raise ArgumentError(f"{name} = {describe_value(value)}", "a number")


def check_range(name: str, value: object, least: int | float, most: int | float, *, whole: bool = False) -> None:
    """Raise ArgumentError unless the value is one number, or a ``whole`` one; DataError for one out of range."""
    fits = is_whole_number(value) if whole else is_number(value)
    if not fits or not least <= value <= most:  # type: ignore[operator]
        expected = f"a {'whole ' if whole else ''}number from {least} to {most}"
        raise (DataError if fits else ArgumentError)(f"{name} = {describe_value(value)}", expected)


def check_flags(**flags: object) -> None:
    """Raise ArgumentError, naming it, for a flag that is neither True nor False: the text "no" would count as true."""
    for name, value in flags.items():
        if not _KINDS["bool"].fits(value):
            raise ArgumentError(f"{name} = {describe_value(value)}", "True or False")


def describe_value(value: object) -> str:
    """Describe a value for a message: a short one with its type, any other by its type."""
    name = type(value).__name__
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int) and value.bit_length() > 200:  # Python writes out no number of 4,300 digits
        return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1} or more ({name})"
    return f"{value!r:.60} ({name})" if isinstance(value, str | int | float | complex | Path) else a(name)


def is_tokenizer(value: object) -> bool:
    """Tell whether a value turns texts into ids and back."""
    methods = ("pad_token_id", "decode", "batch_decode", "convert_ids_to_tokens")
    return callable(value) and not isinstance(value, nn.Module) and all(hasattr(value, name) for name in methods)


def as_tokenizer(value: Any) -> Any:
    """Return the tokenizer, or that of a multimodal processor. Raises ArgumentError for anything else."""
    for candidate in (value, getattr(value, "tokenizer", None)):
        if is_tokenizer(candidate):
            return candidate
    raise ArgumentError(
        f"{describe_value(value)} for tokenizer", _KINDS["PreTrainedTokenizerBase"].expected, _TOKENIZER
    )


@dataclass(frozen=True)
class _Kind:
    """What the values of an annotation are: a test, a name in words, and how to get one."""

    fits: Callable[[Any], bool]
    expected: str
    obtain: str = ""


def _own_class(name: str, obtain: str, expected: str = "") -> _Kind:
    """Return the kind of a class of this package, found by name, as these classes are defined after this module."""

    def fits(value: object) -> bool:
        return any(c.__name__ == name and c.__module__.startswith("fgsteer.") for c in type(value).__mro__)

    return _Kind(fits, expected or a(name), obtain)


_MODEL = 'load a model and its tokenizer with fg.load_model("default"), or pass a transformers model of your own'
_TOKENIZER = "pass the tokenizer that fg.load_model returns beside the model, or processor.tokenizer"
_KINDS: dict[str, _Kind] = {
    "None": _Kind(lambda value: value is None, "None"),
    "bool": _Kind(lambda value: isinstance(value, bool), "True or False"),
    "int": _Kind(lambda value: is_whole_number(value) and abs(int(value)) < 2**63, "a whole number"),
    "float": _Kind(is_number, "a number"),
    "str": _Kind(lambda value: isinstance(value, str), "a text"),
    "Path": _Kind(lambda value: isinstance(value, Path), "a path"),
    "nn.Module": _Kind(lambda value: isinstance(value, nn.Module), "a Hugging Face model", _MODEL),
    "PreTrainedModel": _Kind(lambda value: isinstance(value, nn.Module), "a Hugging Face model", _MODEL),
    "PreTrainedTokenizerBase": _Kind(
        lambda value: is_tokenizer(value) or is_tokenizer(getattr(value, "tokenizer", None)),
        "a tokenizer",
        _TOKENIZER,
    ),
    "SAE": _own_class("SAE", 'load one with fg.load_sae, from "default", a folder, a release or a sae_lens.SAE'),
    "ContrastStatistics": _own_class(
        "ContrastStatistics",
        "collect them with fg.collect(model, tokenizer, contrast) or load them with fg.ContrastStatistics.load(path)",
        "statistics (ContrastStatistics)",
    ),
    "EffectApproximator": _own_class(
        "EffectApproximator", 'load one with fg.load_effects("default") or fg.load_effects(path)'
    ),
    "FeatureDensity": _own_class("FeatureDensity", "load a file with fg.FeatureDensity.load(path)"),
    "FeatureExamples": _own_class("FeatureExamples", "load a file with fg.FeatureExamples.load(path)"),
    "SteeringVector": _own_class("SteeringVector", "load a file with fg.SteeringVector.load(path)"),
    "Intervention": _own_class("Intervention", "call .add(coefficient), .affine(alpha) or the like on a vector"),
    "SteeringItem": _Kind(
        lambda value: any(kind.fits(value) for kind in (_KINDS["Intervention"], _own_class("CacheSteering", ""))),
        "an Intervention or a CacheSteering",
        "call .add(coefficient), .affine(alpha) or the like on a vector",
    ),
    "Sequence[Intervention]": _Kind(lambda value: isinstance(value, list | tuple), "a list of them"),
    "Sequence[SteeringItem]": _Kind(lambda value: isinstance(value, list | tuple), "a list of them"),
    "Sequence[Entry]": _Kind(
        lambda value: isinstance(value, list | tuple),
        "a list of what is compared, such as [None, vec.add(2.0)]",
    ),
    "Callable[[float], Intervention]": _Kind(
        callable, "a function from a strength to an intervention", "pass vec.add itself, without a call"
    ),
    "Iterable[object]": _Kind(
        lambda value: isinstance(value, Iterable) and not isinstance(value, str), "texts, such as a list of them"
    ),
    "torch.Tensor": _Kind(lambda value: isinstance(value, Tensor), "a tensor"),
}


def _kinds(annotation: object) -> list[_Kind]:
    """Return the kinds of an annotation such as "SAE | None"; none where a part of it is not known here."""
    parts = annotation.split(" | ") if isinstance(annotation, str) else []
    return [_KINDS[part] for part in parts] if all(part in _KINDS for part in parts) else []


def _misfit(parameter: inspect.Parameter, value: object) -> ArgumentError | None:
    """Return the error of a value that a parameter cannot take, or None where it can."""
    kinds = _kinds(parameter.annotation)
    if not kinds or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return None
    if any(kind.fits(value) for kind in kinds):
        return None
    obtain = "; ".join(kind.obtain for kind in kinds if kind.obtain)
    expected = " or ".join(kind.expected for kind in kinds)
    return ArgumentError(f"{describe_value(value)} for {parameter.name}", expected, obtain)


def _describe_call(name: str, parameters: Sequence[inspect.Parameter]) -> str:
    """Describe the call as it is meant, such as "find_features(model, tokenizer, sae, word, …)"."""
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "cls")]
    return f"{name}({', '.join(names)}{', …' if any(p.kind is p.KEYWORD_ONLY for p in parameters) else ''})"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function: its arguments are checked by their annotations, and it runs under torch's usual defaults."""
    return checked_after(())(function)


def checked_after(former: Sequence[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a decorator like ``checked`` for a function whose arguments once came in another order.

    The ``former`` order is still accepted: where positional arguments fit it alone, the function warns
    DeprecationWarning. The function raises ArgumentError for an argument of another type, or for one too many or
    too few. Where a tokenizer is expected a multimodal processor is accepted too, for its tokenizer.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        parameters = signature.parameters
        order = _describe_call(function.__name__, list(parameters.values()))

        def misfits(arguments: Mapping[str, object]) -> list[ArgumentError]:
            return [error for name, value in arguments.items() if (error := _misfit(parameters[name], value))]

        @wraps(function)
        def with_checks(*args: Any, **kwargs: Any) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
                arguments, reason = bound.arguments, ""
            except TypeError as error:
                arguments, reason = dict(zip(parameters, args, strict=False)), str(error)
            errors = misfits({name: value for name, value in arguments.items() if name in parameters})
            if errors and former and len(args) <= len(former):
                renamed = dict(zip(former, args, strict=False))
                if not set(renamed) & set(kwargs) and not misfits(renamed):
                    warn(f"The order of arguments has changed: the call is now {order}.", DeprecationWarning)
                    return with_checks(**renamed, **kwargs)
            if errors:
                first = errors[0]
                change = f"{first.change}; the call is {order}" if args and first.change else first.change
                raise ArgumentError(first.got, first.expected, change)
            if reason:
                raise ArgumentError(f"The call of {function.__name__} failed: {reason}.", order)
            for name, value in arguments.items():
                if parameters[name].annotation == "PreTrainedTokenizerBase":
                    arguments[name] = as_tokenizer(value)
            with contextlib.nullcontext() if has_usual_defaults() else usual_defaults():
                return function(*bound.args, **bound.kwargs)

        return with_checks

    return decorate


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this package from which the call came."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INNER_FILES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
