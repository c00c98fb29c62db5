"""What strengths cost: doses in units of the activations' norm, nats of neutral text, and where language collapses.

strength_curve(session, item, chat=False)       {"norm": 291.0, "points": [{"dose": 0.25, "cost": 0.13, …}, …], …}
measure_cost(session, plan)                     {"cost": 0.31, "doses": [0.34]}
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fgsteer.errors import DataError
from fgsteer.interventions import Intervention
from fgsteer.likelihood.scoring import cross_entropies
from fgsteer.likelihood.strengths import StrengthMeter, neutral_texts
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.play.building import build_intervention, build_steering, build_vector
from fgsteer.play.plan import Item, Plan, has_dose
from fgsteer.play.session import PlaySession
from fgsteer.vector import SteeringVector

DOSES = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)
"""Of the activations' norm: the strengths whose costs are measured."""
WORSE_COST, COLLAPSE_COST = 1.0, 2.0
"""Nats per token from which the language suffers, below which the page begins; and from which no language is left."""


def activation_norm(session: PlaySession, at: Hookpoint, vector: SteeringVector, *, chat: bool) -> float:
    """The median norm of the activations of neutral text where a vector acts; it is measured once."""

    def measure() -> float:
        return StrengthMeter(session.model, session.tokenizer, vector, vector.add, chat=chat).activation_norm

    return session.kept("norm", (str(at), chat), measure)


def unit_amount(session: PlaySession, item: Item, *, chat: bool) -> float:
    """The amount of an item at which its dose is 1: what it adds is as long as the activations are."""
    vector = build_vector(session, item)
    if item.op == "add_relative":
        return 1.0
    if not vector.norm:
        raise DataError("a vector of norm 0", "a vector that changes activations", "check what it was made of")
    return activation_norm(session, vector.hookpoint, vector, chat=chat) / vector.norm


def costs_of(session: PlaySession, entries: list[list[Intervention]], *, chat: bool) -> list[float]:
    """The rise in cross-entropy of neutral text under each entry, in nats per token."""
    texts = neutral_texts(chat=chat)

    def unsteered() -> float:
        return cross_entropies(session.model, session.tokenizer, texts, [None])[0]

    base = session.kept("cross-entropy", chat, unsteered)
    return [value - base for value in cross_entropies(session.model, session.tokenizer, texts, entries)]


def strength_curve(session: PlaySession, item: Item, *, chat: bool) -> dict[str, Any]:
    """What strengths of an item cost, where it adds something: at which language suffers, and at which it collapses.

    Returns:
        ``unit`` (the amount of dose 1), ``points`` (dose, amount, cost), and the doses at which the cost, between the
        measured ones a straight line, reaches ``WORSE_COST`` and ``COLLAPSE_COST``, as ``worse`` and ``collapse``; None
        where none does. Doses have the sign of the item's amount.
    """
    sign = -1.0 if item.amount < 0 else 1.0
    key = replace(item, amount=sign, on=True)

    def measure() -> list[tuple[float, float]]:
        unit = unit_amount(session, item, chat=chat)
        steered = [[build_intervention(session, item, chat=chat, amount=sign * dose * unit)] for dose in DOSES]
        return list(zip(DOSES, costs_of(session, steered, chat=chat), strict=True))

    points = session.kept("curve", (key, chat), measure)
    unit = unit_amount(session, item, chat=chat)
    return {
        "unit": unit,
        "points": [{"dose": sign * dose, "amount": sign * dose * unit, "cost": cost} for dose, cost in points],
        **{
            name: None if (dose := dose_at(points, cost)) is None else sign * dose
            for name, cost in (("worse", WORSE_COST), ("collapse", COLLAPSE_COST))
        },
    }


def dose_at(points: list[tuple[float, float]], cost: float) -> float | None:
    """The dose at which a cost is first reached, by straight lines between measured points from (0, 0) on."""
    before = (0.0, 0.0)
    for point in points:
        if point[1] >= cost:
            share = (cost - before[1]) / (point[1] - before[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def measure_cost(session: PlaySession, plan: Plan) -> dict[str, Any]:
    """What everything that steers costs together, in nats per token of neutral text, and each item's dose."""
    doses = []
    for item in plan.active:
        dosed = has_dose(item)
        doses.append(abs(item.amount) / unit_amount(session, item, chat=plan.chat) if dosed else None)
    steering = build_steering(session, plan)
    cost = costs_of(session, [steering], chat=plan.chat)[0] if steering else 0.0
    return {"cost": cost, "doses": doses}
