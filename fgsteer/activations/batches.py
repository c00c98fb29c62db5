"""Batches of token rows, of texts and of corpora."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.activations.tokens import TokenReader, TokenRow, Triple, pad
from fgsteer.errors import DataError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import context_window, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE

from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.recording import record

# padded tokens in a batch by default; on a CPU few enough for its caches: 1.3 to 1.6 times as fast
BATCH_TOKENS = 8192


CPU_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids, attention mask and read mask, each (batch, tokens)."""

    ids: Int[Tensor, "batch tokens"]
    attention: Int[Tensor, "batch tokens"]
    selected: Bool[Tensor, "batch tokens"]
    rows: Sequence[TokenRow]

    @property
    def tokens(self) -> int:
        """Tokens with their padding, which ``batch_tokens`` bounds."""
        return self.ids.numel()

    @property
    def starts(self) -> Bool[Tensor, "batch tokens"]:
        """The special tokens that stand before the texts, of which ``bos`` decides."""
        return mask_of([range(row.start) for row in self.rows], self.ids.shape[1]).to(self.ids.device)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(self.ids.to(device), self.attention.to(device), self.selected.to(device), self.rows)

    def part(self, rows: slice) -> Batch:
        """Some of its rows, padded to the longest of them."""
        width = max(len(row.ids) for row in self.rows[rows])
        ids, attention, selected = (t[rows, :width] for t in (self.ids, self.attention, self.selected))
        return Batch(ids, attention, selected, self.rows[rows])


def record_batch(
    model: nn.Module, batch: Batch, hookpoints: Iterable[Hookpoint]
) -> dict[Hookpoint, Float[Tensor, "batch tokens d_model"]]:
    """``record`` of a batch of texts, for ``steer`` blocks around it too: its prompts end where they do."""
    with note_prompt_ends(model, [row.prompt_length for row in batch.rows]):
        return record(model, batch.ids, batch.attention, hookpoints)


def default_batch_tokens(device: torch.device) -> int:
    """Padded tokens in a batch where nothing is said of it."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


def mask_of(places: Sequence[Sequence[int]], width: int) -> Bool[Tensor, "rows width"]:
    """A mask that is true at the given places of each row."""
    mask = torch.zeros(len(places), width, dtype=torch.bool)
    owner = torch.tensor([number for number, row in enumerate(places) for _ in row], dtype=torch.long)
    mask[owner, torch.tensor([place for row in places for place in row], dtype=torch.long)] = True
    return mask


def batch_rows(
    rows: Sequence[TokenRow], *, batch_tokens: int, pad_id: int, device: torch.device | str
) -> Iterator[Batch]:
    """Right-padded batches of at most ``batch_tokens`` padded tokens (one row at least), longest first."""
    start = len(rows)
    while start:
        longest = len(rows[start - 1].ids)
        size = max(1, batch_tokens // max(1, longest))
        chosen = rows[max(0, start - size) : start]
        start -= len(chosen)
        selected = mask_of([row.selected for row in chosen], longest)
        yield Batch(*pad([row.ids for row in chosen], pad_id), selected, chosen).to(device)


def batch_texts(
    model: nn.Module,
    reader: TokenReader,
    texts: Iterable[Triple],
    *,
    batch_tokens: int | None = None,
    first: int = 0,
    arrange: Callable[..., Iterator[Any]] = batch_rows,
) -> Iterator[Any]:
    """Batches of (prompt, completion, positive), numbered from ``first``, on the model's input device.

    ``batch_tokens`` None takes what suits the device. ``arrange`` makes batches of a window's rows: ``batch_rows``
    by default, or ``prefixes.shared_batches``.
    """
    pad_id = reader.tokenizer.pad_token_id
    pad_id = pad_id if isinstance(pad_id, int) else 0
    device = input_device(model)
    if batch_tokens is not None and batch_tokens < 1:
        raise DataError(f"batch_tokens = {batch_tokens}", "at least 1, or None for what suits the device")
    batch_tokens = batch_tokens or default_batch_tokens(device)
    for rows in reader.rows(texts, first):
        yield from arrange(rows, batch_tokens=batch_tokens, pad_id=pad_id, device=device)


def batch_corpus(
    model: nn.Module,
    reader: TokenReader,
    texts: Iterable[str],
    sae: SAE,
    *,
    batch_tokens: int | None,
    first: int = 0,
) -> Iterator[tuple[Batch, Float[Tensor, "batch tokens d_model"], SAE]]:
    """Batches of plain texts with what the SAE reads there and the SAE beside it, in float32."""
    at, local = sae.input_hookpoint, sae
    triples = (("", text, True) for text in texts)
    for batch in batch_texts(model, reader, triples, batch_tokens=batch_tokens, first=first):
        values = record_batch(model, batch, [at])[at]
        if local.W_enc.device != values.device or local.W_enc.dtype != torch.float32:
            local = sae.to(values.device, torch.float32)
        yield batch, values, local


def corpus_reader(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sae: SAE, max_tokens: int, prepend_bos: bool | None
) -> TokenReader:
    """Reads plain texts whole, as the SAE was trained unless ``prepend_bos`` says otherwise.

    Raises PairingError for an SAE of another width.
    """
    check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    prepend = sae.prepend_bos if prepend_bos is None else prepend_bos
    return TokenReader(tokenizer, bos=True, prepend_bos=prepend, max_tokens=max_tokens, window=context_window(model))
