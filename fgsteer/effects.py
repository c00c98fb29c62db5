"""Effect approximators: which features a steering vector will move, as a linear map.

``ŷ = x M + b`` predicts the change of every feature's mean activation in generated text
when ``x`` is added to the residual stream (SAE-TS, arXiv 2411.02193).

    effects = EffectApproximator.fit(vectors, measured, hookpoint=..., sae_sha256=..., ridge=1.0)
    v = effects.project(target)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import FormatError, PairingError, SelectionError
from fgsteer.files import read_tensors, write_tensors
from fgsteer.hookpoints import Hookpoint
from fgsteer.models import DEFAULT, pretrained_dir

if TYPE_CHECKING:
    from fgsteer.sae import SAE


@dataclass(frozen=True, eq=False)
class EffectApproximator:
    """``ŷ = x M + b``: ``M (d_model, d_sae)``, ``b (d_sae,)``, bound to one SAE by its hash.

    Raises PairingError when the shapes do not fit together.
    """

    M: Float[Tensor, "d_model d_sae"]
    b: Float[Tensor, " d_sae"]
    hookpoint: Hookpoint
    sae_sha256: str
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        if self.M.ndim != 2 or self.b.shape != self.M.shape[1:]:
            raise PairingError(f"M {tuple(self.M.shape)} and b {tuple(self.b.shape)}", "(d_model, d_sae) and (d_sae,)")

    @classmethod
    def fit(
        cls,
        vectors: Float[Tensor, "n d_model"],
        effects: Float[Tensor, "n d_sae"],
        *,
        hookpoint: Hookpoint | str,
        sae_sha256: str,
        ridge: float,
    ) -> EffectApproximator:
        """Ridge regression on centred data: ``M = (XᵀX + λI)⁻¹ XᵀY``, ``b = ȳ − x̄ M`` (SAE-TS, METHODS §6).

        ``ridge`` is λ on the scale of the sum XᵀX. Raises PairingError for unequal numbers of rows.
        """
        if len(vectors) != len(effects):
            raise PairingError(f"{len(vectors)} vectors and {len(effects)} effects", "one effect per vector")
        x, y = vectors.double(), effects.double()
        x_mean, y_mean = x.mean(0), y.mean(0)
        xc, yc = x - x_mean, y - y_mean
        gram = xc.T @ xc + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        M = torch.linalg.solve(gram, xc.T @ yc)
        return cls(
            M.float(),
            (y_mean - x_mean @ M).float(),
            Hookpoint.parse(hookpoint),
            sae_sha256,
            {"ridge": ridge, "vectors": len(vectors)},
        )

    def predict(self, vector: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Predicted effect ``x M + b`` (..., d_sae) of a vector (..., d_model)."""
        return vector.to(self.M) @ self.M + self.b

    def project(self, target: Float[Tensor, " d_sae"], *, bias_weight: float = 1.0) -> Float[Tensor, " d_model"]:
        """``M t/‖M t‖ − λ_b · M b/‖M b‖`` (d_model,) for target feature weights t (d_sae,).

        ``bias_weight`` is λ_b; a zero ``M b`` drops its term. SAE-TS (arXiv 2411.02193),
        FGAA step 5 (arXiv 2501.09929). Raises SelectionError when ``M t`` is zero.
        """
        wanted: Tensor = self.M @ target.to(self.M)
        norm = wanted.norm()
        if not norm > 0:
            raise SelectionError("a target whose M t is zero", "at least one feature that the approximator can move")
        always: Tensor = self.M @ self.b
        bias = always / always.norm() if always.norm() > 0 else torch.zeros_like(always)
        direction: Tensor = wanted / norm - bias_weight * bias
        return direction

    def check(self, sae: SAE) -> EffectApproximator:
        """Itself, when measured on this SAE. Raises PairingError."""
        shape, place = (sae.d_model, sae.d_sae), sae.hookpoint
        if self.sae_sha256 != sae.sha256 or tuple(self.M.shape) != shape or self.hookpoint != place:
            raise PairingError(
                f"effects {tuple(self.M.shape)} at {self.hookpoint}, measured on SAE {self.sae_sha256[:12]}",
                f"effects {shape} at {place} of this SAE {sae.sha256[:12]} ({sae.source})",
                "measure effects on this SAE",
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write as safetensors, whole."""
        header = {"hookpoint": str(self.hookpoint), "sae_sha256": self.sae_sha256, "about": self.about}
        write_tensors(path, {"M": self.M, "b": self.b}, kind="effects", header=header)

    @classmethod
    def load(cls, path: str | Path) -> EffectApproximator:
        """Read a file that ``save`` wrote. Raises FormatError."""
        tensors, header = read_tensors(path, kind="effects")
        try:
            return cls(
                tensors["M"].float(),
                tensors["b"].float(),
                Hookpoint.parse(header["hookpoint"]),
                str(header["sae_sha256"]),
                dict(header["about"]),
            )
        except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
            raise FormatError(f"{path} is damaged: {error}", "a file written by EffectApproximator.save") from error


def load_effects(source: str | Path = DEFAULT) -> EffectApproximator:
    """An effect approximator from a file, or "default" for the embedded SAE's.

    Raises FormatError when there is none.
    """
    path = pretrained_dir() / "effects.safetensors" if str(source) == DEFAULT else Path(source)
    if not path.is_file():
        raise FormatError(
            f"no effect approximator at {path}",
            "a file written by EffectApproximator.save",
            "without one, fgaa projects through the decoder: pass effects=None",
        )
    return EffectApproximator.load(path)
