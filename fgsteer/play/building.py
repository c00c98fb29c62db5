"""From a plan to what steers: vectors, gates and interventions, and random controls of them.

steering = build_steering(session, plan)              for steering= of fg.generate
control = build_control(session, plan)                the same along random directions of equal norm
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fgsteer.data.contrasts import ContrastSet
from fgsteer.errors import DataError
from fgsteer.interventions import ClampFeature, Gate, Intervention
from fgsteer.interventions.features import edit
from fgsteer.interventions.readings import Feature
from fgsteer.interventions.table import intervention_spec
from fgsteer.methods.controls import random_direction
from fgsteer.methods.sae_methods import from_features
from fgsteer.methods.table import spec
from fgsteer.play.plan import ContrastItem, EditItem, FeatureItem, GateSetting, Item, Plan, VectorItem
from fgsteer.play.session import PlaySession
from fgsteer.statistics.collecting import collect
from fgsteer.vector import SteeringVector


def build_vector(session: PlaySession, item: Item) -> SteeringVector:
    """The vector of an item. Raises DataError for an edit, which has none, and what the method raises."""
    if isinstance(item, EditItem):
        raise DataError(f"an edit of feature {item.feature}", "something with a vector", "add the feature itself")
    if isinstance(item, FeatureItem):
        return from_features(session.sae(item.sae), [item.feature], normalize=True)
    if isinstance(item, VectorItem):
        return session.vector(item.name)
    if isinstance(item, ContrastItem):
        key = (item.method, item.sae, item.positives, item.negatives, item.layer)
        return session.kept("contrast", key, lambda: _build_contrast(session, item))
    raise DataError(type(item).__name__, "an item of the page")


def _build_contrast(session: PlaySession, item: ContrastItem) -> SteeringVector:
    """The vector of two lists of texts, at norm 1 unless its operation has a scale of its own."""
    row = spec(item.method, "build")
    contrast = ContrastSet("typed", positives=item.positives, negatives=item.negatives)
    model, tokenizer = session.model, session.tokenizer
    if row.needs == "layer":
        at = session.hookpoint(item.sae, item.layer)
        stats = collect(model, tokenizer, contrast, hookpoints=[at], progress=False)
        vector = row.build(stats=stats, hookpoint=at)
    else:
        sae = session.sae(item.sae)
        vector = row.build(stats=collect(model, tokenizer, contrast, sae=sae, progress=False), sae=sae)
    return vector.unit() if row.unit else vector


def build_gate(session: PlaySession, setting: GateSetting | None) -> Gate | None:
    """The gate of a setting; None for none."""
    if setting is None:
        return None
    reading = Feature(session.sae(setting.sae), setting.feature)
    gate = (getattr(reading, setting.pooling)() if setting.pooling else reading) > setting.above
    return ~gate if setting.inverted else gate


def build_intervention(
    session: PlaySession, item: Item, *, chat: bool, amount: float | None = None, vector: SteeringVector | None = None
) -> Intervention:
    """The intervention of an item.

    Args:
        session: The session.
        item: The item.
        chat: Whether the prompt is a user's message, which decides the scope "auto".
        amount: Another amount than the item's.
        vector: Another vector than the item's.
    """
    strength = item.amount if amount is None else amount
    common: dict[str, Any] = {"scope": item.scope_in(chat), "when": build_gate(session, item.gate)}
    if isinstance(item, EditItem):
        return _edit(session, item, item.feature, strength, common)
    made = build_vector(session, item) if vector is None else vector
    return intervention_spec(item.op).make(made, strength, **common)


def _edit(session: PlaySession, item: EditItem, feature: int, strength: float, common: dict[str, Any]) -> ClampFeature:
    return edit(session.sae(item.sae), {feature: "off" if item.edit == "off" else (item.edit, strength)}, **common)


def build_steering(session: PlaySession, plan: Plan) -> list[Intervention]:
    """The interventions of a plan's active items, in their order."""
    return [build_intervention(session, item, chat=plan.chat) for item in plan.active]


def build_control(session: PlaySession, plan: Plan) -> list[Intervention]:
    """The same items along random directions of equal norm, with the same amounts, scopes and gates.

    An edit is made of another feature, drawn at random.
    """
    return [
        _control(session, item, plan.control_seed + number, chat=plan.chat) for number, item in enumerate(plan.active)
    ]


def _control(session: PlaySession, item: Item, seed: int, *, chat: bool) -> Intervention:
    if isinstance(item, EditItem):
        generator = torch.Generator().manual_seed(seed)
        drawn = int(torch.randint(session.sae(item.sae).d_sae, (1,), generator=generator))
        return build_intervention(session, replace(item, feature=drawn), chat=chat)
    vector = build_vector(session, item)
    drawn_vector = random_direction(vector.hookpoint, vector.d_model, seed).unit() * vector.norm
    control = replace(vector, direction=drawn_vector.direction.to(vector.direction), features={}, provenance={})
    return build_intervention(session, item, chat=chat, vector=control)
