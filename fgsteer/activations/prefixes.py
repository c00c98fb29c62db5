"""Texts that begin alike, as two answers to one prompt do: what they share is run once.

The common prefixes of a batch go through the model with a cache of keys and values; the
cache is repeated for the texts of each prefix, and only what follows is run for each of them.
Attention, positions and padding are those of ``generate`` after a left-padded prompt.

    for batch in text_batches(model, reader, texts, arrange=arrange_for(model), ...):
        values, reads = read(model, batch, hookpoints)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.activations.batches import Batch, batch_rows, mask_of, record_batch
from fgsteer.activations.pooling import PoolingIndex
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import TokenRow, pad
from fgsteer.models.claims import is_claimed
from fgsteer.models.hookpoints import Hookpoint, decoder_of, is_known
from fgsteer.models.properties import virtual_tokens

MIN_SAVED_SHARE = 0.25  # share of a window's tokens that must be saved: two passes cost more than one of as many tokens
_BY_LENGTH = ("dynamic", "longrope")  # rotary embeddings that differ with the length of the longest row


@dataclass
class Group:
    """Rows that share their first ``shared`` tokens, each at least one token longer; ``longest`` of their lengths."""

    rows: list[TokenRow]
    shared: int
    longest: int

    @property
    def saved(self) -> int:
        """Tokens that need not be run."""
        return (len(self.rows) - 1) * self.shared


@dataclass(frozen=True, eq=False)
class SharedBatch:
    """Prefixes padded on the left, and what follows them in each row, padded on the right.

    ``prefixes.selected`` marks what any row reads of a prefix, ``seen`` what each row reads of its own.
    """

    prefixes: Batch
    rest: Batch
    prefix_of: Int[Tensor, " rows"]
    seen: Bool[Tensor, "rows prefix_tokens"]

    @property
    def rows(self) -> Sequence[TokenRow]:
        """The whole texts."""
        return self.rest.rows

    @property
    def tokens(self) -> int:
        """Tokens with their padding, as if nothing were shared: what ``batch_tokens`` bounds."""
        return len(self.rows) * (self.prefixes.ids.shape[1] + self.rest.ids.shape[1])

    def part(self, rows: slice) -> SharedBatch:
        """Some of its rows, with the prefixes that they begin with."""
        prefix_of = self.prefix_of[rows]  # in order
        kept = slice(int(prefix_of[0]), int(prefix_of[-1]) + 1)
        first, rest = (
            Batch(b.ids[some], b.attention[some], b.selected[some], b.rows[some])
            for b, some in ((self.prefixes, kept), (self.rest, rows))
        )
        return SharedBatch(first, rest, prefix_of - kept.start, self.seen[rows])


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two rows."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def group(rows: Iterable[TokenRow]) -> list[Group]:
    """Every row in one group; the prefix of a group of several is at least half of each of them."""
    groups: list[Group] = []
    for row in sorted(rows, key=lambda row: tuple(row.ids)):
        length = len(row.ids)
        if groups:
            last = groups[-1]
            shared = _common(last.rows[0].ids[: last.shared], row.ids[:-1])
            if 2 * shared >= max(length, last.longest):
                last.rows.append(row)
                last.shared, last.longest = shared, max(length, last.longest)
                continue
        groups.append(Group([row], length - 1, length))
    return groups


def batch_rows_by_prefix(
    rows: Sequence[TokenRow], *, batch_tokens: int, pad_id: int, device: torch.device | str
) -> Iterator[Batch | SharedBatch]:
    """Batches as of ``batch_rows``, but rows that share a prefix together, where a quarter of the tokens is saved.

    The tokens that are run are at most ``batch_tokens``, and those that would be if nothing were shared, which
    the cache has room for, at most twice as many.
    """
    groups = [part for whole in group(rows) for part in _parts(whole, batch_tokens)]
    alone = [g.rows[0] for g in groups if not g.saved]
    if sum(g.saved for g in groups) < MIN_SAVED_SHARE * sum(len(row.ids) for row in rows):
        groups, alone = [], list(rows)
    chosen: list[Group] = []
    for one in sorted((g for g in groups if g.saved), key=lambda g: g.longest, reverse=True):
        if chosen and not _fit([*chosen, one], batch_tokens):
            yield _shared_batch(chosen, pad_id, device)
            chosen = []
        chosen.append(one)
    if chosen:
        yield _shared_batch(chosen, pad_id, device)
    alone.sort(key=lambda row: (len(row.ids), row.index))
    yield from batch_rows(alone, batch_tokens=batch_tokens, pad_id=pad_id, device=device)


def _fit(groups: Sequence[Group], batch_tokens: int) -> bool:
    """Whether groups fit into a batch."""
    rows = sum(len(g.rows) for g in groups)
    head, tail = max(g.shared for g in groups), max(g.longest - g.shared for g in groups)
    return len(groups) * head + rows * tail <= batch_tokens and rows * (head + tail) <= 2 * batch_tokens


def _parts(whole: Group, batch_tokens: int) -> Iterator[Group]:
    """A group in parts that fit into a batch, but for those of one row."""
    rest = max(1, whole.longest - whole.shared)
    size = max(1, min((batch_tokens - whole.shared) // rest, 2 * batch_tokens // max(1, whole.longest)))
    for start in range(0, len(whole.rows), size):
        yield Group(whole.rows[start : start + size], whole.shared, whole.longest)


def _shared_batch(groups: Sequence[Group], pad_id: int, device: torch.device | str) -> SharedBatch:
    numbered = [(number, g.shared, row) for number, g in enumerate(groups) for row in g.rows]
    rows = [row for _, _, row in numbered]
    prefix_of = torch.tensor([number for number, _, _ in numbered])
    heads = pad([g.rows[0].ids[: g.shared] for g in groups], pad_id, side="left")
    tails = pad([row.ids[shared:] for _, shared, row in numbered], pad_id)
    # places are counted from where the prefix ends: one below 0 is in it, and indexes it from its end
    places = [[t - shared for t in row.selected] for _, shared, row in numbered]
    seen = mask_of([[t for t in place if t < 0] for place in places], heads[0].shape[1])
    read_after = mask_of([[t for t in place if t >= 0] for place in places], tails[0].shape[1])
    by_any = torch.zeros_like(heads[0]).index_add_(0, prefix_of, seen.long()) > 0
    return SharedBatch(
        Batch(*heads, by_any, [g.rows[0] for g in groups]).to(device),
        Batch(*tails, read_after, rows).to(device),
        prefix_of.to(device),
        seen.to(device),
    )


def read(
    model: nn.Module, batch: Batch | SharedBatch, hookpoints: Iterable[Hookpoint]
) -> tuple[dict[Hookpoint, Float[Tensor, "n width"]], PoolingIndex]:
    """Activations (n, width) of the tokens that a batch reads, each once, and which text reads which.

    Raises and warns as ``record`` does.
    """
    if isinstance(batch, Batch):
        acts = record_batch(model, batch, hookpoints)
        return {at: h[batch.selected.to(h.device)] for at, h in acts.items()}, PoolingIndex.from_mask(batch.selected)
    from transformers import DynamicCache

    first, rest = batch.prefixes, batch.rest
    cache = DynamicCache(config=decoder_of(model).config)
    before = record(model, first.ids, first.attention, hookpoints, cache)
    cache.reorder_cache(batch.prefix_of)
    attention = torch.cat([first.attention[batch.prefix_of], rest.attention], 1)
    after = record(model, rest.ids, attention, hookpoints, cache)
    parts = [
        {at: h[part.selected.to(h.device)] for at, h in acts.items()} for part, acts in ((first, before), (rest, after))
    ]
    return {at: torch.cat([part[at] for part in parts]) for at in after}, _reads(batch)


def _reads(batch: SharedBatch) -> PoolingIndex:
    """Who reads what of the prefixes' selected tokens, then of the rest's."""
    selected = batch.prefixes.selected
    number = selected.flatten().cumsum(0).view(selected.shape) - 1
    owner, place = batch.seen.nonzero(as_tuple=True)
    own = batch.rest.selected.nonzero()[:, 0]
    following = torch.arange(len(own), device=own.device) + selected.sum()
    source = torch.cat([number[batch.prefix_of[owner], place], following])
    return PoolingIndex(len(batch.rows), torch.cat([owner, own]), source)


def choose_batching(model: nn.Module) -> Callable[..., Iterator[Batch | SharedBatch]]:
    """``batch_rows_by_prefix`` where a cached prefix changes nothing but speed, else ``batch_rows``.

    That is in blocks that ``resolve`` knows, without rotary embeddings that depend on the batch, and
    outside ``steer``, whose scopes tell a prompt by its first pass.
    """
    rotary = str(getattr(decoder_of(model).config, "rope_parameters", ""))
    by_length = any(kind in rotary for kind in _BY_LENGTH)
    plain = is_known(model) and not by_length and not virtual_tokens(model)
    return batch_rows_by_prefix if plain and not is_claimed(model) else batch_rows
