"""One check that density, excerpts and effects are used with the SAE that they were measured on."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from fgsteer.errors import PairingError


@runtime_checkable
class Identified(Protocol):
    """The properties of an SAE that the check needs."""

    @property
    def sha256(self) -> str:
        """Hash of its weights."""

    @property
    def d_sae(self) -> int:
        """Number of its features."""

    @property
    def source(self) -> str:
        """Where it was loaded from."""


def check_measured_on(sae: Identified, sha256: str, fits: bool, what: str, command: str) -> None:
    """Refuse what was measured on another SAE.

    Args:
        sae: The SAE that it is to be used with.
        sha256: Hash of the SAE that it was measured on.
        fits: Whether its shapes are those of ``sae``.
        what: What was measured, for the message: ``density``, ``excerpts``, ``effects``.
        command: The command that measures it again.

    Raises:
        PairingError: The hashes differ, or the shapes do not fit.
    """
    if sha256 != sae.sha256 or not fits:
        raise PairingError(
            f"{what} measured on the SAE {sha256[:12]}",
            f"{what} of the SAE {sae.sha256[:12]}{f' ({sae.source})' if sae.source else ''}",
            f"measure again with {command}, or load the SAE that was measured",
        )
