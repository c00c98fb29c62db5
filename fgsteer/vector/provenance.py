"""What a vector remembers of how it was made: method, hyperparameters, model, SAE, data, and facts on its features.

model_name({"method": "caa", "model": {"name": "gpt2"}}) == "gpt2"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FEATURE_FACTS = ("feature_density", "feature_labels")  # what a provenance may hold by feature id


def part_of(provenance: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part of a provenance, such as "model" or "sae"; empty where a file holds something else there."""
    value = provenance.get(key)
    return value if isinstance(value, Mapping) else {}


def model_name(provenance: Mapping[str, Any]) -> str:
    """The name of the model that a vector was made for, "" where it is not known."""
    return part_of(provenance, "model").get("name") or ""


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


def parse_provenance(value: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance from a file, with its numbers as floats. Raises TypeError, ValueError, OverflowError."""
    provenance, model = dict(value), value.get("model")
    if isinstance(model, Mapping) and not isinstance(model.get("name"), str | None):
        raise ValueError(f"model {model!r:.80}")
    if "scale" in provenance:
        provenance["scale"] = float(provenance["scale"])
    if "feature_density" in provenance:
        provenance["feature_density"] = {str(j): float(share) for j, share in provenance["feature_density"].items()}
    if "feature_labels" in provenance:
        provenance["feature_labels"] = {str(j): str(label) for j, label in provenance["feature_labels"].items()}
    return provenance
