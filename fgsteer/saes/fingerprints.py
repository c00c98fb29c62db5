"""Fingerprints of SAEs and densities, for the plans of resumable runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fgsteer.models.fingerprints import stored_sha256
from fgsteer.storage.json_files import text_sha256

if TYPE_CHECKING:
    from fgsteer.saes.density import FeatureDensity
    from fgsteer.saes.sae import SAE


def sae_identity(sae: SAE | None) -> dict[str, Any] | None:
    """Return what an SAE computes with: its tensors, how it activates, reads and writes; not its density."""
    if sae is None:
        return None
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "gate_bias", "gate_scale", "W_skip")
    tensors = {name: stored_sha256(tensor) for name in names if (tensor := getattr(sae, name)) is not None}
    settings = {name: getattr(sae, name) for name in ("activation", "k", "input_norm", "prepend_bos")}
    places = {"hookpoint": str(sae.hookpoint), "reads": str(sae.input_hookpoint)}
    return {"sha256": text_sha256(tensors), **settings, **places}


def density_sha256(density: FeatureDensity | None) -> str | None:
    """Hash what the filters of features read."""
    if density is None:
        return None
    counts = [stored_sha256(getattr(density, name)) for name in ("fired", "documents", "first")]
    return text_sha256([*counts, density.tokens, density.max_density])
