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
from fgsteer.interventions.kernel import ReadyUpdate, Update, apply
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
        decided: Where it acts in passes that go on from the last one, where that is the same in all of them: a mask, or
            True for everywhere, or False for nowhere.
        is_summed_up: Whether it was looked at whether ``decided`` is the same everywhere.
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
    decided: Tensor | bool | None = None
    is_summed_up: bool = False
    ready_key: tuple[torch.device, torch.dtype, int] | None = None
    ready: tuple[ReadyUpdate, Tensor] | None = None

    def apply_to(self, h: Float[Tensor, "batch tokens d_model"], repeats: int) -> Tensor:
        """The updated hidden states; h itself where the pass holds none of the tokens."""
        if self.tokens.empty:
            return h
        self.ran = True
        update, row_mask = self.prepare(h.device, h.dtype, repeats)
        where, gate = self._where(h, row_mask)
        if self._is_closed:
            return h
        source = None if self.source is None else self.source.noted().to(h.device)
        prompt = None if self.place is None else self.place.noted().to(h.device)
        if prompt is not None:
            read = ~prompt.isnan().unsqueeze(-1)  # of a prompt that has a token
            where = read if where is None else where & read
        changed = apply(h, update, where, source, prompt)
        if self.watcher is not None:
            at, opened = (None if mask is None else mask.squeeze(-1).expand(h.shape[:2]) for mask in (where, gate))
            before, after = h.detach(), changed.detach()
            self.watcher.append(Step(self.number, self.hookpoint, update, before, after, at, opened, source, prompt))
        return changed

    @property
    def _is_closed(self) -> bool:
        """Whether its gate is known to be open nowhere, where nobody asks for more than that."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.node is None or not self.node.is_closed:
            return False
        return self.watcher is None and self.source is None and self.place is None

    def go_on(self, h: Float[Tensor, "batch tokens d_model"], repeats: int) -> Tensor:
        """As ``apply_to``, in a pass that goes on from the last one."""
        if self.decided is None:
            return self.apply_to(h, repeats)
        if not self.is_summed_up:
            self.decided, self.is_summed_up = _summary(self.decided), True
        where = self.decided
        if where is False or self.tokens.empty:
            return h
        return apply(h, self.prepare(h.device, h.dtype, repeats)[0], None if where is True else where)

    def _where(self, h: Tensor, row_mask: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The tokens (batch, tokens, 1), or rows (batch, 1, 1), at which it acts, and where its gate is open.

        None is for all.
        """
        where, gate = self.tokens.mask, None
        stays = where is None and self.source is None and self.place is None and self.watcher is None
        if where is not None:
            where = where.to(h.device).unsqueeze(-1)
        if self.needs_row_mask:
            where = row_mask if where is None else where & row_mask
        if self.node is not None:
            gate = self.node.open_for(h)
            where = gate if where is None else where & gate
            stays = stays and self.node.is_of_prompts
        if torch.compiler.is_compiling() or not stays:  # a compiled graph leaves no tensor behind
            self.decided = None
        else:
            self.decided, self.is_summed_up = True if where is None else where, where is None
        return where, gate

    def prepare(self, device: torch.device, dtype: torch.dtype, repeats: int = 1) -> tuple[ReadyUpdate, Tensor]:
        """The update and row mask for hidden states of a dtype on a device, each row repeated.

        Kept for later passes, unless values are trained: then each pass has its own values and graph.
        """
        key = (device, dtype, repeats)
        if self.ready is None or self.ready_key != key or self.remake is not None:
            update = self.update if self.remake is None else self.remake()
            row_mask = self.row_mask.repeat_interleave(repeats).to(device)[:, None, None]
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


def _summary(where: Tensor | bool) -> Tensor | bool:
    """A mask, or True or False where it is so everywhere; other devices than the CPU are not waited for."""
    if isinstance(where, bool) or where.device.type != "cpu":
        return where
    return bool(where.any()) and (bool(where.all()) or where)


class Site:
    """What happens at one hookpoint.

    Args:
        groups: What acts there.
        places: What is read before that.
        sources: What is kept after it.
    """

    def __init__(self, groups: Sequence[UpdateGroup], places: Sequence[Place], sources: Sequence[Source]) -> None:
        self.groups, self.places, self.sources = groups, places, sources
        self.places_of_tokens = [place for place in places if not place.reading.pooling]

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make what hidden states of a dtype on a device need, before any pass, so that no compiled graph does."""
        for place in self.places:
            place.prepare(device)
        for group in self.groups:
            group.prepare(device, dtype)
            if group.node is not None:
                group.node.prepare(device)

    def apply_to(self, h: Float[Tensor, "batch tokens d_model"], repeats: int) -> Tensor:
        """The hidden states after all groups, in order."""
        for place in self.places:
            place.value = place.read(h)
        for group in self.groups:
            h = group.apply_to(h, repeats)
        for source in self.sources:
            source.value = h
        return h

    def go_on(self, h: Float[Tensor, "batch tokens d_model"], repeats: int) -> Tensor:
        """As ``apply_to``, in a pass that goes on from the last one: what was read of prompts stands."""
        for place in self.places_of_tokens:
            place.value = place.read(h)
        for group in self.groups:
            h = group.go_on(h, repeats)
        for source in self.sources:
            source.value = h
        return h


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
            row_mask = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
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
