"""The hash of an effect approximator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fgsteer.storage.json_files import text_sha256

if TYPE_CHECKING:
    from fgsteer.effects.approximator import EffectApproximator

from fgsteer.models.fingerprints import stored_sha256


def effects_sha256(effects: EffectApproximator) -> str:
    """Hash of an effect approximator."""
    return text_sha256([stored_sha256(effects.M), stored_sha256(effects.b), str(effects.hookpoint)])
