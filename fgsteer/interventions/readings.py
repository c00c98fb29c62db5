"""The readings: what gates and strengths go by, a number of each token or of a prompt.

Feature(sae, 123) > 2.0                 of each token
Cosine(vec).of_mean() > 0.1             of the prompt
Preview([Probe(w, 20), Probe(w, 9)])    of the prompt, read ahead in a pass that nothing steers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.checks import describe_value, is_whole_number
from fgsteer.interventions.gates import Pooling, Reading
from fgsteer.interventions.values import finite_number, finite_vector, unit_and_norm
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE


def _copied(name: str, value: Any) -> Tensor:
    """A float32 copy of a vector, which training it further does not reach: gates pass on no gradient."""
    return finite_vector(name, value.detach() if isinstance(value, Tensor) else value)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class _Along(Reading):
    """A reading along a direction."""

    direction: Float[Tensor, " d_model"]
    _unit: Tensor = field(init=False, repr=False, compare=False)

    def __init__(self, direction: Any, hookpoint: Hookpoint | str | int | None = None, pooling: Pooling = "") -> None:
        place = getattr(direction, "hookpoint", None) if hookpoint is None else hookpoint
        if place is None:
            raise SteeringError(
                "a direction without a hookpoint", "a place to read at", "pass a SteeringVector, or hookpoint="
            )
        values: dict[str, Any] = {
            "direction": _copied("direction", getattr(direction, "direction", direction)),
            "hookpoint": place,
            "pooling": pooling,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_unit", unit_and_norm(self.direction)[0])  # raises for a zero direction
        self.__post_init__()

    @property
    def d_model(self) -> int:
        return self.direction.shape[0]


class Projection(_Along):
    """The projection ``v̂·h`` of each token, in units of the residual stream.

    Args:
        direction: The direction v: a ``SteeringVector``, or a tensor (d_model,).
        hookpoint: Where it is read; by default the vector's hookpoint.
        pooling: As in ``Reading``; ``last()``, ``mean()`` and ``max()`` set it.
    """

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """v̂·h."""
        return h.float() @ self._unit.to(h.device)


class Cosine(_Along):
    """The cosine of each token with a direction, ``v̂·h/‖h‖``, with its sign: the condition of CAST (arXiv 2409.05907).

    The published code compares ``|cos|``, which a vector and its opposite have in common.

    Args:
        direction: The direction v: a ``SteeringVector``, or a tensor (d_model,).
        hookpoint: Where it is read; by default the vector's hookpoint.
        pooling: As in ``Reading``. ``mean()`` is the mean of the tokens' cosines, ``of_mean()`` the cosine of
            their mean.
    """

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """v̂·h/‖h‖, 0 for h = 0."""
        wide = h.float()
        norm = wide.norm(dim=-1)
        return (wide @ self._unit.to(h.device)) / torch.where(norm > 0, norm, 1.0)


class TanhCosine(_Along):
    """The similarity of CAST's published code, ``cos(h, tanh(v̂ v̂ᵀ h))``, with tanh taken entry by entry.

    It has no sign: h and −h give the same, as do v and −v. For small projections it is near |cos(h, v)|; for large ones
    tanh saturates, so that it depends on the scale of h too. ``Cosine`` has neither fault (arXiv 2409.05907).

    Args:
        direction: The direction v: a ``SteeringVector``, or a tensor (d_model,).
        hookpoint: Where it is read; by default the vector's hookpoint.
        pooling: As in ``Reading``; the published code reads the mean of the prompt's tokens, ``of_mean()``.
    """

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """cos(h, tanh(v̂ v̂ᵀ h)), 0 for h without a part along v."""
        wide, unit = h.float(), self._unit.to(h.device)
        bent = torch.tanh((wide @ unit)[..., None] * unit)
        norms = wide.norm(dim=-1) * bent.norm(dim=-1)
        return (wide * bent).sum(-1) / torch.where(norms > 0, norms, 1.0)


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Probe(Reading):
    """A linear probe's score of each token, ``w·h + b``.

    Args:
        weight: The weights w, (d_model,).
        hookpoint: Where it is read.
        bias: The bias b.
        pooling: As in ``Reading``.
    """

    weight: Float[Tensor, " d_model"]
    bias: float = 0.0

    def __init__(
        self, weight: Tensor, hookpoint: Hookpoint | str | int, bias: float = 0.0, pooling: Pooling = ""
    ) -> None:
        values: dict[str, Any] = {
            "weight": _copied("weight", weight),
            "bias": finite_number("bias", bias),
            "hookpoint": hookpoint,
            "pooling": pooling,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def d_model(self) -> int:
        """The width of the weights."""
        return self.weight.shape[0]

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """w·h + b."""
        return h.float() @ self.weight.float().to(h.device) + self.bias


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Feature(Reading):
    """The activation of an SAE's feature at each token.

    Args:
        sae: The SAE, which is read where it reads: a transcoder at its input.
        feature: The feature's id.
        pooling: As in ``Reading``.
    """

    sae: SAE
    feature: int

    def __init__(self, sae: SAE, feature: int, pooling: Pooling = "") -> None:
        if not is_whole_number(feature):
            raise SteeringError(f"feature {feature!r:.40}", "the id of a feature", "pass a whole number")
        sae.direction(feature)  # raises for a feature that the SAE does not have
        values: dict[str, Any] = {
            "sae": sae,
            "feature": int(feature),
            "hookpoint": sae.hookpoint if sae.reads is None else sae.reads,
            "pooling": pooling,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    @property
    def d_model(self) -> int:
        """The width that the SAE reads."""
        return self.sae.W_enc.shape[0]

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """f_j(h)."""
        sae = self.sae.to(h.device, torch.float32)
        return sae.encode_selected(h.float(), [self.feature])[..., 0]


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Preview(Reading):
    """What is read of a prompt ahead, in a pass over it that nothing steers: the mean of readings at one token.

    Gates and strengths that go by it may read above the place where they act, which a single pass does not allow. The
    pass comes before the one that is steered, so that a prompt is read twice; several previews share it. With
    ``appended`` tokens, the pass reads these after the prompt, and what is read is ``h[position] − h[last appended]``.

    Args:
        readings: What is read, at any layers, each without pooling.
        appended: Ids of tokens that are read after the prompt.
        position: The token that is read, counted from the prompt's end: −1 is its last.

    Raises:
        SteeringError: There is no reading, one is pooled or a preview itself, or the position is none of the prompt.
        PairingError: The readings are of several widths.
    """

    readings: tuple[Reading, ...]
    appended: tuple[int, ...] = ()
    position: int = -1

    def __init__(
        self, readings: Reading | Sequence[Reading], *, appended: Sequence[int] = (), position: int = -1
    ) -> None:
        parts: tuple[Any, ...] = tuple(readings) if isinstance(readings, list | tuple) else (readings,)
        if not parts or not all(isinstance(p, Reading) and not p.pooling for p in parts):
            raise SteeringError(
                describe_value(readings) if not parts else "a preview of what is pooled, or of what is no reading",
                "one or several readings of tokens",
                "pass fg.Probe(w, 8) without .last(), as the position says which token is read",
            )
        if len(widths := sorted({p.d_model for p in parts})) > 1:
            raise PairingError(f"readings of the widths {widths}", "readings of one model's stream")
        ids = tuple(appended)
        if not all(is_whole_number(token) and token >= 0 for token in ids):
            raise SteeringError(
                f"appended = {ids!r:.60}", "ids of tokens, from 0", "encode the text with the tokenizer"
            )
        if not is_whole_number(position) or position >= 0:
            raise SteeringError(
                f"position = {position!r:.20}", "a whole number below 0", "−1 is the prompt's last token"
            )
        values: dict[str, Any] = {
            "readings": parts,
            "appended": tuple(map(int, ids)),
            "position": int(position),
            "hookpoint": max(part.hookpoint for part in parts),
            "pooling": "last",
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def _pooled(self, pooling: Pooling) -> Preview:
        raise SteeringError(
            f"{pooling}() of a preview, which is of one token of each prompt already",
            "a preview as it is, compared with a threshold",
            "pass position= to say which token is read",
        )

    @property
    def parts(self) -> tuple[Reading, ...]:
        """The readings that it is the mean of."""
        return self.readings

    @property
    def d_model(self) -> int:
        """The width of the activations that it reads."""
        return self.readings[0].d_model

    def values(self, h: Float[Tensor, "batch tokens d_model"]) -> Float[Tensor, "batch tokens"]:
        """The i-th reading of the i-th token, whose mean over the tokens counts."""
        return torch.cat([part.values(h[:, [number]]) for number, part in enumerate(self.readings)], 1)
