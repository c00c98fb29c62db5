"""The methods that AxBench compares: a row for each, with how it is made, read and applied.

contestant("reps").objective                                              "reps"
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fgsteer.errors import ArgumentError, DataError
from fgsteer.learning.settings import VectorTraining
from fgsteer.methods import spec

Kind = Literal["none", "prompt", "tokens", "feature", "statistics", "effects", "random", "trained"]
Reads = Literal["projection", "feature", ""]
Strength = Literal["a_max", "own", "unit"]


@dataclass(frozen=True)
class Contestant:
    """One method of the comparison.

    Args:
        name: What the command line and files call it.
        label: What tables call it.
        kind: How it is made: of tokens' activations, of a feature, of contrast statistics, through effects, drawn at
            random, or trained; "none" and "prompt" steer nothing.
        reads: How a token is read for detection: projected on the vector, or by the feature's activation.
        strength: Whether f multiplies ``a_max·v`` ("a_max"), the vector as it was trained at its own factors ("own"),
            or at factors around 1 ("unit").
        space: What is trained, "residual" or "sae".
        published: What the published table calls it, "" where it is not in there.
    """

    name: str
    label: str
    kind: Kind
    reads: Reads = "projection"
    strength: Strength = "a_max"
    space: Literal["residual", "sae"] = "residual"
    published: str = ""

    @property
    def objective(self) -> str:
        """The recipe that it is trained by."""
        return self.name.removesuffix("_sae")

    @property
    def needs_sae(self) -> bool:
        """Whether it takes an SAE."""
        return self.kind in ("feature", "statistics", "effects") or self.space == "sae"

    @property
    def steers(self) -> bool:
        """Whether it has a vector."""
        return self.kind not in ("none", "prompt")


def _trained(name: str, label: str, strength: Strength, published: str = "") -> list[Contestant]:
    return [
        Contestant(name, label, "trained", strength=strength, published=published),
        Contestant(f"{name}_sae", f"{label}, SAE features", "trained", strength=strength, space="sae"),
    ]


_ROWS = (
    Contestant("none", "unsteered", "none", ""),
    Contestant("prompt", "prompt", "prompt", "", published="prompt"),
    Contestant("diffmean", "DiffMean", "tokens", published="DiffMean"),
    Contestant("pca", "PCA", "tokens", published="PCA"),
    Contestant("probe", "linear probe", "tokens", published="probe"),
    Contestant("sae", "SAE feature", "feature", "feature", published="SAE"),
    Contestant("sae_a", "SAE-A (MaxAUC)", "feature", "feature", published="SAE-A"),
    Contestant("fgaa", "FGAA", "statistics"),
    Contestant("sta", "STA", "statistics"),
    Contestant("sae_ts", "SAE-TS", "effects"),
    *_trained("lm", "Lang.", "a_max"),
    *_trained("lm_factors", "Lang. with factors", "own"),
    *_trained("bipo", "BiPO", "unit"),
    *_trained("reps", "RePS", "own", "RePS"),
    *_trained("reft_r1", "ReFT-r1", "a_max", "ReFT-r1"),
    *_trained("simpo", "SimPO", "own"),
    Contestant("random", "random direction", "random"),
)
CONTESTANTS: Mapping[str, Contestant] = {row.name: row for row in _ROWS}


def contestant(name: object) -> Contestant:
    """The row of a name. Raises DataError for one that there is not."""
    if not isinstance(name, str) or name not in CONTESTANTS:
        raise DataError(f"the method {name!r:.60}", f"one of {', '.join(CONTESTANTS)}")
    return CONTESTANTS[name]


def available(*, sae: bool, effects: bool) -> tuple[str, ...]:
    """The methods that can run with what is at hand."""
    rows = (row for row in _ROWS if (sae or not row.needs_sae) and (effects or row.kind != "effects"))
    return tuple(row.name for row in rows)


def recipe(row: Contestant, settings: Mapping[str, Any], seed: int) -> VectorTraining:
    """The training of a trained method, with changes. Raises ArgumentError, DataError for settings it does not have."""
    own = {key: value for key, value in settings.items() if key != "features" or row.space != "sae"}
    return VectorTraining.recipe(row.objective, **{"seed": seed, **own})


def check_settings(settings: Any) -> None:
    """Check the settings of all methods. Raises ArgumentError, DataError."""
    if not isinstance(settings, Mapping) or not all(isinstance(value, Mapping) for value in settings.values()):
        raise ArgumentError("settings that are no dictionaries by method", 'such as {"reps": {"epochs": 6}}')
    for name, keywords in settings.items():
        row = contestant(name)
        if row.kind == "trained":
            recipe(row, keywords, 0)
            continue
        known: set[str] = {"ridge"} if name == "probe" else set()
        if row.kind in ("statistics", "effects"):
            parameters = inspect.signature(spec(name).load()).parameters.values()
            known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if unknown := [key for key in keywords if key not in known]:
            raise ArgumentError(
                f"the setting {unknown[0]!r:.60} of {name}", f"one of {', '.join(sorted(known))}" if known else "none"
            )
