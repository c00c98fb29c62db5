"""Interventions on the activations of SAE features: set, bounded, raised, scaled or removed.

edit(sae, {123: 8.0, 77: "off", 45: ("at_most", 2.0), 9: ("times", 0.5)})
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from fgsteer.errors import ArgumentError, PairingError, SelectionError, SteeringError
from fgsteer.errors.checks import checked, describe_value, is_number, is_whole_number
from fgsteer.interventions.base import Intervention, InterventionFields, set_fields
from fgsteer.interventions.gates import Gate
from fgsteer.interventions.kernel import Update
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.values import Scalar, as_tensor, finite_scalar
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE

EDITS = ("targets", "at_least", "at_most", "plus", "times")
WORDS = {"set": "targets", "at_least": "at_least", "at_most": "at_most", "plus": "plus", "times": "times"}
Edit = Scalar | str | tuple[str, Scalar]
"""What becomes of a feature: an activation, "off", or a word of set, at_least, at_most, plus, times with a number."""


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ClampFeature(Intervention):
    """Changes feature activations, and keeps the SAE's error: ``h' = h + Σⱼ (f'ⱼ − fⱼ(h)) W_dec[j]``.

    f'ⱼ is the target, the activation within its bounds, ``relu(fⱼ + plus)``, or ``times·fⱼ``. Every fⱼ is read from the
    same h, so that a clamp of several features is joint. The features of a transcoder are read where it reads, as the
    sublayer gets it, and written where it writes; what the transcoder does not predict is kept.

    Args:
        sae: The SAE whose features are changed; it must have been trained at ``hookpoint``.
        targets: {feature id: activation that it is set to}.
        at_least: {feature id: lowest activation} (the minimum clamp of AxBench, arXiv 2501.17148).
        at_most: {feature id: highest activation}.
        plus: {feature id: what is added to the activation}, which never becomes negative by it (YaPO,
            arXiv 2601.08441).
        times: {feature id: factor of the activation}.

    The other arguments are those of ``Intervention``.

    Raises:
        SelectionError: Nothing is changed, or something of a feature that the SAE does not have.
        ArgumentError: An argument is no mapping of whole numbers to numbers.
        SteeringError: A number is not finite, a feature is changed in two ways, or its lowest activation is above its
            highest.
        PairingError: The SAE belongs to another hookpoint, or is a transcoder that reads above the place where it
            writes.
    """

    sae: SAE
    targets: Mapping[int, Scalar] | None = None
    at_least: Mapping[int, Scalar] | None = None
    at_most: Mapping[int, Scalar] | None = None
    plus: Mapping[int, Scalar] | None = None
    times: Mapping[int, Scalar] | None = None

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            sae: SAE,
            targets: Mapping[int, Scalar] | None = None,
            at_least: Mapping[int, Scalar] | None = None,
            at_most: Mapping[int, Scalar] | None = None,
            plus: Mapping[int, Scalar] | None = None,
            times: Mapping[int, Scalar] | None = None,
            **common: Unpack[InterventionFields],
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        set_fields(self, **{name: _checked_edits(name, getattr(self, name)) for name in EDITS})
        if not self.features:
            raise SelectionError("no targets", "at least one {feature id: activation}", "name a feature to clamp")
        for feature in self.features:
            self.sae.direction(feature)
        self._check_each_once()
        if self.sae.reads is not None and not self.sae.reads.precedes(self.hookpoint):
            raise PairingError(
                f"a transcoder that reads at {self.sae.reads} and writes at {self.hookpoint}",
                "a transcoder that reads before it writes",
                "correct reads= or hookpoint= of the SAE",
            )
        if self.hookpoint != self.sae.hookpoint:
            raise PairingError(
                f"a feature clamp at {self.hookpoint}",
                f"a clamp at {self.sae.hookpoint}, where its SAE was trained",
                "pass hookpoint=sae.hookpoint",
            )

    def _check_each_once(self) -> None:
        """Raises SteeringError for a feature that is changed in two ways, other than between two bounds."""
        for feature in self.features:
            ways = {name: edits[feature] for name, edits in self.edits.items() if feature in edits}
            if list(ways) == ["at_least", "at_most"]:
                low, high = (float(torch.as_tensor(bound, device="cpu").detach()) for bound in ways.values())
                if low > high:
                    raise SteeringError(
                        f"feature {feature} at least {low:g} and at most {high:g}",
                        "a lowest activation that is not above the highest",
                        "exchange the two",
                    )
            elif len(ways) > 1:
                raise SteeringError(
                    f"feature {feature} in {' and '.join(ways)}",
                    "one change of each feature, or two bounds",
                    "compose two interventions in a list to change it twice",
                )

    @property
    def edits(self) -> dict[str, Mapping[int, Scalar]]:
        """What is changed: those of ``targets``, ``at_least``, ``at_most``, ``plus`` and ``times`` that were given."""
        return {name: edits for name in EDITS if (edits := getattr(self, name))}

    @property
    def features(self) -> list[int]:
        """The features that are changed."""
        return list(dict.fromkeys(j for edits in self.edits.values() for j in edits))

    def _values(self) -> dict[str, Any]:
        tensors = {name: value for name, value in vars(self.sae).items() if isinstance(value, Tensor)}
        return tensors | {f"{name} of feature {j}": v for name, edits in self.edits.items() for j, v in edits.items()}

    def detach(self) -> ClampFeature:
        """The same intervention with its present values, as floats."""
        if not self.trained:
            return self
        present: dict[str, Any] = {
            name: {j: v.detach() if isinstance(v, Tensor) else v for j, v in edits.items()}
            for name, edits in self.edits.items()
        }
        return replace(self, **present)

    @property
    def source(self) -> Hookpoint | None:
        """Where a transcoder reads; None for an SAE."""
        return self.sae.reads

    @property
    def d_model(self) -> int:
        """The width of the SAE's decoder rows."""
        return self.sae.d_model

    def update(self) -> Update:
        """The update with w = W_dec[j] and read = fⱼ(h); each change is a term, ``plus`` two of them."""
        terms = self.terms()
        features = [feature for feature, *_ in terms]
        write = self.sae.W_dec[features][None].float()
        const, lam = (torch.cat([as_tensor(term[n], write) for term in terms], 1) for n in (1, 2))
        limits = [write.new_tensor([[term[n] for term in terms]]) for n in (3, 4)]
        bounded = bool(torch.isfinite(torch.cat(limits)).any())
        lo, hi = limits if bounded else (None, None)
        competing = self.sae.activation == "topk"
        return Update(
            write=write,
            const=const,
            lam=lam,
            sae=self.sae if competing else self.sae.restrict(features),
            features=tuple(features) if competing else (),
            lo=lo,
            hi=hi,
        )

    def terms(self) -> list[tuple[int, Scalar, Scalar, float, float]]:
        """(feature, const, λ, lo, hi) of each term."""
        inf = math.inf
        terms: list[tuple[int, Scalar, Scalar, float, float]] = []
        terms += [(j, target, 1.0, -inf, inf) for j, target in (self.targets or {}).items()]
        terms += [(j, low, 1.0, 0.0, inf) for j, low in (self.at_least or {}).items()]
        terms += [(j, high, 1.0, -inf, 0.0) for j, high in (self.at_most or {}).items()]
        for j, amount in (self.plus or {}).items():
            terms += [(j, amount, 0.0, -inf, inf), (j, -amount, 1.0, 0.0, inf)]
        terms += [(j, 0.0, 1.0 - factor, -inf, inf) for j, factor in (self.times or {}).items()]
        return terms


def _checked_edits(name: str, edits: object) -> dict[int, Scalar] | None:
    """Numbers by feature id. Raises ArgumentError for another mapping."""
    if edits is None:
        return None
    if not isinstance(edits, Mapping):
        raise ArgumentError(
            f"{name} that are {describe_value(edits)}",
            f"{name} as a dictionary {{feature id: activation}}",
            f"pass {name}={{42: 8.0}}",
        )
    for feature in edits:
        if not is_whole_number(feature):
            raise ArgumentError(f"feature id {describe_value(feature)}", "a whole number", f"pass {name}={{42: 8.0}}")
    return {int(feature): finite_scalar(f"{name} of feature {feature}", t) for feature, t in edits.items()}


@checked
def edit(
    sae: SAE,
    edits: Mapping[int, Edit],
    *,
    scope: Scope = "all",
    bos: bool = False,
    when: Gate | None = None,
) -> ClampFeature:
    """Edit an SAE's features as one says it: ``h' = h + Σⱼ (f'ⱼ − fⱼ(h)) W_dec[j]``, the SAE's error kept.

    | what | the activation f becomes |
    |---|---|
    | ``8.0`` or ``("set", 8.0)`` | 8 |
    | ``"off"`` | 0 |
    | ``("at_least", 2.0)`` | max(f, 2) |
    | ``("at_most", 2.0)`` | min(f, 2) |
    | ``("plus", 3.0)`` | relu(f + 3) |
    | ``("times", 0.5)`` | f / 2 |

    Args:
        sae: The SAE; edits act at its hookpoint.
        edits: {feature id: what becomes of its activation}.
        scope: The tokens that are changed, as in ``Intervention``.
        bos: Whether a start token at position 0 is changed too.
        when: The gate under which features are changed, as in ``Intervention``.

    Returns:
        The intervention.

    Raises:
        SteeringError: An edit is none of these.
        SelectionError: There is no edit, or one of a feature that the SAE does not have.
    """
    given: dict[str, dict[int, Scalar]] = {}
    for feature, what in edits.items():
        word, amount = _parse_edit(feature, what)
        given.setdefault(word, {})[feature] = amount
    return ClampFeature(sae=sae, hookpoint=sae.hookpoint, scope=scope, bos=bos, when=when, **given)  # type: ignore[arg-type]


def _parse_edit(feature: int, what: Any) -> tuple[str, Scalar]:
    """The argument of ``ClampFeature`` and the number of an edit. Raises SteeringError for what is none."""
    if what == "off" and isinstance(what, str):
        return "targets", 0.0
    if is_number(what) or isinstance(what, Tensor):
        return "targets", what
    if isinstance(what, tuple | list) and len(what) == 2 and isinstance(what[0], str) and what[0] in WORDS:
        return WORDS[what[0]], what[1]
    raise SteeringError(
        f"{describe_value(what)} for feature {feature}",
        f'a number, "off", or a pair of one of {", ".join(WORDS)} and a number',
        'write {42: 8.0}, {42: "off"} or {42: ("at_most", 2.0)}',
    )
