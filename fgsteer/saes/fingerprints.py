"""Hashes of what an SAE computes and of its density."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fgsteer.storage.json_files import text_sha256

if TYPE_CHECKING:
    from fgsteer.saes.density import FeatureDensity
    from fgsteer.saes.sae import SAE

from fgsteer.models.fingerprints import stored_sha256


def sae_identity(sae: SAE | None) -> dict[str, Any] | None:
    """What an SAE is: its tensors as they are used, how it activates, reads and writes; its density aside."""
    if sae is None:
        return None
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "gate_bias", "gate_scale", "W_skip")
    tensors = {name: stored_sha256(tensor) for name in names if (tensor := getattr(sae, name)) is not None}
    settings = {name: getattr(sae, name) for name in ("activation", "k", "input_norm", "prepend_bos")}
    places = {"hookpoint": str(sae.hookpoint), "reads": str(sae.input_hookpoint)}
    return {"sha256": text_sha256(tensors), **settings, **places}


def density_sha256(density: FeatureDensity | None) -> str | None:
    """Hash of what filters of features read."""
    if density is None:
        return None
    counts = [stored_sha256(getattr(density, name)) for name in ("fired", "documents", "first")]
    return text_sha256([*counts, density.tokens, density.max_density])
