"""Scopes that callers make, and how scopes are parsed.

vec.add(8.0, scope=first(5))
"""

from __future__ import annotations

from collections.abc import Sequence

from fgsteer.errors import SteeringError
from fgsteer.errors.checks import check_range, describe_value, warn
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.scopes import COUNTED, RENAMED_SCOPES, SCOPES, Scope, TokenScope


def first(tokens: int) -> TokenScope:
    """The scope of the first so many tokens of the prompt; a start token counts only with ``bos=True``."""
    check_range("tokens", tokens, 1, MAX_COUNT, whole=True)
    return TokenScope(f"first:{tokens}")


def last(tokens: int) -> TokenScope:
    """The scope of the last so many tokens of the prompt."""
    check_range("tokens", tokens, 1, MAX_COUNT, whole=True)
    return TokenScope(f"last:{tokens}")


def ends(first: int, last: int) -> TokenScope:
    """The scope of the first and the last so many tokens of the prompt, each of them once, as PrOSV steers them.

    A start token counts only with ``bos=True``. The paper is arXiv 2605.05983.
    """
    check_range("first", first, 1, MAX_COUNT, whole=True)
    check_range("last", last, 1, MAX_COUNT, whole=True)
    return TokenScope(f"ends:{first},{last}")


def at(positions: Sequence[int]) -> TokenScope:
    """The scope of the prompt's tokens at these positions, where 0 is its first token, which may be a start token."""
    if not isinstance(positions, list | tuple | range) or not positions:
        raise SteeringError(describe_value(positions), "a list of positions", "pass fg.at([0, 3])")
    for position in positions:
        check_range("a position", position, 0, MAX_COUNT, whole=True)
    return TokenScope(f"at:{','.join(str(position) for position in sorted(set(positions)))}")


def parse_scope(value: object) -> Scope:
    """Return a scope by its present name, with a DeprecationWarning for an earlier one.

    Raises SteeringError for what is no scope.
    """
    if isinstance(value, str) and value in RENAMED_SCOPES:
        present = RENAMED_SCOPES[value]
        warn(f'The scope "{value}" is now called "{present}".', DeprecationWarning)
        return present
    for scope in SCOPES:
        if value == scope:
            return scope
    if isinstance(value, str) and COUNTED.fullmatch(value):
        return TokenScope(value)
    raise SteeringError(
        describe_value(value),
        f"a scope among {', '.join(SCOPES)}, first:N, last:N, ends:N,M, at:N,M",
        "the scope says which tokens are steered; leave it out for all of them",
    )
