"""Sparse autoencoders as immutable tensors in one canonical form.

Every convention that a trained SAE may carry (decoder bias subtracted from the
input, activations rescaled by decoder norms) is folded into the weights when it is
loaded, so that ``feature_acts = φ(x̃ W_enc + b_enc)`` and ``x̂ = feature_acts W_dec + b_dec``
hold for all of them; ``x̃`` is the input after its normalisation.

    acts = sae.encode(h)              (..., d_sae)
    v = sae.direction(42)             (d_model,)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.display.tables import Cell, facts_html
from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import describe_value, is_whole_number
from fgsteer.errors.reprs import OneLineRepr, short_repr
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.json_files import text_sha256

if TYPE_CHECKING:
    from fgsteer.saes.density import FeatureDensity

Activation = Literal["relu", "jumprelu", "topk", "gated"]
InputNorm = Literal["none", "layer_norm", "constant_norm_rescale"]
ACTIVATIONS: tuple[Activation, ...] = ("relu", "jumprelu", "topk", "gated")
INPUT_NORMS: tuple[InputNorm, ...] = ("none", "layer_norm", "constant_norm_rescale")
PIECE_ELEMENTS = 1 << 18  # pre-activations that a JumpReLU takes at once: speed, not results


def _jumprelu(pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """``relu(pre) · 1[pre > threshold]``, on a CPU in place, in pieces that stay in its cache for all the passes."""
    if pre.device.type != "cpu" or not pre.numel():
        return pre.relu() * (pre > threshold)
    rows = pre.view(-1, pre.shape[-1])
    size = max(1, PIECE_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), size):
        piece = rows[start : start + size]
        rows[start : start + size] = piece.relu() * (piece > threshold)
    return pre


@dataclass(frozen=True, eq=False, repr=False)
class SAE(OneLineRepr):
    """A sparse autoencoder: ``W_enc (d_model, d_sae)``, ``W_dec (d_sae, d_model)`` and what goes with them.

    ``activation`` is relu; jumprelu, active where the pre-activation exceeds
    ``threshold (d_sae,)``; topk, the ``k`` largest pre-activations; or gated, with
    ``gate_bias (d_sae,)`` on the gate and ``gate_scale (d_sae,)`` on the magnitude.
    ``density`` holds token-level firing statistics where they are known, ``labels``
    what features are said to mean; ``fingerprint`` is the hash of the weights as stored,
    before anything was folded into them. ``neuronpedia`` is its id there. ``prepend_bos`` says whether
    BOS stood before the texts that it was trained on, None where that is not known.

    A transcoder encodes what is at ``reads`` and writes, and steers, at ``hookpoint``;
    ``W_skip (d_model, d_model)`` is its linear path from the one to the other, if any.
    Raises PairingError when the shapes do not fit together, or for another ``activation`` or ``input_norm``.
    """

    W_enc: Float[Tensor, "d_model d_sae"]
    W_dec: Float[Tensor, "d_sae d_model"]
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_model"]
    hookpoint: Hookpoint
    activation: Activation = "relu"
    threshold: Float[Tensor, " d_sae"] | None = None
    k: int | None = None
    gate_bias: Float[Tensor, " d_sae"] | None = None
    gate_scale: Float[Tensor, " d_sae"] | None = None
    input_norm: InputNorm = "none"
    model_name: str = ""
    source: str = ""
    density: FeatureDensity | None = None
    labels: Mapping[int, str] = field(default_factory=dict)
    fingerprint: str = ""
    neuronpedia: str = ""
    prepend_bos: bool | None = None
    reads: Hookpoint | None = None
    W_skip: Float[Tensor, "d_model d_model"] | None = None

    def __post_init__(self) -> None:
        for name, known in (("activation", ACTIVATIONS), ("input_norm", INPUT_NORMS)):
            if getattr(self, name) not in known:
                raise PairingError(f"{name} = {getattr(self, name)!r}", f"one of {', '.join(known)}")
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        if self.reads is not None:
            object.__setattr__(self, "reads", Hookpoint.parse(self.reads))
            if self.input_norm != "none":
                raise PairingError(f"a transcoder with input_norm = {self.input_norm!r}", "none")
        needed: dict[str, tuple[int, ...]] = {
            "W_dec": (self.d_sae, self.d_model),
            "b_enc": (self.d_sae,),
            "b_dec": (self.d_model,),
        }
        if self.activation == "jumprelu":
            needed["threshold"] = (self.d_sae,)
        if self.activation == "gated":
            needed["gate_bias"] = needed["gate_scale"] = (self.d_sae,)
        if self.W_skip is not None:
            needed["W_skip"] = (self.d_model, self.d_model)
        for name, shape in needed.items():
            tensor = getattr(self, name)
            if tensor is None or tuple(tensor.shape) != shape:
                got = "nothing" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise PairingError(
                    f"{name} has {got}", f"{shape} beside W_enc {tuple(self.W_enc.shape)} ({self.activation})"
                )
        if self.activation == "topk" and not (is_whole_number(self.k) and self.k and 0 < self.k <= self.d_sae):
            raise PairingError(f"k = {self.k}", f"1 to d_sae = {self.d_sae} for a topk SAE")

    def __repr__(self) -> str:
        kind = f"topk, k {self.k}" if self.activation == "topk" else self.activation
        kind += "" if self.input_norm == "none" else f", {self.input_norm}"
        place = f"{self.reads} to {self.hookpoint}" if self.reads is not None else str(self.hookpoint)
        sizes = f"d_model {self.d_model}, d_sae {self.d_sae}"
        told = f", from {short_repr(self.source)}" if self.source else ""
        return f"SAE({kind}, at {place}, {sizes}{told})"

    def _repr_html_(self) -> str:
        facts: dict[str, Cell] = {
            "activation": f"topk, k = {self.k}" if self.activation == "topk" else self.activation,
            "input normalisation": "" if self.input_norm == "none" else self.input_norm,
            "model": self.model_name,
            "reads": "" if self.reads is None else str(self.reads),
            "hookpoint": str(self.hookpoint),
            "d_model": self.d_model,
            "d_sae": self.d_sae,
            "source": self.source,
            "Neuronpedia": self.neuronpedia,
            "density": "" if self.density is None else self.density.summary,
            "labels": f"{len(self.labels):,} features" if self.labels else "",
        }
        return facts_html("SAE", facts)

    @property
    def d_model(self) -> int:
        """Width of the activations it reads: the model's d_model, or n_heads · d_head on z."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[1]

    @property
    def input_hookpoint(self) -> Hookpoint:
        """Where the activations that it encodes are: ``hookpoint``, except for a transcoder."""
        return self.reads or self.hookpoint

    @cached_property
    def sha256(self) -> str:
        """Hash that binds densities and effects to this SAE; the same on every machine and after ``to``."""
        if self.fingerprint:
            return self.fingerprint
        parts = (self.W_enc, self.W_dec, self.b_enc, self.b_dec, self.threshold, self.gate_bias, self.gate_scale)
        return text_sha256([tensor_sha256(*parts), self.activation, self.k, self.input_norm, str(self.hookpoint)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE on another device or in another dtype; its hash is kept."""
        moved = {
            name: getattr(self, name).to(device=device, dtype=dtype)
            for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "gate_bias", "gate_scale", "W_skip")
            if getattr(self, name) is not None
        }
        return replace(self, fingerprint=self.sha256, **moved)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """(x̃, scale, shift): what the encoder reads, and what a decoded x̃ is multiplied by and added to."""
        if self.input_norm == "layer_norm":  # sae-lens divides by std + 1e-5, and multiplies by std
            shift = x.mean(-1, keepdim=True)
            scale = x.std(-1, keepdim=True)
            return (x - shift) / (scale + 1e-5), scale, shift
        if self.input_norm == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_model**0.5
            return x / scale, scale, 0.0
        return x, 1.0, 0.0

    def _activate(self, pre: Tensor) -> Tensor:
        """φ of the pre-activations, in their own memory where that saves a pass over it."""
        if self.activation == "topk":
            assert self.k is not None
            values, ids = pre.topk(self.k, dim=-1, sorted=False)
            return pre.zero_().scatter_(-1, ids, values.relu_())
        if self.activation == "jumprelu":
            assert self.threshold is not None
            return _jumprelu(pre, self.threshold)
        if self.activation == "gated":
            assert self.gate_bias is not None
            assert self.gate_scale is not None
            return (pre + self.gate_bias > 0) * (pre * self.gate_scale + self.b_enc).relu()
        return pre.relu_()

    def _pre(self, x: Tensor) -> Tensor:
        x = self._normalised(x.to(self.W_enc))[0]
        if self.activation == "gated":  # its bias belongs to the magnitude, not to the gate
            return x @ self.W_enc
        return torch.addmm(self.b_enc, x.reshape(-1, self.d_model), self.W_enc).view(*x.shape[:-1], self.d_sae)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Feature activations ``φ(x̃ W_enc + b_enc)`` of x (..., d_model), in the SAE's dtype and device.

        Raises PairingError when the last dimension of x is not d_model.
        """
        self._check_width(x)
        return self._activate(self._pre(x))

    def encode_selected(
        self, x: Float[Tensor, "*batch d_model"], features: Sequence[int] | Tensor
    ) -> Float[Tensor, "*batch n"]:
        """Activations (..., n) of the given feature ids, equal to ``encode(x)[..., features]``.

        Only their n encoder columns are read, except for topk, where every feature decides.
        Raises PairingError for a wrong width, SelectionError for an id outside 0 … d_sae − 1.
        """
        if self.activation == "topk":
            return self.encode(x)[..., self._columns(features)]
        return self.restrict(features).encode(x)

    def restrict(self, features: Sequence[int] | Tensor) -> SAE:
        """The SAE of the given features alone, in their order. Raises SelectionError for topk, or unknown ids."""
        if self.activation == "topk":
            raise SelectionError("a topk SAE", "one whose features do not compete", "use encode_selected")
        columns = self._columns(features)
        parts = {
            name: getattr(self, name)[columns]
            for name in ("W_dec", "b_enc", "threshold", "gate_bias", "gate_scale")
            if getattr(self, name) is not None
        }
        return replace(self, W_enc=self.W_enc[:, columns], density=None, labels={}, fingerprint="", **parts)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """``feature_acts W_dec + b_dec`` (..., d_model), in the normalised input's units."""
        return feature_acts.to(self.W_dec) @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """x̂ (..., d_model) in the units of x: encode, decode, undo the input normalisation as sae-lens does.

        Of a transcoder: what it predicts at ``hookpoint`` from x at ``reads``, ``+ x W_skip``.
        """
        self._check_width(x)
        _, scale, shift = self._normalised(x.to(self.W_enc))
        if self.W_skip is not None:
            shift = x.to(self.W_skip) @ self.W_skip
        return self.decode(self.encode(x)) * scale + shift

    def input_scale(self, x: Float[Tensor, "*batch d_model"]) -> Tensor | float:
        """Factor (..., 1) by which a unit of feature activation acts on x̂, as in ``reconstruct``; 1 without a norm."""
        return self._normalised(x.to(self.W_enc))[1]

    def direction(self, feature: int) -> Float[Tensor, " d_model"]:
        """Decoder row ``W_dec[feature]`` (d_model,), not normalised. Raises SelectionError."""
        return self.W_dec[int(self._columns([feature])[0])]

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.d_model:
            raise PairingError(
                f"activations of width {x.shape[-1]}",
                f"d_model = {self.d_model} of this SAE (at {self.input_hookpoint} of {self.model_name or 'its model'})",
            )

    def _columns(self, features: Sequence[int] | Tensor) -> Tensor:
        try:
            columns = torch.as_tensor(features, dtype=torch.long, device=self.W_enc.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise SelectionError(
                f"feature ids {describe_value(features)}", f"whole numbers, 0 to {self.d_sae - 1}"
            ) from error
        if columns.numel() and not (int(columns.min()) >= 0 and int(columns.max()) < self.d_sae):
            raise SelectionError(f"feature ids {columns.tolist()}", f"0 to {self.d_sae - 1}")
        return columns
