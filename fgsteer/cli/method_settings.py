"""What a method is given on the command line, checked against its signature before anything is loaded."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fgsteer.errors import DataError
from fgsteer.methods import spec

_HINTS = {
    "stats": "Write the file with fgsteer collect",
    "effects": "Write the file with fgsteer effects, or pass --effects default with the default SAE",
    "features": "Name the features, such as --features 12:1.5,40",
}
OPTIONS = ("stats", "sae", "effects", "density", "features")  # inputs of methods that are options of their own
_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    NoneType: "null",
}


def check_inputs(method: str, inputs: dict[str, Any]) -> None:
    """Refuse a method without an option that it works on; its SAE has a default.

    Raises:
        DataError: The method is unknown, or such an option is missing.
    """
    missing = [name for name in spec(method, "build").required if name != "sae" and inputs.get(name) is None]
    if missing:
        options = " and ".join(f"--{name}" for name in missing)
        hints = "; ".join(_HINTS[name] for name in missing if name in _HINTS)
        raise DataError("none", f"{options} for the method {method}", hints)


def check_settings(method: str, settings: dict[str, Any]) -> None:
    """Refuse settings of --set that the method does not take.

    Raises:
        DataError: The method or a setting is unknown, a value is of another type, or the setting is an option of its
            own.
    """
    row = spec(method, "build")
    parameters = row.parameters
    try:
        hints = get_type_hints(row.load())
    except (NameError, TypeError):  # annotations that hold for type checkers only: the method checks its own
        hints = {}
    for key, value in settings.items():
        if key in OPTIONS:
            raise DataError(f"--set {key}={value}", f"--{key} FILE, an option of its own")
        if key not in parameters:
            known = [name for name in parameters if name not in OPTIONS]
            raise DataError(f"--set {key}={value}", f"a parameter of {method} after --set: {', '.join(known)}")
        if key in hints and (expected := _misfit(value, hints[key])):
            raise DataError(f"--set {key}={value}", f"{expected} as {key}")


def _misfit(value: Any, hint: Any) -> str:
    """What was expected of a value in words, or "" where it fits or the hint names no type that JSON has."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    expected: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            if value in get_args(kind):
                return ""
            expected += map(str, get_args(kind))
        elif kind in _KINDS:
            if _fits(value, kind):
                return ""
            expected.append(_KINDS[kind])
    return " or ".join(expected)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def feature_weights(text: str) -> dict[int, float]:
    """Parse "12:1.5,40" to {id: weight}; a weight that is not given is 1. Raises DataError."""
    weights: dict[int, float] = {}
    for part in text.split(","):
        name, _, number = part.partition(":")
        try:
            feature, weight = int(name), float(number or 1.0)
        except ValueError as error:
            raise DataError(f"--features {text}", "ids with optional weights, such as 12:1.5,40") from error
        if feature in weights:
            raise DataError(f"--features {text}, which names {feature} twice", "each id once")
        weights[feature] = weight
    return weights
