"""The arithmetic of steering vectors: factors, and the features and provenance of a sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fgsteer.errors import ArgumentError
from fgsteer.errors.checks import describe_value, is_number
from fgsteer.interventions.values import finite_number
from fgsteer.vector.provenance import FEATURE_FACTS, part_of


def finite_factor(value: object, what: str) -> float:
    """The value as a finite float.

    Raises ArgumentError for a value that is no number, and for a tensor that requires grad; SteeringError for a number
    that is not finite.
    """
    trained = getattr(value, "requires_grad", False)
    if is_number(value) and not trained:
        return finite_number("a factor", value)  # type: ignore[arg-type]
    raise ArgumentError(
        f"a vector {what} {describe_value(value)}",
        "a finite number",
        "a strength that is trained is a coefficient: write vector.add(c)" if trained else "",
    )


def not_a_vector(value: object) -> ArgumentError:
    """Make the error of a vector that is added to, or subtracted from, something else."""
    return ArgumentError(
        f"a vector and {describe_value(value)}",
        "two vectors to add or subtract",
        "for strength, write vector.add(2.0)",
    )


def sum_features(first: Mapping[int, float], second: Mapping[int, float], sign: float) -> dict[int, float]:
    """The weights of ``first + sign · second``, by feature id."""
    features = dict(first)
    for feature, weight in second.items():
        features[feature] = features.get(feature, 0.0) + sign * weight
    return features


def same_sae(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two vectors were made with the same SAE, or both without one."""
    return part_of(first, "sae").get("sha256") == part_of(second, "sae").get("sha256")


def sum_provenance(
    first: Mapping[str, Any], second: Mapping[str, Any], sign: float, *, with_features: bool
) -> dict[str, Any]:
    """The provenance of ``first + sign · second``: what both share, and the terms of the sum.

    Facts on features are kept where the sum has features, which are then of one SAE.
    """
    shared = {key: first[key] for key in ("model", "sae") if first.get(key) and first[key] == second.get(key)}
    for key in FEATURE_FACTS if with_features else ():
        facts = {**(second.get(key) or {}), **(first.get(key) or {})}
        shared |= {key: facts} if facts else {}
    return {**shared, "method": "sum", "terms": [*_terms(first, 1.0), *_terms(second, sign)]}


def _terms(provenance: Mapping[str, Any], sign: float) -> list[dict[str, Any]]:
    """What a sum remembers of one vector: its provenance with a sign or, of a sum, its terms."""
    terms = provenance.get("terms")
    if provenance.get("method") != "sum" or "scale" in provenance or not isinstance(terms, list):
        return [{**provenance, "sign": sign}]
    return [{**term, "sign": sign * term.get("sign", 1.0)} for term in terms]
