"""Steering vectors: a direction at a hookpoint, what it is made of, and where it came from.

A vector says nothing of strength; ``.add``, ``.affine``, ``.ablate`` and ``.clamp`` give
the interventions that apply it. Vectors at one hookpoint add, subtract and scale:
``(a + b) / 2``, ``-a``, ``sum([a, b, c])``.

    vec.save("wedding.safetensors")
    with steer(model, SteeringVector.load("wedding.safetensors").add(8.0)): ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.errors import ArgumentError, PairingError, SelectionError, SteeringError
from fgsteer.errors.checks import checked, describe_value, is_number, is_whole_number
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.reprs import MAX_SHOWN_ENTRIES, MAX_TEXT_CHARACTERS
from fgsteer.errors.wording import a, count
from fgsteer.interventions import Ablate, Add, Affine, Clamp, Scalar, finite_number, finite_vector
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors

FILE_NAME = "vector.safetensors"  # of the vector in a folder or a repository


class MeasuredRun(Protocol):
    """A run of ``bench`` read back, as ``load_run`` gives it: what a card tells of how a vector did."""

    @property
    def header(self) -> Mapping[str, Any]:
        """What the run was made of."""

    @property
    def settings(self) -> Sequence[Any]:
        """Every setting once."""

    def mean(self, setting: Any, half: str = ..., measure: str = ...) -> float:
        """Mean of a measure over the texts of a setting."""


@dataclass(frozen=True)
class FeatureWeight:
    """One feature of a vector: its id, its weight (activation units), and what is known of it."""

    id: int
    weight: float
    density: float | None = None


@dataclass(frozen=True, eq=False)
class SteeringVector:
    """``direction (d_model,)`` at a hookpoint, with the features it was decoded from.

    ``reference (d_model,)`` is the mean that ``affine`` starts from, where the method kept
    one; ``features`` maps feature ids to their weights; ``provenance`` records method,
    hyperparameters, model, SAE and data. Constructs from a bare tensor and a hookpoint
    or its name. A tensor that requires grad stays the caller's own, to be trained through the
    interventions; files hold its values of when they were written. Raises PairingError for a
    tensor that is not one finite vector.
    """

    direction: Float[Tensor, " d_model"]
    hookpoint: Hookpoint
    reference: Float[Tensor, " d_model"] | None = None
    features: Mapping[int, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        object.__setattr__(self, "direction", finite_vector("direction", self.direction))
        if not all(map(is_whole_number, self.features)):
            raise SelectionError(f"features {', '.join(map(repr, self.features)):.80}", "whole numbers as feature ids")
        if self.reference is not None:
            object.__setattr__(self, "reference", finite_vector("reference", self.reference))
            if self.reference.shape != self.direction.shape:
                raise PairingError(
                    f"a reference of width {len(self.reference)}", f"{len(self.direction)}, the direction's"
                )

    @property
    def d_model(self) -> int:
        """Width of the direction."""
        return self.direction.shape[0]

    @property
    def norm(self) -> float:
        """Euclidean norm of the direction, in residual-stream units."""
        return float(self.direction.detach().norm())

    def add(self, coefficient: Scalar = 1.0, **scope: Any) -> Add:
        """``h + c·v``; keywords ``scope`` and ``bos`` as in Intervention."""
        return Add(direction=self.direction, coefficient=coefficient, **self._place, **scope)

    def ablate(self, **scope: Any) -> Ablate:
        """``h − (v̂·h) v̂``. Raises SteeringError for a zero direction."""
        return Ablate(direction=self.direction, **self._place, **scope)

    def clamp(self, target: Scalar, **scope: Any) -> Clamp:
        """``h + (t − v̂·h) v̂``; target in residual-stream units along v̂."""
        return Clamp(direction=self.direction, target=target, **self._place, **scope)

    def affine(self, alpha: Scalar = 1.0, **scope: Any) -> Affine:
        """ACE: ``r̂·h' = r̂·r⁻ + α‖r‖`` (arXiv 2411.09003). Raises SteeringError without a reference."""
        if self.reference is None:
            raise SteeringError(
                f"{a(self.provenance.get('method', 'bare'))} vector without a reference",
                "one that keeps the negative mean",
                "build it with ace(), or use clamp(target)",
            )
        return Affine(direction=self.direction, reference=self.reference, alpha=alpha, **self._place, **scope)

    @property
    def _place(self) -> dict[str, Any]:
        made = self.provenance.get("model")
        return {
            "hookpoint": self.hookpoint,
            "model_name": (made.get("name") or "") if isinstance(made, Mapping) else "",
            "method": str(self.provenance.get("method") or ""),
        }

    def __repr__(self) -> str:
        method = escape_text(str(self.provenance.get("method", "bare")), keep="")[:MAX_TEXT_CHARACTERS]
        top = ", ".join(f"{feature.id}: {feature.weight:.3g}" for feature in self.top_features(MAX_SHOWN_ENTRIES))
        more = ", …" if len(self.features) > MAX_SHOWN_ENTRIES else ""
        features = f"{count(len(self.features), 'feature')}{f' {{{top}{more}}}' if top else ''}"
        return f"SteeringVector({method} at {self.hookpoint}, d_model {self.d_model}, norm {self.norm:.4g}, {features})"

    def unit(self) -> SteeringVector:
        """The vector scaled to norm 1. Raises SelectionError for a direction whose norm is 0, or beyond float32."""
        if not 0 < self.norm < math.inf:
            raise SelectionError(f"a direction of norm {self.norm:g}", "one that can be normalised")
        return self * (1 / self.norm)

    __array_ufunc__ = None  # numpy's numbers and arrays leave arithmetic with a vector to the vector

    def __mul__(self, factor: float) -> SteeringVector:
        factor = _factor(factor, "times")
        return replace(
            self,
            direction=self.direction * factor,
            features={j: w * factor for j, w in self.features.items()},
            provenance={**self.provenance, "scale": self.provenance.get("scale", 1.0) * factor},
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        divisor = _factor(divisor, "divided by")
        if not divisor:
            raise ArgumentError(f"a vector divided by {describe_value(divisor)}", "a number other than 0")
        return self * (1 / divisor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._plus(other, 1.0)

    def __radd__(self, other: object) -> SteeringVector:
        if is_number(other) and not other:  # what sum() starts from
            return self
        raise ArgumentError(f"a vector added to {describe_value(other)}", "two vectors")

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._plus(other, -1.0)

    def _plus(self, other: SteeringVector, sign: float) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            raise ArgumentError(
                f"a vector and {describe_value(other)}",
                "two vectors to add or subtract",
                "for strength write vector.add(2.0)",
            )
        if (self.hookpoint, self.d_model) != (other.hookpoint, other.d_model):
            raise PairingError(
                f"vectors at {self.hookpoint} (d_model {self.d_model}) and {other.hookpoint} (d_model {other.d_model})",
                "one hookpoint",
                "steer with both interventions in a list instead",
            )
        features = dict(self.features) if self._sae_sha256 == other._sae_sha256 else {}
        for feature, weight in other.features.items() if self._sae_sha256 == other._sae_sha256 else ():
            features[feature] = features.get(feature, 0.0) + sign * weight
        kept = {key: self.provenance.get(key) for key in ("model", "sae")}
        shared = {key: value for key, value in kept.items() if value and value == other.provenance.get(key)}
        return SteeringVector(
            self.direction + sign * other.direction,
            self.hookpoint,
            features=features,
            provenance={**shared, "method": "sum", "terms": [*self._terms(1.0), *other._terms(sign)]},
        )

    def _terms(self, sign: float) -> list[dict[str, Any]]:
        """What a sum remembers of this vector: its provenance with a sign, or the terms of a sum."""
        terms = self.provenance.get("terms")
        if self.provenance.get("method") != "sum" or "scale" in self.provenance or not isinstance(terms, list):
            return [{**self.provenance, "sign": sign}]
        return [{**term, "sign": sign * term.get("sign", 1.0)} for term in terms]

    @property
    def _sae_sha256(self) -> str | None:
        sae = self.provenance.get("sae")
        return sae.get("sha256") if isinstance(sae, Mapping) else None

    @checked
    def top_features(self, n: int = 20) -> list[FeatureWeight]:
        """The n features of largest absolute weight, largest first, with density where known."""
        density = self.provenance.get("feature_density") or {}
        order = sorted(self.features.items(), key=lambda item: (-abs(item[1]), item[0]))
        return [FeatureWeight(j, w, density.get(str(j))) for j, w in order[:n]]

    @checked
    def check(self, model: nn.Module) -> None:
        """Refuse a model of another width, warn by name about another model.

        Raises PairingError or HookpointError; warns PairingWarning.
        """
        check_pairing(model, self.hookpoint, self.d_model, self._place["model_name"], "vector")

    def save(self, path: str | Path) -> None:
        """Write as safetensors with a JSON header, whole."""
        tensors = {"direction": self.direction}
        if self.reference is not None:
            tensors["reference"] = self.reference
        header = {
            "hookpoint": str(self.hookpoint),
            "features": {str(j): float(w) for j, w in self.features.items()},
            "provenance": dict(self.provenance),
        }
        write_tensors(path, tensors, kind="vector", header=header)

    def save_pretrained(self, folder: str | Path, *, run: MeasuredRun | None = None, method: str | None = None) -> None:
        """Write a new folder: the vector, a card, and its BCS curve in a ``run`` of bench.

        ``method`` is what the run calls it, by default what made it; that the run's vectors were made with the
        same settings is for the caller to know. Raises DataError for a run without it, FormatError for a folder
        that is not free.
        """
        from fgsteer.hub import save_folder

        save_folder(self, folder, run, method)

    def push_to_hub(
        self, repo_id: str, *, run: MeasuredRun | None = None, method: str | None = None, **options: Any
    ) -> str:
        """Upload what ``save_pretrained`` writes to a Hugging Face repository, as one commit; its address.

        ``options``: ``private`` and ``token``, and what ``HfApi.upload_folder`` takes, such as
        ``revision`` and ``commit_message``. Raises as ``save_pretrained`` does, FormatError where the hub refuses.
        """
        from fgsteer.hub import push

        return push(self, repo_id, run, method, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        model: nn.Module | None = None,
        *,
        filename: str = FILE_NAME,
        revision: str | None = None,
        token: str | None = None,
    ) -> SteeringVector:
        """Read a vector from a Hugging Face repository or a folder; given a model, ``check`` it.

        Raises FormatError, PairingError.
        """
        from fgsteer.hub import fetch

        return cls.load(fetch(source, filename, revision, token), model)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> SteeringVector:
        """Read a file that ``save`` wrote; given a model, ``check`` it. Raises FormatError, PairingError."""
        tensors, header = read_tensors(path, kind="vector")
        with refuse_damaged(path, "a file written by SteeringVector.save"):
            vector = cls(
                tensors["direction"],
                Hookpoint.from_name(header["hookpoint"]),
                tensors.get("reference"),
                {int(j): float(w) for j, w in header["features"].items()},
                _read_provenance(header["provenance"]),
            )
        if model is not None:
            vector.check(model)
        return vector


def _factor(value: object, what: str) -> float:
    """A finite float. Raises SteeringError, or ArgumentError, also for what is trained, which no vector keeps."""
    trained = getattr(value, "requires_grad", False)
    if is_number(value) and not trained:
        return finite_number("a factor", value)  # type: ignore[arg-type]
    change = "a strength that is trained is a coefficient: vector.add(c)" if trained else ""
    raise ArgumentError(f"a vector {what} {describe_value(value)}", "a finite number", change)


def _read_provenance(value: Mapping[str, Any]) -> dict[str, Any]:
    """Provenance, in which what is computed with is of its kind. Raises TypeError, ValueError, OverflowError."""
    found, model = dict(value), value.get("model")
    if isinstance(model, Mapping) and not isinstance(model.get("name"), str | None):
        raise ValueError(f"model {model!r:.80}")
    if "scale" in found:
        found["scale"] = float(found["scale"])
    if "feature_density" in found:
        found["feature_density"] = {str(j): float(share) for j, share in found["feature_density"].items()}
    return found
