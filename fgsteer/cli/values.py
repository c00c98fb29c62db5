"""Checks and meanings of the values of options, before a model is loaded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from fgsteer.activations.token_rules import TOKEN_RULES
from fgsteer.cli.printing import say
from fgsteer.errors import DataError
from fgsteer.interventions.scopes import RENAMED_SCOPES
from fgsteer.storage.targets import file_target, folder_target, new_folder_target


def writable(path: Path | None) -> Path | None:
    """The path, if a file can be written there. Raises FormatError."""
    if path is not None:
        file_target(path)
    return path


def traced_to(path: Path | None) -> Path | None:
    """The path, if a trace can be written there. Raises FormatError."""
    from fgsteer.traces.results import check_trace_name

    if path is not None:
        check_trace_name(path)
    return writable(path)


def whole_numbers(text: str, option: str) -> list[int]:
    """The numbers of an option, such as 12,40; none of an empty one. Raises DataError."""
    if not re.fullmatch(r"(\d{1,9}(,|$))*", text):
        raise DataError(
            f"{option} {text:.100}", f"whole numbers with commas between them after {option}, such as 12,40"
        )
    return [int(number) for number in text.split(",") if number]


def unused(path: Path) -> Path:
    """The path, if a new folder can be written there. Raises FormatError."""
    new_folder_target(path)
    return path


def fillable(path: Path | None) -> Path | None:
    """The path, if it is a folder that can be written to or made. Raises FormatError."""
    if path is not None:
        folder_target(path)
    return path


def finite(option: typer.CallbackParam, value: Any) -> Any:
    """The number or numbers of an option. Raises BadParameter for nan and inf."""
    if value is None and getattr(option, "multiple", False):
        return []  # typer turns this into None again; its oldest version cannot handle None here
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
    return value


def present_scope(value: str | None) -> str | None:
    """The scope by its present name; a note says so of an earlier one."""
    if value not in RENAMED_SCOPES:
        return value
    say(f"note: --scope {value} is now called {RENAMED_SCOPES[value]}.", err=True)
    return RENAMED_SCOPES[value]


def seed_in_range(value: int | None) -> int | None:
    """The seed. Raises BadParameter for one that torch does not take."""
    if value is not None and not -(2**63) <= value < 2**63:
        raise typer.BadParameter(f"{value} is not in the range from -2^63 to 2^63 - 1")
    return value


def check_unicode(*texts: str | None) -> None:
    """Raises DataError for a text with bytes that the terminal's encoding has no characters for."""
    from fgsteer.data.chat import check_text

    for text in texts:
        if text is not None:
            check_text(text, "a text on the command line", empty=True)


def token_rule(tokens: str) -> Any:
    """Parse --tokens, which is a word or an index. Raises DataError."""
    if re.fullmatch(r"-?\d{1,9}", tokens):
        return int(tokens)
    if tokens not in TOKEN_RULES:
        raise DataError(f"--tokens {tokens:.100}", f"{', '.join(TOKEN_RULES)}, or an index such as -1, after --tokens")
    return tokens


def hookpoints(names: Iterable[str] | None) -> list[Any] | None:
    """Parse --hookpoint: names, or numbers of blocks. Raises HookpointError for a name that is not a hookpoint's."""
    from fgsteer.models.hookpoints import Hookpoint

    return None if names is None else [Hookpoint.parse(int(n) if re.fullmatch(r"\d{1,9}", n) else n) for n in names]


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Parse key=value pairs: JSON where it parses, "inf" as a number, else the text itself. Raises DataError."""
    from fgsteer.storage.json_files import parse_json

    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise DataError(f"--set {pair:.80}", "a name, = and a value after --set, such as --set n_positive=8")
        try:
            settings[key] = parse_json(value)
        except json.JSONDecodeError:
            settings[key] = math.inf if value == "inf" else value
        except ValueError as error:
            reason = str(error).rstrip(".")
            raise DataError(
                f"--set {pair:.80} cannot be read: {reason}.", "a name, = and a value, such as --set n_positive=8"
            ) from error
    return settings
