"""Sparse autoencoders as immutable tensors in one canonical form.

Every convention of a trained SAE (decoder bias subtracted from the input, activations rescaled by decoder norms) is
folded into the weights when it is loaded, so that ``feature_acts = φ(x̃ W_enc + b_enc)`` and
``x̂ = feature_acts W_dec + b_dec`` hold for all of them; ``x̃`` is the input after its normalisation.

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
PIECE_ELEMENTS = 1 << 18  # pre-activations that a JumpReLU handles at once: affects speed, not results


def _jumprelu(pre: Float[Tensor, "*batch d_sae"], threshold: Float[Tensor, " d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """Compute ``relu(pre) · 1[pre > threshold]``, on a CPU in pieces that stay in its cache."""
    if pre.device.type != "cpu" or pre.numel() <= PIECE_ELEMENTS:
        return pre.relu() * (pre > threshold)
    rows = pre.view(-1, pre.shape[-1])
    size = max(1, PIECE_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), size):
        piece = rows[start : start + size]
        rows[start : start + size] = piece.relu() * (piece > threshold)
    return pre


@dataclass(frozen=True, eq=False, repr=False)
class SAE(OneLineRepr):
    """A sparse autoencoder, or a transcoder.

    A transcoder encodes what is at ``reads`` and writes, and steers, at ``hookpoint``.

    Attributes:
        W_enc: Encoder weights, (d_model, d_sae).
        W_dec: Decoder weights, (d_sae, d_model).
        b_enc: Encoder bias, (d_sae,).
        b_dec: Decoder bias, (d_model,).
        hookpoint: Where its output belongs, and for an SAE its input.
        activation: "relu"; "jumprelu", active where the pre-activation exceeds ``threshold``; "topk", the ``k``
            largest pre-activations; or "gated".
        threshold: Thresholds of a jumprelu SAE, (d_sae,).
        k: Of a topk SAE.
        gate_bias: Bias on the gate of a gated SAE, (d_sae,).
        gate_scale: Scale of the magnitude of a gated SAE, (d_sae,).
        input_norm: How the input is normalised: "none", "layer_norm" or "constant_norm_rescale".
        model_name: The model that it was trained on, "" where that is not known.
        source: Where it was loaded from.
        density: How often its features fire, where that was measured.
        labels: What its features are said to mean.
        fingerprint: Hash of the weights as stored, before anything was folded into them.
        neuronpedia: Its id on Neuronpedia.
        prepend_bos: Whether BOS came before the texts that it was trained on, None where that is not known.
        reads: Where a transcoder reads; None for an SAE.
        W_skip: A transcoder's linear path from its input to its output, if any, (d_model, d_model).

    Raises:
        PairingError: The shapes do not fit together, or ``activation`` or ``input_norm`` is unknown.
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
                raise PairingError(
                    f"a transcoder with input_norm = {self.input_norm!r}", "a transcoder without input_norm"
                )
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
                got = f"no {name}" if tensor is None else f"shape {tuple(tensor.shape)}"
                raise PairingError(
                    got, f"{name} of shape {shape}, as W_enc has shape {tuple(self.W_enc.shape)} ({self.activation})"
                )
        if self.activation == "topk" and not (is_whole_number(self.k) and self.k and 0 < self.k <= self.d_sae):
            raise PairingError(f"k = {self.k}", f"a whole number from 1 to d_sae = {self.d_sae} for a topk SAE")

    def __repr__(self) -> str:
        kind = f"topk, k {self.k}" if self.activation == "topk" else self.activation
        kind += "" if self.input_norm == "none" else f", {self.input_norm}"
        place = f"{self.reads} to {self.hookpoint}" if self.reads is not None else str(self.hookpoint)
        sizes = f"d_model {self.d_model}, d_sae {self.d_sae}"
        origin = f", from {short_repr(self.source)}" if self.source else ""
        return f"SAE({kind}, at {place}, {sizes}{origin})"

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
        """Where the activations are that it encodes: ``hookpoint``, except for a transcoder."""
        return self.reads or self.hookpoint

    @cached_property
    def sha256(self) -> str:
        """Hash that binds densities and effects to this SAE; the same on every machine and after ``to``."""
        if self.fingerprint:
            return self.fingerprint
        parts = (self.W_enc, self.W_dec, self.b_enc, self.b_dec, self.threshold, self.gate_bias, self.gate_scale)
        return text_sha256([tensor_sha256(*parts), self.activation, self.k, self.input_norm, str(self.hookpoint)])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """Return the same SAE on another device or in another dtype; its hash is kept."""
        moved = {
            name: getattr(self, name).to(device=device, dtype=dtype)
            for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "gate_bias", "gate_scale", "W_skip")
            if getattr(self, name) is not None
        }
        return replace(self, fingerprint=self.sha256, **moved)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return (x̃, scale, shift): the encoder's input, and the factor and offset that turn a decoded x̃ into x̂."""
        if self.input_norm == "layer_norm":  # sae-lens divides by std + 1e-5, and multiplies by std
            shift = x.mean(-1, keepdim=True)
            scale = x.std(-1, keepdim=True)
            return (x - shift) / (scale + 1e-5), scale, shift
        if self.input_norm == "constant_norm_rescale":
            scale = x.norm(dim=-1, keepdim=True) / self.d_model**0.5
            return x / scale, scale, 0.0
        return x, 1.0, 0.0

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Apply φ to pre-activations (..., d_sae), which it may overwrite, as that saves a pass over memory."""
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

    def pre_activations(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Compute what φ is applied to, ``x̃ W_enc + b_enc``; of a gated SAE without the bias."""
        x = self._normalised(x.to(self.W_enc))[0]
        if self.activation == "gated":  # its bias belongs to the magnitude, not to the gate
            return x @ self.W_enc
        return torch.nn.functional.linear(x, self.W_enc.T, self.b_enc)

    def encode(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_sae"]:
        """Compute feature activations ``φ(x̃ W_enc + b_enc)``, in the SAE's dtype and on its device.

        Args:
            x: Activations (..., d_model) at ``input_hookpoint``.

        Returns:
            Feature activations (..., d_sae).

        Raises:
            PairingError: The last dimension of x is not d_model.
        """
        self._check_width(x)
        return self.activate(self.pre_activations(x))

    def encode_selected(
        self, x: Float[Tensor, "*batch d_model"], features: Sequence[int] | Tensor
    ) -> Float[Tensor, "*batch n"]:
        """Compute the activations of some features, equal to ``encode(x)[..., features]``.

        Only their n encoder columns are used, except for topk, where every feature decides.

        Args:
            x: Activations (..., d_model) at ``input_hookpoint``.
            features: n feature ids.

        Returns:
            Feature activations (..., n).

        Raises:
            PairingError: The last dimension of x is not d_model.
            SelectionError: An id is outside 0 … d_sae − 1.
        """
        if self.activation == "topk":
            return self.encode(x)[..., self._columns(features)]
        return self.restrict(features).encode(x)

    def restrict(self, features: Sequence[int] | Tensor) -> SAE:
        """Return the SAE of some features alone, in their order. Raises SelectionError for topk, or unknown ids."""
        if self.activation == "topk":
            raise SelectionError("a topk SAE", "an SAE whose features do not compete", "use encode_selected")
        columns = self._columns(features)
        parts = {
            name: getattr(self, name)[columns]
            for name in ("W_dec", "b_enc", "threshold", "gate_bias", "gate_scale")
            if getattr(self, name) is not None
        }
        return replace(self, W_enc=self.W_enc[:, columns], density=None, labels={}, fingerprint="", **parts)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_model"]:
        """Compute ``feature_acts W_dec + b_dec`` (..., d_model), in the units of the normalised input."""
        return feature_acts.to(self.W_dec) @ self.W_dec + self.b_dec

    def reconstruct(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Compute x̂ (..., d_model) in the units of x: encode, decode, undo the input normalisation as sae-lens does.

        For a transcoder it is the prediction at ``hookpoint`` from x at ``reads``, including ``x W_skip``.
        """
        self._check_width(x)
        _, scale, shift = self._normalised(x.to(self.W_enc))
        if self.W_skip is not None:
            shift = x.to(self.W_skip) @ self.W_skip
        return self.decode(self.encode(x)) * scale + shift

    def input_scale(self, x: Float[Tensor, "*batch d_model"]) -> Tensor | float:
        """Return the factor (..., 1) by which a unit of feature activation acts on x̂; 1 without an input norm."""
        return self._normalised(x.to(self.W_enc))[1]

    def direction(self, feature: int) -> Float[Tensor, " d_model"]:
        """Return the decoder row ``W_dec[feature]`` (d_model,), not normalised. Raises SelectionError."""
        return self.W_dec[int(self._columns([feature])[0])]

    def _check_width(self, x: Tensor) -> None:
        """Raise PairingError when the last dimension of x is not d_model."""
        if x.shape[-1] != self.d_model:
            raise PairingError(
                f"activations of width {x.shape[-1]}",
                f"width {self.d_model}, the d_model of this SAE",
                f"pass activations at {self.input_hookpoint} of {self.model_name or 'its model'}",
            )

    def _columns(self, features: Sequence[int] | Tensor) -> Tensor:
        """Return feature ids as a tensor. Raises SelectionError for ids that the SAE lacks."""
        try:
            columns = torch.as_tensor(features, dtype=torch.long, device=self.W_enc.device)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise SelectionError(
                f"feature ids {describe_value(features)}", f"whole numbers from 0 to {self.d_sae - 1}"
            ) from error
        if columns.numel() and not (int(columns.min()) >= 0 and int(columns.max()) < self.d_sae):
            raise SelectionError(f"feature ids {columns.tolist()}", f"ids from 0 to {self.d_sae - 1}")
        return columns
