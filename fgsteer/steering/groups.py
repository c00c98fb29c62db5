"""The updates of one steer block: which interventions act together, at what, for which rows and tokens.

groups = grouped([[add], [], [clamp, add]])
h = groups[0].act(h, repeats=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.interventions import Intervention, Scope, Update, apply, stack
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.steering.positions import Place
from fgsteer.steering.ranges import check_amount, model_dtype, reach


@dataclass(eq=False)
class Group:
    """One update at one hookpoint, the tokens it is for, and whether any pass came by."""

    hookpoint: Hookpoint
    place: Place
    update: Update
    remake: Callable[[], Update] | None  # the update anew, where a value of it is trained
    serves: Tensor  # mask (rows,) of the rows it is for
    select: bool  # whether the mask must be applied: the update has one row, for some of several
    reached: bool = False
    key: tuple[torch.device, torch.dtype, int] | None = None  # what it was made ready for
    ready: tuple[Update, Tensor] | None = None

    def act(self, h: Float[Tensor, "batch tokens d_model"], repeats: int) -> Tensor:
        """The updated hidden states; h itself where the pass holds none of the tokens."""
        if self.place.empty:
            return h
        self.reached = True
        update, serves = self.prepare(h.device, h.dtype, repeats)
        where = self.place.mask
        if where is not None:
            where = where.to(h.device)
        if self.select:
            rows = serves[:, None]
            where = rows.expand(h.shape[:2]) if where is None else where & rows
        return apply(h, update, where)

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> tuple[Update, Tensor]:
        """The update and row mask for hidden states of a dtype on a device, each row repeated.

        Kept for later passes, unless values are trained: then each pass has its own values and graph.
        """
        key = (device, dtype, repeats)
        if self.ready is None or self.key != key or self.remake is not None:
            update = self.update if self.remake is None else self.remake()
            serves = self.serves.repeat_interleave(repeats).to(device)
            self.key, self.ready = key, (update.prepare(device, dtype, repeats), serves)
        return self.ready

    def touched(self) -> bool:
        """Whether it has changed any token. Waits for the device."""
        met = self.place.met
        return self.reached and (met if isinstance(met, bool) else bool((met.cpu() & self.serves).any()))


def grouped(rows: Sequence[Sequence[Intervention]]) -> list[Group]:
    """Updates in order of application: the n-th intervention of every row at a hookpoint together."""
    table: dict[tuple[Hookpoint, int, Scope, bool], list[Intervention | None]] = {}
    for number, items in enumerate(rows):
        depth: dict[Hookpoint, int] = {}
        for item in items:
            turn = depth.get(item.hookpoint, 0)
            depth[item.hookpoint] = turn + 1
            key = (item.hookpoint, turn, item.scope, item.bos)
            table.setdefault(key, [None] * len(rows))[number] = item
    places: dict[tuple[Scope, bool], Place] = {}
    groups = []
    for (hookpoint, _, scope, bos), column in sorted(table.items(), key=lambda entry: entry[0][:2]):
        place = places.setdefault((scope, bos), Place(scope, bos))
        trained = any(item is not None and item.trained for item in column)
        for number, (update, numbers) in enumerate(stack(column)):
            remake = partial(_restack, column, number) if trained else None
            serves = torch.zeros(len(rows), dtype=torch.bool)
            serves[numbers] = True
            select = len(rows) > 1 and len(update.write) == 1
            groups.append(Group(hookpoint, place, update, remake, serves, select))
    return groups


def _restack(column: Sequence[Intervention | None], number: int) -> Update:
    """One of the updates of a column, from the values that its interventions have now."""
    return stack(column)[number][0]


def check_amounts(model: nn.Module, groups: Sequence[Group]) -> None:
    """Refuse a set amount at which the model's activations would overflow. Raises SteeringError."""
    dtype = model_dtype(model)
    for group in groups:
        check_amount(reach(group.update), dtype, group.update.write.shape[-1], f"an intervention at {group.hookpoint}")
