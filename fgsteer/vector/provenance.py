"""Provenance as vectors and their files hold it: how it is read; ``fgsteer.methods.provenance`` writes it.

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
