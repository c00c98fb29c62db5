"""Interventions: how a vector acts on an activation, all of them one equation.

    h' = h + Σⱼ (αⱼ − λⱼ · (readⱼ(h) − μⱼ)) · wⱼ

with ``read`` a projection or a feature activation. Add has λ = 0; Ablate, Clamp,
Affine and ClampFeature have λ = 1 and replace what they read. ``apply`` is the one
kernel; ``stack`` puts one intervention per batch row into a single update.

    Add(Hookpoint(6), v, coefficient=8.0)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import ArgumentError, PairingError, SelectionError, SteeringError
from fgsteer.errors.checks import check_flags, check_number, describe_value, is_whole_number
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE

Kind = TypeVar("Kind", bound="Intervention")
Scope = Literal["all", "prompt", "generated", "last_prompt_on"]
Scalar = float | Float[Tensor, ""]  # a tensor where it requires grad, else a float
SCOPES: tuple[Scope, ...] = ("all", "prompt", "generated", "last_prompt_on")


@dataclass(frozen=True, eq=False)
class Update:
    """A rank-k update for R rows: ``h += Σⱼ (constⱼ − λⱼ·read(h)ⱼ) wⱼ`` (R = 1 serves every row).

    ``write (R, k, d_model)`` holds the w, ``const (R, k)`` is α + λμ, ``lam (R, k)`` is λ.
    What is read is ``read (R, k, d_model) · h``, or the activations of the k features of
    ``sae`` (of those named in ``features``, where it has more); else the update is constant.
    """

    write: Float[Tensor, "rows k d_model"]
    const: Float[Tensor, "rows k"]
    lam: Float[Tensor, "rows k"]
    read: Float[Tensor, "rows k d_model"] | None = None
    sae: SAE | None = None
    features: tuple[int, ...] = ()
    fixed: Float[Tensor, "rows 1 d_model"] | None = None  # the change itself, where nothing is read

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> Update:
        """The same update for activations of a dtype on a device, each row repeated in place (beams, samples).

        What reads stays in float32; what reads nothing is multiplied out.
        """

        def place(part: Tensor) -> Tensor:
            part = part.to(device, torch.float32)
            return part if repeats == 1 or len(self.write) == 1 else part.repeat_interleave(repeats, 0)

        write, const, lam = place(self.write), place(self.const), place(self.lam)
        if self.sae is None and self.read is None:
            return Update(write, const, lam, fixed=(const[:, None] @ write).to(dtype))
        read = None if self.read is None else place(self.read)
        sae = None if self.sae is None else self.sae.to(device, torch.float32)
        return Update(write, const, lam, read, sae, self.features)

    def change(self, h: Float[Tensor, "batch tokens d_model"]) -> Tensor:
        """The change of h, (batch, tokens, d_model) or broadcastable to it; float32 until prepared."""
        if self.fixed is not None:
            return self.fixed
        if self.read is None and self.sae is None:
            return self.const[:, None] @ self.write
        wide = h.float()
        if self.sae is None:
            assert self.read is not None
            value = _times(wide, self.read.mT)
        elif self.features:
            value = self.sae.encode_selected(wide, self.features)
        else:
            value = self.sae.encode(wide)
        change = _times(torch.addcmul(self.const[:, None], self.lam[:, None], value, value=-1), self.write)
        return change if self.sae is None or self.sae.input_norm == "none" else change * self.sae.input_scale(wide)


def _times(x: Float[Tensor, "batch tokens n"], matrices: Float[Tensor, "rows n m"]) -> Float[Tensor, "batch tokens m"]:
    """x by one matrix for all rows, or by one for each."""
    return x @ (matrices[0] if len(matrices) == 1 else matrices)


def apply(h: Float[Tensor, "batch tokens d_model"], update: Update, where: Tensor | None = None) -> Tensor:
    """``h`` plus the update's change, cast to h's dtype; a new tensor, h is not written to.

    ``where (batch, tokens)`` limits it; elsewhere h comes back bit for bit.
    """
    change = update.change(h)
    if change.dtype != h.dtype:
        change = change.to(h.dtype)
    if where is None:
        return h + change
    return torch.where(where[..., None], h + change, h)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Intervention(OneLineRepr, ABC):
    """How an activation at ``hookpoint`` is changed, and on which tokens.

    ``scope``: all tokens, prompt, generated, or last_prompt_on (the last prompt token and
    everything after it). Padding and virtual tokens (prompt tuning) are never touched. A start token at
    position 0 (BOS, or EOS in its place) only with ``bos=True``; a word there is like any other.
    ``model_name`` is the model that it was made for and ``method`` how, where known.

    A tensor among its values that requires grad stays the caller's own, so that it can be
    trained: every pass reads it anew and has its own graph. Other tensors are copied.
    """

    hookpoint: Hookpoint
    scope: Scope = "all"
    bos: bool = False
    model_name: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        check_flags(bos=self.bos)
        if self.scope not in SCOPES:
            raise SteeringError(f"scope {self.scope!r}", f"one of {', '.join(SCOPES)}")

    @property
    @abstractmethod
    def d_model(self) -> int:
        """Width of the activation it acts on."""

    @property
    def trained(self) -> bool:
        """Whether a value of it requires grad."""
        return any(isinstance(value, Tensor) and value.requires_grad for value in self._values().values())

    def detach(self: Kind) -> Kind:
        """The same intervention with the values of now, none of which requires grad."""
        values: dict[str, Any] = {n: v.detach() for n, v in self._values().items() if isinstance(v, Tensor)}
        return replace(self, **values) if self.trained else self

    def _values(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @abstractmethod
    def update(self) -> Update:
        """The kernel's form of this intervention, for one row."""


def _scalar(name: str, value: Scalar) -> Scalar:
    """A float; a tensor that requires grad as it is. Raises SteeringError for one that is not a finite number."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return finite_number(name, value)  # type: ignore[arg-type]
    if value.ndim:
        raise SteeringError(f"{name} of shape {tuple(value.shape)} that requires grad", "one number, a 0-d tensor")
    finite_number(name, float(value.detach()))
    return value


def _tensor(value: Scalar, like: Tensor) -> Tensor:
    """A number as a tensor (1, 1) of another's dtype and device."""
    return (value.to(like) if isinstance(value, Tensor) else torch.tensor(value).to(like)).reshape(1, 1)


def finite_number(name: str, value: float) -> float:
    """The value as a float. Raises ArgumentError for what is no number, SteeringError for one that is not finite."""
    check_number(name, value)
    number = float(value)
    if not math.isfinite(number):
        raise SteeringError(f"{name} = {number}", "a finite number")
    return number


def finite_vector(name: str, value: Tensor) -> Tensor:
    """A float32 copy of the value; one that requires grad stays the caller's own, to be trained.

    Raises PairingError unless it is one floating-point vector, SteeringError where it is not finite.
    """
    if not isinstance(value, Tensor) or value.ndim != 1 or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise PairingError(f"{name} is {got}", "one floating-point vector (d_model,)")
    if not bool(torch.isfinite(value).all()):
        raise SteeringError(f"{name} holds nan or inf", "finite values")
    if value.requires_grad:
        return value
    return value.detach().float().clone()  # the caller's tensor may change later


def unit_and_norm(direction: Tensor) -> tuple[Tensor, Tensor]:
    """(unit vector, norm) in float32. Raises SteeringError for a direction whose norm is 0, or beyond float32."""
    direction = direction.float()
    norm = direction.norm()
    if not torch.compiler.is_compiling() and not 0 < norm < math.inf:
        raise SteeringError(f"a direction of norm {float(norm):g}", "a direction to read along")
    return direction / norm, norm


def _projection(unit: Tensor, const: Scalar) -> Update:
    row, const = unit[None, None], _tensor(const, unit)
    return Update(write=row, const=const, lam=torch.ones_like(const), read=row)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Add(Intervention):
    """``h' = h + c·v`` for ``direction`` v (d_model,), ``coefficient`` c (CAA, arXiv 2312.06681)."""

    direction: Float[Tensor, " d_model"]
    coefficient: Scalar = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", finite_vector("direction", self.direction))
        object.__setattr__(self, "coefficient", _scalar("coefficient", self.coefficient))

    @property
    def d_model(self) -> int:
        """Width of the direction."""
        return self.direction.shape[0]

    def update(self) -> Update:
        """w = v, λ = 0, α = c."""
        row = self.direction.float()[None, None]
        const = _tensor(self.coefficient, row)
        return Update(write=row, const=const, lam=torch.zeros_like(const))


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Clamp(Intervention):
    """``h' = h + (t − r̂·h) r̂``: the projection on ``direction`` r (d_model,) becomes ``target`` t.

    ``target`` is in units of the residual stream along the unit vector r̂.
    Raises SteeringError for a zero direction.
    """

    direction: Float[Tensor, " d_model"]
    target: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", finite_vector("direction", self.direction))
        object.__setattr__(self, "target", _scalar("target", self.target))
        unit_and_norm(self.direction)

    @property
    def d_model(self) -> int:
        """Width of the direction."""
        return self.direction.shape[0]

    def update(self) -> Update:
        """w = r̂, read = r̂·h, λ = 1, μ = 0, α = t."""
        return _projection(unit_and_norm(self.direction)[0], self.target)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Ablate(Intervention):
    """``h' = h − (r̂·h) r̂``: the projection on ``direction`` r (d_model,) becomes 0 (arXiv 2406.11717).

    Raises SteeringError for a zero direction.
    """

    direction: Float[Tensor, " d_model"]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", finite_vector("direction", self.direction))
        unit_and_norm(self.direction)

    @property
    def d_model(self) -> int:
        """Width of the direction."""
        return self.direction.shape[0]

    def update(self) -> Update:
        """w = r̂, read = r̂·h, λ = 1, μ = 0, α = 0."""
        return _projection(unit_and_norm(self.direction)[0], 0.0)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Affine(Intervention):
    """``h' = h − proj_r(h) + proj_r(r⁻) + α·r``: ACE (arXiv 2411.09003).

    ``direction`` r and ``reference`` r⁻ are (d_model,); ``alpha`` 0 is the reference (the
    negative mean), 1 the positive mean. Hence ``r̂·h' = r̂·r⁻ + α‖r‖`` for every h.
    Raises SteeringError for a zero direction, PairingError for unequal widths.
    """

    direction: Float[Tensor, " d_model"]
    reference: Float[Tensor, " d_model"]
    alpha: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "direction", finite_vector("direction", self.direction))
        object.__setattr__(self, "reference", finite_vector("reference", self.reference))
        object.__setattr__(self, "alpha", _scalar("alpha", self.alpha))
        if self.reference.shape != self.direction.shape:
            raise PairingError(f"a reference of width {len(self.reference)}", f"{len(self.direction)}, the direction's")
        unit_and_norm(self.direction)

    @property
    def d_model(self) -> int:
        """Width of the direction."""
        return self.direction.shape[0]

    def update(self) -> Update:
        """w = r̂, read = r̂·h, λ = 1, μ = r̂·r⁻, α·‖r‖."""
        unit, norm = unit_and_norm(self.direction)
        return _projection(unit, unit @ self.reference.float().to(unit) + _tensor(self.alpha, unit)[0, 0] * norm)


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ClampFeature(Intervention):
    """``h' = h + Σⱼ (tⱼ − fⱼ(h)) W_dec[j]``: features take set activations, the SAE's error is kept.

    ``targets`` {feature id: activation}; every fⱼ is read from the same h, so a clamp of
    several features is joint. Raises SelectionError for no or unknown ids.
    """

    sae: SAE
    targets: Mapping[int, Scalar]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.targets, Mapping):
            raise ArgumentError(f"targets is {describe_value(self.targets)}", "{feature id: activation}")
        if not self.targets:
            raise SelectionError("no feature to clamp", "at least one {id: activation}")
        clean = {_feature(j): _scalar(f"target of feature {j}", t) for j, t in self.targets.items()}
        object.__setattr__(self, "targets", clean)
        for feature in clean:
            self.sae.direction(feature)
        if self.sae.reads is not None:
            raise PairingError(
                f"a clamp of a transcoder's features, read at {self.sae.reads}",
                "an SAE that reads where it steers",
                "steer with its directions: from_features(sae, ids) and .add(coefficient)",
            )
        if self.hookpoint != self.sae.hookpoint:
            raise PairingError(f"a clamp at {self.hookpoint}", f"{self.sae.hookpoint}, where its SAE was trained")

    def _values(self) -> dict[str, Any]:
        tensors = {name: value for name, value in vars(self.sae).items() if isinstance(value, Tensor)}
        return tensors | {f"target of feature {j}": target for j, target in self.targets.items()}

    def detach(self) -> ClampFeature:
        """The same intervention with the targets of now, as floats."""
        targets = {j: t.detach() if isinstance(t, Tensor) else t for j, t in self.targets.items()}
        return replace(self, targets=targets) if self.trained else self

    @property
    def d_model(self) -> int:
        """Width of the SAE's input."""
        return self.sae.d_model

    def update(self) -> Update:
        """w = W_dec[j], read = fⱼ(h), λ = 1, μ = 0, α = tⱼ."""
        features = list(self.targets)
        write = self.sae.W_dec[features][None].float()
        const = torch.cat([_tensor(target, write) for target in self.targets.values()], 1)
        competing = self.sae.activation == "topk"
        return Update(
            write=write,
            const=const,
            lam=torch.ones_like(const),
            sae=self.sae if competing else self.sae.restrict(features),
            features=tuple(features) if competing else (),
        )


def _feature(value: object) -> int:
    """The value as a feature id. Raises ArgumentError."""
    if not is_whole_number(value):
        raise ArgumentError(f"feature id {describe_value(value)}", "a whole number")
    return int(value)


def stack(rows: Sequence[Intervention | None]) -> list[tuple[Update, list[int]]]:
    """Updates that apply one intervention to each row, with the rows that each of them touches.

    Linear reads share one update, in which other rows have w = 0; feature reads share one
    per intervention. Every row keeps its own scope, so callers group by scope first.
    """
    feature_rows: dict[int, tuple[Intervention, list[int]]] = {}
    linear: dict[int, Update] = {}
    for number, item in enumerate(rows):
        if isinstance(item, ClampFeature):
            feature_rows.setdefault(id(item), (item, []))[1].append(number)
        elif item is not None:
            linear[number] = item.update()
    built = [(item.update(), numbers) for item, numbers in feature_rows.values()]
    if linear:
        built.append((_stack_linear(linear, len(rows)), list(linear)))
    return built


def _stack_linear(updates: Mapping[int, Update], count: int) -> Update:
    """Rank-one updates of some of ``count`` rows as one update; the other rows get w = 0."""
    sample = next(iter(updates.values()))
    write = torch.zeros(count, 1, sample.write.shape[-1], device=sample.write.device)
    read = torch.zeros_like(write)
    const = torch.zeros(count, 1, device=write.device)
    lam = torch.zeros_like(const)
    for number, update in updates.items():
        write[number], const[number], lam[number] = update.write[0], update.const[0], update.lam[0]
        if update.read is not None:
            read[number] = update.read[0]
    reads = any(update.read is not None for update in updates.values())
    return Update(write, const, lam, read if reads else None)
