"""Texts that begin alike, as two answers to one prompt do: what they share is run once.

The common prefixes of a batch go through the model with a cache of keys and values. The
cache is repeated for the texts of each prefix, and only what follows is run for each of them.
Attention, positions and padding are those of ``generate`` after a left-padded prompt.

    for batch in batch_texts_with(choose_batching(model), model, reader, texts):
        values, index = record_selected(model, batch, hookpoints)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.activations.batches import Batch, Batching, batch_rows, mask_of, record_batch
from fgsteer.activations.pooling import PoolingIndex
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import TokenRow, pad
from fgsteer.models.claims import is_claimed
from fgsteer.models.hookpoints import Hookpoint, decoder_of, is_known
from fgsteer.models.properties import virtual_tokens

MIN_SAVED_SHARE = 0.25  # share of a chunk's tokens that sharing must save: two passes cost more than one
_LENGTH_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings that differ with the length of the longest row


@dataclass
class PrefixGroup:
    """Rows that share their first ``shared`` tokens, each at least one token longer; the longest has ``longest``."""

    rows: list[TokenRow]
    shared: int
    longest: int

    @property
    def saved(self) -> int:
        """Number of tokens that need not be run."""
        return (len(self.rows) - 1) * self.shared


@dataclass(frozen=True, eq=False)
class SharedBatch:
    """Prefixes padded on the left, and what follows them in each row, padded on the right.

    Row r follows prefix ``prefix_of[r]``. ``prefixes.selected`` marks the tokens of a prefix that any of its rows
    selects, ``seen`` those that each row selects in its own prefix.
    """

    prefixes: Batch
    rest: Batch
    prefix_of: Int[Tensor, " rows"]
    seen: Bool[Tensor, "rows prefix_tokens"]

    @property
    def rows(self) -> Sequence[TokenRow]:
        """The texts, prefix and rest."""
        return self.rest.rows

    @property
    def tokens(self) -> int:
        """Number of tokens with their padding, as if nothing were shared: what ``batch_tokens`` bounds."""
        return len(self.rows) * (self.prefixes.ids.shape[1] + self.rest.ids.shape[1])

    def part(self, rows: slice) -> SharedBatch:
        """Return some of its rows, with the prefixes that they begin with."""
        prefix_of = self.prefix_of[rows]  # in order
        heads = slice(int(prefix_of[0]), int(prefix_of[-1]) + 1)
        prefixes, rest = (
            Batch(b.ids[part], b.attention[part], b.selected[part], b.rows[part])
            for b, part in ((self.prefixes, heads), (self.rest, rows))
        )
        return SharedBatch(prefixes, rest, prefix_of - heads.start, self.seen[rows])


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two rows."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def group_by_prefix(rows: Iterable[TokenRow]) -> list[PrefixGroup]:
    """Put every row into one group; the prefix of a group of several is at least half of each of them."""
    groups: list[PrefixGroup] = []
    for row in sorted(rows, key=lambda row: tuple(row.ids)):
        length = len(row.ids)
        if groups:
            last = groups[-1]
            shared = _common_length(last.rows[0].ids[: last.shared], row.ids[:-1])
            if 2 * shared >= max(length, last.longest):
                last.rows.append(row)
                last.shared, last.longest = shared, max(length, last.longest)
                continue
        groups.append(PrefixGroup([row], length - 1, length))
    return groups


def batch_rows_by_prefix(
    rows: Sequence[TokenRow], *, batch_tokens: int, pad_id: int, device: torch.device | str
) -> Iterator[Batch | SharedBatch]:
    """Yield batches as ``batch_rows`` does, but with rows that share a prefix together, where that saves a quarter.

    At most ``batch_tokens`` tokens are run for a batch. Those that would be run if nothing were shared, for which
    the cache has room, are at most twice as many.
    """
    groups = [part for group in group_by_prefix(rows) for part in _split_to_fit(group, batch_tokens)]
    alone = [g.rows[0] for g in groups if not g.saved]
    if sum(g.saved for g in groups) < MIN_SAVED_SHARE * sum(len(row.ids) for row in rows):
        groups, alone = [], list(rows)
    chosen: list[PrefixGroup] = []
    for group in sorted((g for g in groups if g.saved), key=lambda g: g.longest, reverse=True):
        if chosen and not _fit([*chosen, group], batch_tokens):
            yield _shared_batch(chosen, pad_id, device)
            chosen = []
        chosen.append(group)
    if chosen:
        yield _shared_batch(chosen, pad_id, device)
    alone.sort(key=lambda row: (len(row.ids), row.index))
    yield from batch_rows(alone, batch_tokens=batch_tokens, pad_id=pad_id, device=device)


def _fit(groups: Sequence[PrefixGroup], batch_tokens: int) -> bool:
    """Tell whether groups fit into a batch."""
    rows = sum(len(g.rows) for g in groups)
    head, tail = max(g.shared for g in groups), max(g.longest - g.shared for g in groups)
    return len(groups) * head + rows * tail <= batch_tokens and rows * (head + tail) <= 2 * batch_tokens


def _split_to_fit(group: PrefixGroup, batch_tokens: int) -> Iterator[PrefixGroup]:
    """Yield a group in parts that fit into a batch, except that a part of one row may be larger."""
    rest = max(1, group.longest - group.shared)
    size = max(1, min((batch_tokens - group.shared) // rest, 2 * batch_tokens // max(1, group.longest)))
    for start in range(0, len(group.rows), size):
        yield PrefixGroup(group.rows[start : start + size], group.shared, group.longest)


def _shared_batch(groups: Sequence[PrefixGroup], pad_id: int, device: torch.device | str) -> SharedBatch:
    """Make one batch of groups."""
    numbered = [(number, g.shared, row) for number, g in enumerate(groups) for row in g.rows]
    rows = [row for _, _, row in numbered]
    prefix_of = torch.tensor([number for number, _, _ in numbered])
    heads = pad([g.rows[0].ids[: g.shared] for g in groups], pad_id, side="left")
    tails = pad([row.ids[shared:] for _, shared, row in numbered], pad_id)
    # positions are counted from where the prefix ends: one below 0 is in it, and indexes it from its end
    positions = [[t - shared for t in row.selected] for _, shared, row in numbered]
    seen = mask_of([[t for t in selected if t < 0] for selected in positions], heads[0].shape[1])
    selected_after = mask_of([[t for t in selected if t >= 0] for selected in positions], tails[0].shape[1])
    selected_by_any = torch.zeros_like(heads[0]).index_add_(0, prefix_of, seen.long()) > 0
    return SharedBatch(
        Batch(*heads, selected_by_any, [g.rows[0] for g in groups]).to(device),
        Batch(*tails, selected_after, rows).to(device),
        prefix_of.to(device),
        seen.to(device),
    )


def record_selected(
    model: nn.Module, batch: Batch | SharedBatch, hookpoints: Iterable[Hookpoint]
) -> tuple[dict[Hookpoint, Float[Tensor, "n width"]], PoolingIndex]:
    """Record the activations (n, width) of the selected tokens of a batch, each once, and which text reads which.

    Raises and warns as ``record`` does.
    """
    if isinstance(batch, Batch):
        acts = record_batch(model, batch, hookpoints)
        return {at: h[batch.selected.to(h.device)] for at, h in acts.items()}, PoolingIndex.from_mask(batch.selected)
    from transformers import DynamicCache

    prefixes, rest = batch.prefixes, batch.rest
    cache = DynamicCache(config=decoder_of(model).config)
    before = record(model, prefixes.ids, prefixes.attention, hookpoints, cache)
    cache.reorder_cache(batch.prefix_of)
    attention = torch.cat([prefixes.attention[batch.prefix_of], rest.attention], 1)
    after = record(model, rest.ids, attention, hookpoints, cache)
    parts = [
        {at: h[part.selected.to(h.device)] for at, h in acts.items()}
        for part, acts in ((prefixes, before), (rest, after))
    ]
    return {at: torch.cat([part[at] for part in parts]) for at in after}, pooling_index(batch)


def pooling_index(batch: SharedBatch) -> PoolingIndex:
    """Tell which row reads which of the prefixes' selected tokens, and then of the rest's."""
    selected = batch.prefixes.selected
    number = selected.flatten().cumsum(0).view(selected.shape) - 1
    owner, position = batch.seen.nonzero(as_tuple=True)
    owner_after = batch.rest.selected.nonzero()[:, 0]
    following = torch.arange(len(owner_after), device=owner_after.device) + selected.sum()
    source = torch.cat([number[batch.prefix_of[owner], position], following])
    return PoolingIndex(len(batch.rows), torch.cat([owner, owner_after]), source)


def choose_batching(model: nn.Module) -> Batching[Batch | SharedBatch]:
    """Return ``batch_rows_by_prefix`` where a cached prefix changes nothing but speed, else ``batch_rows``.

    That is in blocks that ``resolve`` knows, without rotary embeddings that depend on the batch, and
    outside ``steer``, whose scopes tell a prompt by its first pass.
    """
    rotary = str(getattr(decoder_of(model).config, "rope_parameters", ""))
    depends_on_length = any(kind in rotary for kind in _LENGTH_DEPENDENT)
    is_plain = is_known(model) and not depends_on_length and not virtual_tokens(model)
    return batch_rows_by_prefix if is_plain and not is_claimed(model) else batch_rows
