"""The updates of one steer block: which interventions act together, at what, for which rows and tokens.

groups = group_by_update([[add], [], [clamp, add]])
h = groups[0].apply_to(h, repeats=1)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.interventions.base import Intervention
from fgsteer.interventions.gates import Gate, Reading
from fgsteer.interventions.kernel import Update, apply
from fgsteer.interventions.scopes import Scope
from fgsteer.interventions.stacking import stack
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.steering.gating import GateNode, Place, Source
from fgsteer.steering.masks import ScopeMask
from fgsteer.steering.ranges import activation_dtype, change_bound, check_amount
from fgsteer.steering.watching import Step


@dataclass(eq=False)
class UpdateGroup:
    """One update at one hookpoint, the tokens and rows that it is for, and whether any pass came by.

    Args:
        hookpoint: Where it acts.
        tokens: The tokens that it is for.
        update: What it does.
        remake: A function that makes the update anew, where one of its values is trained.
        row_mask: The rows that it is for, (rows,).
        needs_row_mask: Whether ``row_mask`` must be applied: the update has one row, for some of several.
        gate: The gate under which it acts, or None.
        node: The gate as hooks evaluate it.
        source: What a transcoder reads, as hooks keep it.
        reading: What of the prompt decides the strength, or None.
        place: What was read of the prompts, as hooks keep it.
        watcher: Where each of its steps is noted, or None.
        number: Its number among the updates of the block.
        ran: Whether any pass held tokens of the scope.
        ready_key: The device, dtype and repeats that ``ready`` was made for.
        ready: The update and row mask as the running passes need them.
    """

    hookpoint: Hookpoint
    tokens: ScopeMask
    update: Update
    remake: Callable[[], Update] | None
    row_mask: Tensor
    needs_row_mask: bool
    gate: Gate | None = None
    node: GateNode | None = None
    source: Source | None = None
    reading: Reading | None = None
    place: Place | None = None
    watcher: list[Step] | None = None
    number: int = 0
    ran: bool = False
    ready_key: tuple[torch.device, torch.dtype, int] | None = None
    ready: tuple[Update, Tensor] | None = None

    def apply_to(self, h: Float[Tensor, "batch tokens d_model"], repeats: int) -> Tensor:
        """The updated hidden states; h itself where the pass holds none of the tokens."""
        if self.tokens.empty:
            return h
        self.ran = True
        update, row_mask = self.prepare(h.device, h.dtype, repeats)
        where = self.tokens.mask
        if where is not None:
            where = where.to(h.device)
        if self.needs_row_mask:
            rows = row_mask[:, None]
            where = rows.expand(h.shape[:2]) if where is None else where & rows
        gate = None if self.node is None else self.node.open_for(h)
        if gate is not None:
            where = gate if where is None else where & gate
        source = None if self.source is None else self.source.noted().to(h.device)
        prompt = None if self.place is None else self.place.noted().to(h.device)
        if prompt is not None:
            read = ~prompt.isnan()  # of a prompt that has a token
            where = read.expand(h.shape[:2]) if where is None else where & read
        changed = apply(h, update, where, source, prompt)
        if self.watcher is not None:
            step = Step(self.number, self.hookpoint, update, h.detach(), changed.detach(), where, gate, source, prompt)
            self.watcher.append(step)
        return changed

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> tuple[Update, Tensor]:
        """The update and row mask for hidden states of a dtype on a device, each row repeated.

        Kept for later passes, unless values are trained: then each pass has its own values and graph.
        """
        key = (device, dtype, repeats)
        if self.ready is None or self.ready_key != key or self.remake is not None:
            update = self.update if self.remake is None else self.remake()
            row_mask = self.row_mask.repeat_interleave(repeats).to(device)
            self.ready_key, self.ready = key, (update.prepare(device, dtype, repeats), row_mask)
        return self.ready

    def has_changed_tokens(self) -> bool:
        """Whether it has changed any token. Waits for the device."""
        return self.ran and self._holds(self.tokens.rows_met)

    def met_short_prompts(self) -> bool:
        """Whether a prompt of its rows lacked a position of its scope. Waits for the device."""
        return self._holds(self.tokens.rows_short)

    def _holds(self, rows: Tensor | bool) -> bool:
        return rows if isinstance(rows, bool) else bool((rows.cpu() & self.row_mask).any())


def group_by_update(rows: Sequence[Sequence[Intervention]]) -> list[UpdateGroup]:
    """Updates in order of application: the n-th intervention of every row at a hookpoint together."""
    table: dict[tuple[Hookpoint, int, Scope, bool, Gate | None, Reading | None], list[Intervention | None]] = {}
    for number, items in enumerate(rows):
        depth: dict[Hookpoint, int] = {}
        for item in items:
            turn = depth.get(item.hookpoint, 0)
            depth[item.hookpoint] = turn + 1
            key = (item.hookpoint, turn, item.scope, item.bos, item.when, item.strength_reading)
            table.setdefault(key, [None] * len(rows))[number] = item
    masks: dict[tuple[Scope, bool], ScopeMask] = {}
    groups = []
    for (hookpoint, _, scope, bos, gate, reading), column in sorted(table.items(), key=lambda entry: entry[0][:2]):
        tokens = masks.setdefault((scope, bos), ScopeMask(scope, bos))
        trained = any(item is not None and item.trained for item in column)
        for number, (update, numbers) in enumerate(stack(column)):
            remake = partial(_restack, column, number) if trained else None
            row_mask = torch.zeros(len(rows), dtype=torch.bool)
            row_mask[numbers] = True
            needs_row_mask = len(rows) > 1 and len(update.write) == 1
            groups.append(
                UpdateGroup(hookpoint, tokens, update, remake, row_mask, needs_row_mask, gate, reading=reading)
            )
    return groups


def _restack(column: Sequence[Intervention | None], number: int) -> Update:
    """One of the updates of a column, from the values that its interventions have now."""
    return stack(column)[number][0]


def check_amounts(model: nn.Module, groups: Sequence[UpdateGroup]) -> None:
    """Raises SteeringError for a strength at which the model's activations would overflow."""
    dtype = activation_dtype(model)
    for group in groups:
        what = f"an intervention at {group.hookpoint}"
        check_amount(change_bound(group.update), dtype, group.update.write.shape[-1], what)
