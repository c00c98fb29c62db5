"""What callers pass as ``steering``, as a list of interventions for each row.

items_by_row([vec.add(8.0), None], per_row=None) == [[vec.add(8.0)], []]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fgsteer.errors import SteeringError
from fgsteer.errors.wording import a, count
from fgsteer.interventions.base import Intervention
from fgsteer.interventions.cached import CacheSteering, SteeringItem
from fgsteer.interventions.table import INTERVENTIONS
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Entry = SteeringItem | Sequence[SteeringItem] | None  # what steers one row or prompt
Steering = SteeringItem | Sequence[Entry] | None
_MAKE_ONE = "call .add(coefficient), .affine(alpha) or the like on a vector"


def interventions_of(entry: Any) -> list[Intervention]:
    """The interventions of one entry, where no text is generated. Raises SteeringError for anything else among them."""
    interventions: list[Intervention] = []
    for item in items_of(entry):
        if isinstance(item, CacheSteering):
            raise SteeringError(
                "a CacheSteering where forward passes read prompt and completion at once",
                "interventions on activations",
                "steer a cache where texts are generated: fg.generate, fg.stream, or model.generate in a steer block",
            )
        interventions.append(item)
    return interventions


def items_of(entry: Any) -> list[SteeringItem]:
    """What one entry steers with. Raises SteeringError for anything else among them."""
    if entry is None or isinstance(entry, SteeringItem):
        return [] if entry is None else [entry]
    items = list(entry) if isinstance(entry, list | tuple) else [entry]
    for item in items:
        if not isinstance(item, SteeringItem):
            kinds = ", ".join([*(spec.kind for spec in INTERVENTIONS), "CacheSteering"])
            raise SteeringError(f"{a(type(item).__name__)} among them", f"interventions ({kinds})", _MAKE_ONE)
    return items


def items_by_row(steering: Steering, per_row: bool | None) -> list[list[SteeringItem]]:
    """What steers each row; one row for a composition that serves every row. Raises SteeringError."""
    if steering is None:
        return [[]]
    if isinstance(steering, SteeringItem):
        return [[steering]]
    if not isinstance(steering, list | tuple):
        raise SteeringError(
            f"{a(type(steering).__name__)} to steer with", "an intervention or a list of them", _MAKE_ONE
        )
    by_row = any(not isinstance(entry, SteeringItem) for entry in steering) if per_row is None else per_row
    if not by_row or getattr(steering, "is_one_entry", False):
        return [items_of(steering)]
    return [items_of(entry) for entry in steering]


def checked_rows(model: PreTrainedModel, steering: Steering, per_row: bool | None) -> list[list[SteeringItem]]:
    """What steers each row, all of it checked against the model.

    Raises SteeringError for what is no intervention, HookpointError and PairingError for one that does not fit the
    model.
    """
    rows = items_by_row(steering, per_row)
    for item in {id(i): i for items in rows for i in items}.values():
        if isinstance(item, CacheSteering):
            check_pairing(model, Hookpoint(max(item.layers)), item.d_model, item.model_name, type(item).__name__)
            continue
        check_pairing(model, item.hookpoint, item.d_model, item.model_name, type(item).__name__)
        if item.source is not None:
            check_pairing(model, item.source, item.d_model, "", "transcoder")
        for reading in (part for each in item.readings for part in each.parts):
            check_pairing(model, reading.hookpoint, reading.d_model, "", type(reading).__name__)
    return rows


def is_per_prompt(steering: Steering, prompts: int, per_row: bool | None) -> bool | None:
    """Whether a list of steering has an entry for each prompt, as ``steer`` takes it; None for what is no list.

    Raises SteeringError where that cannot be told, and for another number of entries than prompts.
    """
    if not isinstance(steering, list | tuple):
        return None
    if getattr(steering, "is_one_entry", False):
        return False
    flat = all(isinstance(entry, SteeringItem) for entry in steering)
    if per_row is None and flat and len(steering) == prompts > 1:
        raise SteeringError(
            f"a list of {len(steering)} interventions for {prompts} prompts",
            "a list that says whether every prompt gets all of them or one each",
            "pass per_row=False to apply all of them to every prompt, per_row=True for one per prompt",
        )
    by_row = not flat if per_row is None else per_row
    if by_row and len(steering) != prompts:
        raise SteeringError(
            f"{count(len(steering), 'steering entry')} for {count(prompts, 'prompt')}",
            "one entry per prompt",
            "wrap interventions that compose in a list of their own: [[a, b], None, …]",
        )
    return by_row
