"""Steering vectors: a direction at a hookpoint, its interventions, its arithmetic and its files.

A vector has no coefficient of its own: ``.add``, ``.affine``, ``.ablate`` and ``.clamp`` give the interventions that
apply it. Vectors at one hookpoint add, subtract and scale: ``(a + b) / 2``, ``-a``, ``sum([a, b, c])``.

    vec.save("wedding.safetensors")
    with steer(model, SteeringVector.load("wedding.safetensors").add(8.0)): ...
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.display.tables import Cell, Table, facts_html
from fgsteer.errors import ArgumentError, PairingError, SelectionError, SteeringError
from fgsteer.errors.checks import checked, describe_value, is_number, is_whole_number
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.reprs import MAX_SHOWN_ENTRIES, MAX_TEXT_CHARACTERS
from fgsteer.errors.wording import count
from fgsteer.interventions.values import Scalar, check_equal_width, finite_scalar, finite_vector
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors
from fgsteer.vector.applied import Applied
from fgsteer.vector.arithmetic import finite_factor, not_a_vector, same_sae, sum_features, sum_provenance
from fgsteer.vector.feature_weight import FeatureWeight
from fgsteer.vector.measured_run import MeasuredRun
from fgsteer.vector.provenance import FEATURE_FACTS, model_name, parse_provenance

FILE_NAME = "vector.safetensors"  # the name of a vector's file in a folder or a repository
TOP_FEATURES = 10  # features that a notebook shows of a vector


@dataclass(frozen=True, eq=False, init=False)
class SteeringVector(Applied):
    """A direction at a hookpoint, with the features it was decoded from.

    A direction or reference that requires grad stays the caller's own, to be trained through the interventions; files
    hold the values that it had when they were written.

    Args:
        direction: The direction, (d_model,).
        hookpoint: Where it acts: a Hookpoint, its name ("blocks.6.hook_resid_post"), or a layer.
        reference: The mean activation that ``affine`` starts from, (d_model,), where the method kept one.
        read: The vector a, (d_model,), of a strength that depends on the token: ``adaptive_add`` adds the direction
            ``relu(a·h + b)`` times.
        bias: The number b of that strength.
        features: {feature id: weight}, the features that the direction was decoded from.
        provenance: How it was made: method, hyperparameters, model, SAE and data.

    Raises:
        PairingError: The direction is not one floating-point vector, or the reference or read is not as wide.
        SteeringError: A vector or the bias is not finite.
        SelectionError: A feature id is no whole number.
        HookpointError: The hookpoint cannot be parsed.
    """

    direction: Float[Tensor, " d_model"]
    hookpoint: Hookpoint
    reference: Float[Tensor, " d_model"] | None
    features: Mapping[int, float]
    provenance: Mapping[str, Any]
    read: Float[Tensor, " d_model"] | None
    bias: Scalar

    def __init__(
        self,
        direction: Tensor,
        hookpoint: Hookpoint | str | int,
        reference: Tensor | None = None,
        features: Mapping[int, float] | None = None,
        provenance: Mapping[str, Any] | None = None,
        read: Tensor | None = None,
        bias: Scalar = 0.0,
    ) -> None:
        features = {} if features is None else features
        if not all(map(is_whole_number, features)):
            raise SelectionError(
                f"{', '.join(map(repr, features)):.80}",
                "whole numbers as feature ids",
                "the features of a vector are {feature id: weight}",
            )
        values: dict[str, Any] = {
            "hookpoint": Hookpoint.parse(hookpoint),
            "direction": finite_vector("direction", direction),
            "reference": None if reference is None else finite_vector("reference", reference),
            "features": features,
            "provenance": {} if provenance is None else provenance,
            "read": None if read is None else finite_vector("read", read),
            "bias": finite_scalar("bias", bias),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.read is None and not (isinstance(bias, int | float) and bias == 0):
            raise SteeringError(f"bias = {bias!r:.40} without read", "both, or neither", "pass read= too")
        for name in ("reference", "read"):
            if (vector := getattr(self, name)) is not None:
                check_equal_width(name, vector, self.direction)

    @property
    def d_model(self) -> int:
        """The width of the direction."""
        return self.direction.shape[0]

    @property
    def norm(self) -> float:
        """The Euclidean norm of the direction, in units of the residual stream."""
        return float(self.direction.detach().norm())

    def __repr__(self) -> str:
        method = escape_text(str(self.provenance.get("method", "bare")), keep="")[:MAX_TEXT_CHARACTERS]
        top = ", ".join(f"{feature.id}: {feature.weight:.3g}" for feature in self.top_features(MAX_SHOWN_ENTRIES))
        more = ", …" if len(self.features) > MAX_SHOWN_ENTRIES else ""
        features = f"{count(len(self.features), 'feature')}{f' {{{top}{more}}}' if top else ''}"
        return f"SteeringVector({method} at {self.hookpoint}, d_model {self.d_model}, norm {self.norm:.4g}, {features})"

    def _repr_html_(self) -> str:
        facts: dict[str, Cell] = {
            "method": str(self.provenance.get("method", "")),
            "model": model_name(self.provenance),
            "hookpoint": str(self.hookpoint),
            "d_model": self.d_model,
            "norm": self.norm,
            "features": len(self.features),
        }
        top = self.top_features(TOP_FEATURES)
        more = len(self.features) - len(top)
        below = f"<p>and {more:,} features of smaller weight</p>" if more else ""
        return facts_html("SteeringVector", facts) + (f"{top._repr_html_()}{below}" if top else "")

    def unit(self) -> SteeringVector:
        """The vector scaled to norm 1. Raises SelectionError for a direction whose norm is 0, or beyond float32."""
        if not 0 < self.norm < math.inf:
            raise SelectionError(
                f"a direction of norm {self.norm:g}",
                "a direction that can be scaled to norm 1",
                "check what the vector was made of: equal positives and negatives give a zero vector",
            )
        return self * (1 / self.norm)

    __array_ufunc__ = None  # tells numpy's numbers and arrays to leave arithmetic with a vector to the vector

    def __mul__(self, factor: float) -> SteeringVector:
        factor = finite_factor(factor, "times")
        return replace(
            self,
            direction=self.direction * factor,
            features={j: w * factor for j, w in self.features.items()},
            provenance={**self.provenance, "scale": self.provenance.get("scale", 1.0) * factor},
        )

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> SteeringVector:
        divisor = finite_factor(divisor, "divided by")
        if not divisor:
            raise ArgumentError(f"a vector divided by {describe_value(divisor)}", "a divisor other than 0")
        return self * (1 / divisor)

    def __neg__(self) -> SteeringVector:
        return self * -1.0

    def __add__(self, other: SteeringVector) -> SteeringVector:
        return self._plus(other, 1.0)

    def __radd__(self, other: object) -> SteeringVector:
        if is_number(other) and not other:  # what sum() starts from
            return self
        raise not_a_vector(other)

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        return self._plus(other, -1.0)

    def _plus(self, other: SteeringVector, sign: float) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            raise not_a_vector(other)
        if (self.hookpoint, self.d_model) != (other.hookpoint, other.d_model):
            raise PairingError(
                f"vectors at {self.hookpoint} (d_model {self.d_model}) and {other.hookpoint} (d_model {other.d_model})",
                "two vectors at one hookpoint",
                "vectors of two places do not add up: steer with both interventions in a list instead",
            )
        features: Mapping[int, float] = {}
        if same_sae(self.provenance, other.provenance):
            features = sum_features(self.features, other.features, sign)
        provenance = sum_provenance(self.provenance, other.provenance, sign, with_features=bool(features))
        return SteeringVector(
            self.direction + sign * other.direction, self.hookpoint, features=features, provenance=provenance
        )

    @checked
    def top_features(self, n: int = 20) -> Table[FeatureWeight]:
        """The features of largest absolute weight, largest first, as a list that shows as a table.

        Density and label are what the SAE had of them when the vector was made.

        Args:
            n: The number of features.
        """
        densities, labels = (self.provenance.get(key) or {} for key in FEATURE_FACTS)
        order = sorted(self.features.items(), key=lambda item: (-abs(item[1]), item[0]))
        return Table(FeatureWeight(j, w, densities.get(str(j)), labels.get(str(j), "")) for j, w in order[:n])

    @checked
    def check(self, model: nn.Module) -> None:
        """Check that the vector fits a model; a model of another name is only warned about.

        Args:
            model: The Hugging Face model that is to be steered.

        Raises:
            PairingError: The model has another width at the vector's hookpoint.
            HookpointError: The model does not have the vector's hookpoint.
        """
        check_pairing(model, self.hookpoint, self.d_model, model_name(self.provenance), "vector")

    def save(self, path: str | Path) -> None:
        """Write the vector to one file: its tensors as safetensors, the rest as JSON in the header.

        Args:
            path: The file to write; one that is there is replaced, and never left half written.

        Raises:
            FormatError: The file cannot be written.
        """
        tensors = {"direction": self.direction}
        tensors |= {name: vector for name in ("reference", "read") if (vector := getattr(self, name)) is not None}
        header: dict[str, Any] = {
            "hookpoint": str(self.hookpoint),
            "features": {str(j): float(w) for j, w in self.features.items()},
            "provenance": dict(self.provenance),
        }
        if self.read is not None:
            header["bias"] = float(torch.as_tensor(self.bias, dtype=torch.float64, device="cpu").detach())
        write_tensors(path, tensors, kind="vector", header=header)

    def save_pretrained(self, folder: str | Path, *, run: MeasuredRun | None = None, method: str | None = None) -> None:
        """Write a new folder with the vector, a model card and, given a ``run`` of bench, the vector's curve in it.

        Args:
            folder: The folder to make.
            run: A run of ``bench``, as ``load_run`` gives it, that measured this vector. Whether its vectors were made
                with the same hyperparameters is for the caller to know.
            method: What the run calls the vector's method; by default what the vector's provenance says.

        Raises:
            DataError: The run did not measure this method at this layer.
            FormatError: The folder is not empty, or cannot be written.
        """
        from fgsteer.hub import save_folder

        save_folder(self, folder, run, method)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: MeasuredRun | None = None,
        method: str | None = None,
        token: str | None = None,
        private: bool | None = None,
        **upload: Any,
    ) -> str:
        """Upload what ``save_pretrained`` writes to a Hugging Face repository, as one commit.

        Args:
            repo_id: The repository, "owner/name"; it is made where it is not there.
            run: As in ``save_pretrained``.
            method: As in ``save_pretrained``.
            token: A token that may write there; by default the one of ``hf auth login``.
            private: Whether a repository that is made is private.
            **upload: What else ``HfApi.upload_folder`` takes, such as ``revision`` and ``commit_message``.

        Returns:
            The address of the commit.

        Raises:
            DataError: The run did not measure this method at this layer.
            FormatError: The hub cannot be reached, or refuses.
        """
        from fgsteer.hub import push

        return push(self, repo_id, run, method, token=token, private=private, **upload)

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
        """Load a vector from a Hugging Face repository or a folder.

        Args:
            source: The repository, "owner/name", or a folder.
            model: The model to be steered, which the vector is checked against.
            filename: The vector's file in it.
            revision: The repository's branch, tag or commit.
            token: A token that may read a private repository; by default the one of ``hf auth login``.

        Raises:
            FormatError: There is no such file, or it is damaged.
            PairingError: The vector does not fit the model.
        """
        from fgsteer.hub import fetch

        return cls.load(fetch(source, filename, revision, token), model)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> SteeringVector:
        """Load a file that ``save`` wrote.

        Args:
            path: The file.
            model: The model to be steered, which the vector is checked against.

        Raises:
            FormatError: The file is missing, damaged, or of another kind.
            PairingError: The vector does not fit the model.
        """
        tensors, header = read_tensors(path, kind="vector")
        with refuse_damaged(path, "a file written by SteeringVector.save"):
            vector = cls(
                tensors["direction"],
                Hookpoint.from_name(header["hookpoint"]),
                tensors.get("reference"),
                {int(j): float(w) for j, w in header["features"].items()},
                parse_provenance(header["provenance"]),
                tensors.get("read"),
                header.get("bias", 0.0),
            )
        if model is not None:
            vector.check(model)
        return vector
