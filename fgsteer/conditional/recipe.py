"""What a rule of conditional steering gives: interventions that compose, and how well their gate is known to decide.

guard = Conditional([vec.add(1.0, when=gate)], gate=gate, fitted=scores, held_out=others)
"""

from __future__ import annotations

from collections.abc import Iterable

from fgsteer.errors.wording import count
from fgsteer.evaluation.metrics.gate_fit import GateScores
from fgsteer.interventions.base import Intervention
from fgsteer.interventions.gates import Gate


class Conditional(list[Intervention]):
    """Interventions that compose and share a gate: a list for ``steering=`` and ``save_steering``.

    Attributes:
        gate: The gate that decides for each prompt.
        fitted: How well it tells prompts apart, on the half of them that chose it, which flatters it.
        held_out: The same on the other half.
    """

    is_one_entry = True  # also where there are as many prompts as interventions

    def __init__(
        self, interventions: Iterable[Intervention], *, gate: Gate, fitted: GateScores, held_out: GateScores
    ) -> None:
        super().__init__(interventions)
        self.gate, self.fitted, self.held_out = gate, fitted, held_out

    def __repr__(self) -> str:
        return f"Conditional({count(len(self), 'intervention')}, gate={self.gate!r}, held_out={self.held_out!r})"
