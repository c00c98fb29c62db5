"""Strengths on the command line: a coefficient for each vector, several of them to compare, or one found by its cost.

given_strengths(["1,2,4"], ["v.safetensors"], "add", None) == [(1.0,), (2.0,), (4.0,)]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fgsteer.errors import DataError
from fgsteer.errors.wording import count

DEFAULT_COST = 0.3
"""Nats per token at which a vector is found to steer clearly while the text stays fluent."""
SEARCHED = ("add", "add_relative", "add_keeping_norm", "adaptive_add", "affine")
"""The operations whose strength has a cost to find it by: at strength 0 they do nothing, or little."""


def given_strengths(
    coefficients: Sequence[str], vectors: Sequence[Any], operation: str, cost: float | None
) -> list[tuple[float, ...]]:
    """The strengths that are to be shown, each with a coefficient for each vector; none where one is to be found.

    Raises DataError for numbers that cannot be read or matched to vectors, and where nothing can be found.
    """
    strengths = parse_coefficients(coefficients, len(vectors))
    if cost is not None:
        _check_cost(cost, len(vectors), bool(strengths), operation)
    if len(strengths) > 1 and operation == "ablate":
        raise DataError(f"several strengths with --op {operation}", "no -c", f"{operation} has no strength")
    if strengths or not vectors:
        return strengths
    if operation not in SEARCHED:
        return [(1.0,) * len(vectors)]
    if len(vectors) > 1:
        raise DataError(
            f"{count(len(vectors), 'vector')} without coefficients",
            "one -c for each of several vectors",
            "how they share a cost is not clear: run the command with each of them alone, which finds its coefficient",
        )
    return []


def parse_coefficients(texts: Sequence[str], vectors: int) -> list[tuple[float, ...]]:
    """Parse -c, which stands once for each vector; one of them may list several coefficients, to be shown in turn.

    Raises DataError.
    """
    lists = [_numbers(text) for text in texts]
    if lists and len(lists) != vectors:
        change = "give -c as often as vectors are given"
        if vectors == 1:
            change = f"to compare strengths of one vector, put commas between them: -c {','.join(texts)}"
        raise DataError(
            f"{count(len(lists), 'coefficient')} for {count(vectors, 'vector')}",
            "one coefficient for each vector, in the same order",
            change,
        )
    if sum(len(numbers) > 1 for numbers in lists) > 1:
        raise DataError(
            f"several coefficients for several vectors: -c {' -c '.join(texts)}",
            "several coefficients for one vector at most",
            "which of them belong together is not clear: run the command once for each combination",
        )
    longest = max(map(len, lists), default=0)
    return [tuple(numbers[min(n, len(numbers) - 1)] for numbers in lists) for n in range(longest)]


def _numbers(text: str) -> list[float]:
    """The numbers of one -c. Raises DataError for what is no finite number."""
    numbers = []
    for part in text.split(","):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise DataError(f"-c {text:.80}", "a finite number, or several with commas between them, after -c")
        numbers.append(number)
    return numbers


def _check_cost(cost: float, vectors: int, given: bool, operation: str) -> None:
    """Raises DataError for a --cost that finds nothing."""
    if given:
        raise DataError("both --cost and -c", "one of them", "--cost finds what -c says")
    if not vectors:
        raise DataError("--cost without a vector", "a vector whose strength is found", "name it with -v")
    if operation not in SEARCHED:
        raise DataError(
            f"--cost with --op {operation}",
            f"--op {' or '.join(SEARCHED)}",
            "give the strength with -c, if there is one",
        )
    if cost <= 0:
        raise DataError(f"--cost {cost:g}", "nats per token above 0", f"the default is {DEFAULT_COST}")


def describe_strength(strength: Mapping[str, float]) -> str:
    """A strength in words: the option that gives it, its cost, and its size."""
    return (
        f"-c {strength['coefficient']:g} costs neutral text {strength['cost']:.2f} nats a token, "
        f"and is {strength['relative_norm']:.2g} of the activations' norm"
    )
