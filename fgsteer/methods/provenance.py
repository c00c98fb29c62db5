"""The provenance that methods write into the vectors that they build; ``fgsteer.vector`` reads and keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fgsteer.storage.version import library_version

if TYPE_CHECKING:
    from fgsteer.saes.sae import SAE
    from fgsteer.statistics.contrast import ContrastStatistics


def provenance(
    method: str,
    settings: Mapping[str, Any],
    stats: ContrastStatistics | None = None,
    sae: SAE | None = None,
    features: Iterable[int] = (),
) -> dict[str, Any]:
    """Record method, settings, model, SAE, data and version as plain JSON, with the densities of the features."""
    record: dict[str, Any] = {"method": method, "hyperparameters": dict(settings), "version": library_version()}
    if stats is not None:
        record["model"] = stats.reading.get("model")
        record["reading"] = {key: stats.reading.get(key) for key in ("tokens", "bos", "prepend_bos", "max_tokens")}
        record["data"] = [dict(entry) for entry in stats.data]
        if "transfer" in stats.reading:  # the map that brought them from another model
            record["transfer"] = stats.reading["transfer"]
    if sae is not None:
        record["sae"] = {"source": sae.source, "sha256": sae.sha256, "d_sae": sae.d_sae}
        record.setdefault("model", {"name": sae.model_name, "d_model": sae.d_model})
        ids = list(features)
        if sae.density is not None:
            shares = sae.density.density
            record["feature_density"] = {str(j): float(shares[j]) for j in ids}
        if labels := {str(j): sae.labels[j] for j in ids if j in sae.labels}:
            record["feature_labels"] = labels
    return record
