"""What rules that are built of two statistics need of both.

places = check_places(rejection, harmfulness)
"""

from __future__ import annotations

from fgsteer.errors import PairingError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import ContrastStatistics


def check_places(first: ContrastStatistics, second: ContrastStatistics) -> list[Hookpoint]:
    """The outputs of blocks that both hold, in order. Raises PairingError for other places or widths."""
    places = sorted(at for at in first.residual if at.site == "resid_post")
    if not places or places != sorted(at for at in second.residual if at.site == "resid_post"):
        raise PairingError(
            f"statistics at {len(first.residual)} and {len(second.residual)} hookpoints",
            "two statistics at the outputs of the same blocks",
            "collect both with the same hookpoints=",
        )
    for at in places:
        widths = [len(stats.residual[at].positive.mean) for stats in (first, second)]
        if widths[0] != widths[1]:
            raise PairingError(
                f"statistics of the widths {widths[0]} and {widths[1]}",
                "statistics of one stream, or of two models of one family whose streams are equally wide",
                "collect both with models of one family, or map one model's activations to the other's space",
            )
    return places


def model_name_of(stats: ContrastStatistics) -> str:
    """The name of the model that statistics were read with, "" where it is not known."""
    return str((stats.reading.get("model") or {}).get("name") or "")
