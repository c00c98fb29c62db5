"""Arguments checked at the door: their types, before a public function does any work.

What is expected of an argument is what its annotation says, where that is a kind that is known here.

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
from fgsteer.errors.wording import a

P = ParamSpec("P")
R = TypeVar("R")
PACKAGE = str(Path(__file__).resolve().parents[1])
_ON_THE_WAY = (PACKAGE, contextlib.__file__, no_grad.__file__)  # files of frames that no caller of this package wrote


def is_whole_number(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of Python, numpy or torch; True and False are not."""
    if isinstance(value, bool) or type(value).__name__ in ("bool_", "bool"):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return "bool" not in str(getattr(value, "dtype", ""))


def is_number(value: object) -> bool:
    """Whether a value is one real number of Python, numpy or torch that a float holds; True and False are not."""
    if callable(getattr(value, "item", None)):  # of an array or a tensor of one element
        try:
            value = value.item()  # type: ignore[attr-defined]
        except (RuntimeError, ValueError):
            return False
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(name: str, value: object) -> None:
    """Raises ArgumentError unless the value is one real number."""
    if not is_number(value):
        raise ArgumentError(f"{name} = {describe_value(value)}", "a number")


def check_range(name: str, value: object, least: int | float, most: int | float, *, whole: bool = False) -> None:
    """Raises ArgumentError unless the value is one number, or a ``whole`` one; DataError for one out of range."""
    fits = is_whole_number(value) if whole else is_number(value)
    if not fits or not least <= value <= most:  # type: ignore[operator]
        expected = f"a {'whole ' if whole else ''}number from {least} to {most}"
        raise (DataError if fits else ArgumentError)(f"{name} = {describe_value(value)}", expected)


def check_flags(**flags: object) -> None:
    """Raises ArgumentError, naming it, for a flag that is neither True nor False: the text "no" would count as true."""
    for name, value in flags.items():
        if not _KINDS["bool"].fits(value):
            raise ArgumentError(f"{name} = {describe_value(value)}", "True or False")


def describe_value(value: object) -> str:
    """A value as messages show it: short ones with their type, of others the type."""
    name = type(value).__name__
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int) and value.bit_length() > 200:  # Python writes out no number of 4,300 digits
        return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1} and more ({name})"
    return f"{value!r:.60} ({name})" if isinstance(value, str | int | float | complex | Path) else a(name)


def is_tokenizer(value: object) -> bool:
    """Whether a value turns texts into ids and back."""
    wanted = ("pad_token_id", "decode", "batch_decode", "convert_ids_to_tokens")
    return callable(value) and not isinstance(value, nn.Module) and all(hasattr(value, name) for name in wanted)


def as_tokenizer(value: Any) -> Any:
    """The tokenizer, of a multimodal processor its own. Raises ArgumentError for anything else."""
    for candidate in (value, getattr(value, "tokenizer", None)):
        if is_tokenizer(candidate):
            return candidate
    raise ArgumentError(f"tokenizer is {describe_value(value)}", _KINDS["PreTrainedTokenizerBase"].expected, _TOKENIZER)


@dataclass(frozen=True)
class _Kind:
    """What values of an annotation are: a test, a name in words, and how to get one."""

    fits: Callable[[Any], bool]
    expected: str
    obtain: str = ""


def _ours(name: str, obtain: str, expected: str = "") -> _Kind:
    """A class of this package, by its name: those that are checked are defined after this module."""

    def fits(value: object) -> bool:
        return any(c.__name__ == name and c.__module__.startswith("fgsteer.") for c in type(value).__mro__)

    return _Kind(fits, expected or a(name), obtain)


_MODEL = 'fg.load_model("default") gives a model and its tokenizer, or pass a transformers model of your own'
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
    "SAE": _ours("SAE", 'fg.load_sae("default"), a folder, a release or a sae_lens.SAE gives one'),
    "ContrastStatistics": _ours(
        "ContrastStatistics",
        "fg.collect(model, tokenizer, contrast) gives them, fg.ContrastStatistics.load(path) reads a file of them",
        "statistics (ContrastStatistics)",
    ),
    "EffectApproximator": _ours("EffectApproximator", 'fg.load_effects("default") or fg.load_effects(path) gives one'),
    "FeatureDensity": _ours("FeatureDensity", "fg.FeatureDensity.load(path) reads a file"),
    "FeatureExamples": _ours("FeatureExamples", "fg.FeatureExamples.load(path) reads a file"),
    "SteeringVector": _ours("SteeringVector", "fg.SteeringVector.load(path) reads a file"),
    "Intervention": _ours("Intervention", "call .add(coefficient), .affine(alpha) or the like on a vector"),
    "Sequence[Intervention]": _Kind(lambda value: isinstance(value, list | tuple), "a list of them"),
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
    """The kinds of an annotation such as "SAE | None"; none where a part of it is not known here."""
    parts = annotation.split(" | ") if isinstance(annotation, str) else []
    return [_KINDS[part] for part in parts] if all(part in _KINDS for part in parts) else []


def _misfit(parameter: inspect.Parameter, value: object) -> ArgumentError | None:
    """Why a value cannot be the parameter's, or None where it can."""
    kinds = _kinds(parameter.annotation)
    if not kinds or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return None
    if any(kind.fits(value) for kind in kinds):
        return None
    obtain = "; ".join(kind.obtain for kind in kinds if kind.obtain)
    return ArgumentError(
        f"{parameter.name} is {describe_value(value)}", " or ".join(kind.expected for kind in kinds), obtain
    )


def _order(name: str, parameters: Sequence[inspect.Parameter]) -> str:
    """The call as it is meant, such as "find_features(model, tokenizer, sae, word, …)"."""
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name not in ("self", "cls")]
    return f"{name}({', '.join(names)}{', …' if any(p.kind is p.KEYWORD_ONLY for p in parameters) else ''})"


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose arguments are checked by their annotations before it runs; see ``checked_after``."""
    return checked_after(())(function)


def checked_after(former: Sequence[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator like ``checked`` for a function whose arguments once came in another order, which is still taken.

    Of an argument annotated as a tokenizer a multimodal processor is taken too, for its tokenizer. The
    function raises ArgumentError for an argument of another type, or for one too many or too few; where
    positional ones fit the ``former`` order alone it warns DeprecationWarning.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        parameters = signature.parameters
        order = _order(function.__name__, list(parameters.values()))

        def misfits(given: Mapping[str, object]) -> list[ArgumentError]:
            return [found for name, value in given.items() if (found := _misfit(parameters[name], value))]

        @wraps(function)
        def at_the_door(*args: Any, **kwargs: Any) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
                given, why = bound.arguments, ""
            except TypeError as error:
                given, why = dict(zip(parameters, args, strict=False)), str(error)
            wrong = misfits({name: value for name, value in given.items() if name in parameters})
            if wrong and former and len(args) <= len(former):
                renamed = dict(zip(former, args, strict=False))
                if not set(renamed) & set(kwargs) and not misfits(renamed):
                    warn(f"the order of {function.__name__} is now {order}", DeprecationWarning)
                    return at_the_door(**renamed, **kwargs)
            if wrong:
                first = wrong[0]
                change = f"{first.change}; the order is {order}" if args and first.change else first.change
                raise ArgumentError(first.got, first.expected, change)
            if why:
                raise ArgumentError(f"{function.__name__}: {why}", order)
            for name, value in given.items():
                if parameters[name].annotation == "PreTrainedTokenizerBase":
                    given[name] = as_tokenizer(value)
            return function(*bound.args, **bound.kwargs)

        return at_the_door

    return decorate


def warn(message: str, category: type[Warning]) -> None:
    """Warn at the line outside this package that led here."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_ON_THE_WAY):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
