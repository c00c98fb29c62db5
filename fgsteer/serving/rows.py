"""What a server keeps of a vector or an intervention: rows of a table, one table for each steered layer.

An intervention at a block's output is k rows that read and write, and five numbers that a request chooses:

    h' = h + Σⱼ clip(const·targetⱼ + gain·lamⱼ·actⱼ, loⱼ, hiⱼ) · writeⱼ
    actⱼ = sⱼ where sⱼ = readⱼ·h + biasⱼ > thresholdⱼ, else 0; 0 too for a TopK SAE's feature beyond the k largest

const, gain and a further lo and hi are the request's, and the mode: whether the change is in units of ‖h‖, or ‖h‖ is
restored after it. A vector is one row with read = write = v̂: its operations differ in the five numbers only, so one
loaded file serves them all.

    rows_of(SteeringVector.load("love.safetensors")).amounts("add", 2.0)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import HookpointError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.steering.ranges import check_amount
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.json_files import text_sha256

PLAIN, RELATIVE, KEEP_NORM = 0.0, 1.0, 2.0
"""The modes: the change as it is, in units of the activation's norm, or with that norm restored after it."""
CLAUSES = 4
"""How many parts a gate may have that must all hold."""
TENSORS = ("read", "write", "bias", "threshold", "target", "lam", "lo", "hi")
NO_AMOUNTS = ("threshold", "lo", "hi")  # these add nothing themselves, and may be infinite
VECTOR_OPERATIONS = {  # (gain, lo, hi, mode) of each operation on a vector
    "add": (0.0, -math.inf, math.inf, PLAIN),
    "add_relative": (0.0, -math.inf, math.inf, RELATIVE),
    "add_keeping_norm": (0.0, -math.inf, math.inf, KEEP_NORM),
    "ablate": (-1.0, -math.inf, math.inf, PLAIN),
    "clamp": (-1.0, -math.inf, math.inf, PLAIN),
    "at_least": (-1.0, 0.0, math.inf, PLAIN),
    "at_most": (-1.0, -math.inf, 0.0, PLAIN),
    "affine": (-1.0, -math.inf, math.inf, PLAIN),
}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def check_name(name: object) -> str:
    """The name, if it has 1 to 64 of ``A–Z a–z 0–9 _ - .`` and does not begin with a dot. Raises SteeringError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = ascii(name[:64]) if isinstance(name, str) else a(type(name).__name__)
        raise SteeringError(
            f"the name {shown}",
            "a name of 1 to 64 letters, digits, underscores, hyphens and dots that does not begin with a dot",
            "choose another name",
        )
    return name


def block_of(hookpoint: Hookpoint) -> int:
    """The block at whose output a hookpoint is. Raises HookpointError for one within a block."""
    site, layer = hookpoint.site, hookpoint.layer
    if site == "resid_post" or (site == "resid_pre" and layer > 0):
        return layer if site == "resid_post" else layer - 1
    raise HookpointError(
        f"the hookpoint {hookpoint}",
        "a hookpoint at the output of a block",
        "vLLM computes the inside of a block in fused steps, where nothing can be steered: use resid_post",
    )


@dataclass(frozen=True, eq=False)
class ConditionRow:
    """A row that is compared with a limit, and opens what it belongs to or keeps it shut, instead of writing.

    What reads at or below ``threshold`` counts as 0, as the activation of a feature does. Conditions of one ``clause``
    are alternatives; every clause must hold.
    """

    read: Float[Tensor, " d_model"]
    bias: float
    threshold: float
    limit: float
    is_above: bool
    is_negated: bool
    is_cosine: bool
    clause: int
    feature: int = -1
    sae: str = ""

    @property
    def test(self) -> float:
        """How it is compared: 0 for above the limit, 1 for below it, 2 and 3 for the opposites of these."""
        return (not self.is_above) + 2 * self.is_negated

    @property
    def sha256(self) -> str:
        """Hash of everything that decides when it holds."""
        numbers = [self.bias, self.threshold, self.limit, self.test, self.is_cosine, self.clause, self.feature]
        return text_sha256([tensor_sha256(self.read), *numbers, self.sae])


class Amounts(NamedTuple):
    """The numbers that a request chooses."""

    const: float
    gain: float
    lo: float
    hi: float
    mode: float = PLAIN


@dataclass(frozen=True, eq=False)
class TableRows:
    """Table rows of one intervention: ``read`` and ``write`` (k, d_model), the others (k,).

    ``norm`` is the norm of a vector, ``offset`` the projection r̂·r⁻ of its reference if it has one. Rows that are not a
    vector's have neither, do one thing in one ``mode``, and a request's scale multiplies their targets and bounds, what
    they read, or nothing (``scaled``). ``features`` are the ids of features of the TopK SAE with the hash ``sae``. They
    act on tokens at which their ``conditions`` hold.
    """

    hookpoint: Hookpoint
    read: Float[Tensor, "k d_model"]
    write: Float[Tensor, "k d_model"]
    bias: Float[Tensor, " k"]
    threshold: Float[Tensor, " k"]
    target: Float[Tensor, " k"]
    lam: Float[Tensor, " k"]
    lo: Float[Tensor, " k"]
    hi: Float[Tensor, " k"]
    norm: float | None = None
    offset: float | None = None
    scaled: Literal["target", "gain", ""] = "target"
    mode: float = PLAIN
    features: tuple[int, ...] = ()
    sae: str = ""
    conditions: tuple[ConditionRow, ...] = ()

    @property
    def layer(self) -> int:
        """The block at whose output it acts. Raises HookpointError for a hookpoint within a block."""
        return block_of(self.hookpoint)

    @property
    def is_late(self) -> bool:
        """Whether it acts at the input of the next block, which comes after the output of this one."""
        return self.hookpoint.site == "resid_pre"

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides what it does."""
        tensors = (getattr(self, name) for name in TENSORS)
        numbers = [self.layer, self.norm, self.offset, self.scaled, self.mode, *self.features, self.sae]
        return text_sha256([tensor_sha256(*tensors), *numbers, *(condition.sha256 for condition in self.conditions)])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in float32. No two share storage, so that safetensors can write them."""
        return {name: getattr(self, name).to(torch.float32, copy=True).contiguous() for name in TENSORS}

    @property
    def topk_features(self) -> list[tuple[str, int]]:
        """(hash of a TopK SAE, feature) of each row that acts, then of each condition; ("", −1) where it has none."""
        own = [(self.sae, feature) for feature in self.features] or [("", -1)] * len(self.bias)
        return own + [(condition.sae, condition.feature) for condition in self.conditions]

    def table_tensors(self, groups: Mapping[str, int]) -> dict[str, Tensor]:
        """The tensors of a table, with the conditions after the rows that act, and the number of each TopK SAE."""
        made = {**self.tensors, **{name: torch.zeros_like(self.bias) for name in ("limit", "test", "cosine")}}
        made["clause"] = torch.full_like(self.bias, -1.0)
        own = self.conditions
        zero, infinite = torch.zeros(len(own)), torch.full((len(own),), math.inf)
        added = dict.fromkeys(made, zero) | {"lo": -infinite, "hi": infinite}
        added["read"] = torch.stack([one.read.float() for one in own]) if own else self.read[:0]
        added["write"] = torch.zeros_like(added["read"])
        for name in ("bias", "threshold", "limit", "test", "clause"):
            added[name] = torch.tensor([getattr(one, name) for one in own], dtype=torch.float32)
        added["cosine"] = torch.tensor([one.is_cosine for one in own], dtype=torch.float32)
        tensors = {name: torch.cat([part.float(), added[name]]) for name, part in made.items()}
        tensors["feature"] = torch.tensor([feature for _, feature in self.topk_features], dtype=torch.float32)
        tensors["group"] = torch.tensor([groups.get(sae, -1) for sae, _ in self.topk_features], dtype=torch.float32)
        return tensors

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """The largest change of an entry for const = 1, and for what all rows read of a stream of norm 1."""
        read, write, bias, target, lam = (getattr(self, n).double() for n in ("read", "write", "bias", "target", "lam"))
        amounts = torch.stack([target.abs(), lam.abs() * (read.norm(dim=1) + bias.abs())])
        by_const, by_read = (amounts @ write.abs()).amax(1).tolist()
        return by_const, by_read

    def check(self, dtype: torch.dtype) -> None:
        """Raises SteeringError for rows, a norm or a reference that would overflow activations of a dtype."""
        width, (by_const, by_read) = self.read.shape[1], self._reach
        entries = torch.cat([getattr(self, name).flatten().double() for name in TENSORS if name not in NO_AMOUNTS])
        strength = 1.0 if self.norm is None else self.norm
        for what, amount in (
            ("a row", float(entries.abs().amax())),
            ("a row", by_read),
            ("a vector or a clamp at strength 1", strength * by_const),
            ("a reference", abs(self.offset or 0.0) * by_const),
        ):
            check_amount(amount, dtype, width, what)

    def check_amounts(self, amounts: Amounts, dtype: torch.dtype) -> None:
        """Raises SteeringError for amounts of a request that would overflow activations of a dtype."""
        for amount, reach in ((abs(amounts.const), self._reach[0]), (abs(amounts.gain), self._reach[1])):
            within = amount * max(1.0, float(self.target.abs().amax())) <= torch.finfo(torch.float32).max
            check_amount(amount * reach if within else math.inf, dtype, self.read.shape[1], "a request")

    def amounts(self, operation: str | None, scale: float) -> Amounts:
        """The numbers of an operation.

        Args:
            operation: An operation on a vector, None for "add"; None for anything but a vector.
            scale: The argument of a vector's operation, such as add's coefficient. What is not a vector is made so
                many times as strong: coefficients, targets and bounds are multiplied by it.

        Raises:
            SteeringError: The operation is unknown, or not one of what is loaded; or nothing in it can be scaled.
        """
        if self.norm is None:
            return self._fixed_amounts(operation, scale)
        if operation == "affine" and self.offset is None:
            raise SteeringError(
                "the operation 'affine' for a vector without a reference",
                "a vector with a reference, such as fgsteer.ace builds",
                "use the operation clamp, or load a vector that ace built",
            )
        if operation == "ablate" and scale != 1.0:
            raise SteeringError(
                f"the scale {scale:g} for the operation 'ablate'",
                "no scale",
                "an ablation has no strength: leave steer_scale out",
            )
        if operation == "adaptive_add":
            raise SteeringError(
                "the operation 'adaptive_add' for a vector",
                f"one of {', '.join(VECTOR_OPERATIONS)}",
                "load it as an intervention: save_steering(path, vec.adaptive_add(1.0))",
            )
        if operation is not None and operation not in VECTOR_OPERATIONS:
            raise SteeringError(
                f"the operation {operation!r}",
                f"one of {', '.join(VECTOR_OPERATIONS)}",
                "correct steer_op",
            )
        const = {
            "add": scale * self.norm,
            "ablate": 0.0,
            "add_keeping_norm": scale * self.norm,
            "affine": (self.offset or 0.0) + scale * self.norm,
        }.get(operation or "add", scale)
        return Amounts(const, *VECTOR_OPERATIONS[operation or "add"])

    def _fixed_amounts(self, operation: str | None, scale: float) -> Amounts:
        """The numbers of what is not a vector. Raises SteeringError."""
        if operation is not None:
            raise SteeringError(
                f"the operation {operation!r} for what does one thing, such as a feature clamp",
                "no operation",
                "only a vector can be used in several ways: leave steer_op out",
            )
        if not self.scaled and scale != 1.0:
            raise SteeringError(
                f"the scale {scale:g} for what has no one strength, such as a rotation",
                "no scale",
                "leave steer_scale out, or load it with another strength",
            )
        const = scale if self.scaled == "target" else 1.0
        return Amounts(const, -scale if self.scaled == "gain" else -1.0, -math.inf, math.inf, self.mode)
