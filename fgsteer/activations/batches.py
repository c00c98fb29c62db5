"""Batches of token rows, of texts and of corpora."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import LabelledText, TokenReader, TokenRow, pad
from fgsteer.errors.checks import check_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing
from fgsteer.models.properties import context_window, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fgsteer.saes.sae import SAE

BATCH_TOKENS = 8192  # padded tokens in a batch by default
CPU_BATCH_TOKENS = 1024  # on a CPU: few enough for its caches, which is 1.3 to 1.6 times as fast
B_co = TypeVar("B_co", covariant=True)


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right: ids, attention mask and the mask of selected tokens, each (batch, tokens)."""

    ids: Int[Tensor, "batch tokens"]
    attention: Int[Tensor, "batch tokens"]
    selected: Bool[Tensor, "batch tokens"]
    rows: Sequence[TokenRow]

    @property
    def tokens(self) -> int:
        """Number of tokens with their padding, which ``batch_tokens`` bounds."""
        return self.ids.numel()

    @property
    def starts(self) -> Bool[Tensor, "batch tokens"]:
        """Mask of the special tokens that stand before the texts, of which ``bos`` decides."""
        return mask_of([range(row.start) for row in self.rows], self.ids.shape[1]).to(self.ids.device)

    def to(self, device: torch.device | str) -> Batch:
        """Return the same batch on another device."""
        return Batch(self.ids.to(device), self.attention.to(device), self.selected.to(device), self.rows)

    def part(self, rows: slice) -> Batch:
        """Return some of its rows, padded to the longest of them."""
        width = max(len(row.ids) for row in self.rows[rows])
        ids, attention, selected = (t[rows, :width] for t in (self.ids, self.attention, self.selected))
        return Batch(ids, attention, selected, self.rows[rows])


@runtime_checkable
class Batching(Protocol[B_co]):
    """A function that makes batches of a chunk's rows, as ``batch_rows`` and ``batch_rows_by_prefix`` do."""

    def __call__(
        self, rows: Sequence[TokenRow], *, batch_tokens: int, pad_id: int, device: torch.device | str
    ) -> Iterator[B_co]:
        """Yield batches of at most ``batch_tokens`` padded tokens, on a device."""


def default_batch_tokens(device: torch.device) -> int:
    """Return the padded tokens in a batch where the caller does not say: what suits the device."""
    return CPU_BATCH_TOKENS if device.type == "cpu" else BATCH_TOKENS


def tokens_in_batch(batch_tokens: int | None, device: torch.device) -> int:
    """Return ``batch_tokens``, or what suits the device for None. Raises DataError for less than 1."""
    if batch_tokens is None:
        return default_batch_tokens(device)
    check_range("batch_tokens", batch_tokens, 1, MAX_COUNT, whole=True)
    return batch_tokens


def mask_of(positions: Sequence[Sequence[int]], width: int) -> Bool[Tensor, "rows width"]:
    """Return a mask (rows, width) that is true at the given positions of each row."""
    mask = torch.zeros(len(positions), width, dtype=torch.bool)
    row_of = torch.tensor([number for number, row in enumerate(positions) for _ in row], dtype=torch.long)
    mask[row_of, torch.tensor([position for row in positions for position in row], dtype=torch.long)] = True
    return mask


def batch_rows(
    rows: Sequence[TokenRow], *, batch_tokens: int, pad_id: int, device: torch.device | str
) -> Iterator[Batch]:
    """Yield right-padded batches of at most ``batch_tokens`` padded tokens (one row at least), longest first."""
    end = len(rows)
    while end:
        longest = len(rows[end - 1].ids)
        size = max(1, batch_tokens // max(1, longest))
        chosen = rows[max(0, end - size) : end]
        end -= len(chosen)
        selected = mask_of([row.selected for row in chosen], longest)
        yield Batch(*pad([row.ids for row in chosen], pad_id), selected, chosen).to(device)


def batch_texts(
    model: nn.Module,
    reader: TokenReader,
    texts: Iterable[LabelledText],
    *,
    batch_tokens: int | None = None,
    first: int = 0,
) -> Iterator[Batch]:
    """Yield batches of texts, on the model's input device.

    Args:
        model: The model that is to read them.
        reader: Turns texts into token rows.
        texts: (prompt, completion, positive) of each text.
        batch_tokens: Padded tokens in a batch; None takes what suits the device.
        first: The number of the first text, by which messages name texts.
    """
    return batch_texts_with(batch_rows, model, reader, texts, batch_tokens=batch_tokens, first=first)


def batch_texts_with(
    batching: Batching[B_co],
    model: nn.Module,
    reader: TokenReader,
    texts: Iterable[LabelledText],
    *,
    batch_tokens: int | None = None,
    first: int = 0,
) -> Iterator[B_co]:
    """Yield batches of texts as ``batch_texts`` does, which ``batching`` makes of each chunk's rows."""
    pad_id = reader.tokenizer.pad_token_id
    pad_id = pad_id if isinstance(pad_id, int) else 0
    device = input_device(model)
    size = tokens_in_batch(batch_tokens, device)
    for rows in reader.rows(texts, first):
        yield from batching(rows, batch_tokens=size, pad_id=pad_id, device=device)


def record_batch(
    model: nn.Module, batch: Batch, hookpoints: Iterable[Hookpoint]
) -> dict[Hookpoint, Float[Tensor, "batch tokens d_model"]]:
    """Record a batch of texts, also inside ``steer`` blocks, which are told where each prompt ends."""
    with note_prompt_ends(model, [row.prompt_length for row in batch.rows]):
        return record(model, batch.ids, batch.attention, hookpoints)


def corpus_reader(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, sae: SAE, max_tokens: int, prepend_bos: bool | None
) -> TokenReader:
    """Return a reader of plain texts, all of their tokens, with BOS as in the SAE's training unless told otherwise.

    Raises PairingError for an SAE of another width.
    """
    check_pairing(model, sae.input_hookpoint, sae.d_model, sae.model_name, "SAE")
    prepend = sae.prepend_bos if prepend_bos is None else prepend_bos
    return TokenReader(tokenizer, bos=True, prepend_bos=prepend, max_tokens=max_tokens, window=context_window(model))


def batch_corpus(
    model: nn.Module,
    reader: TokenReader,
    texts: Iterable[str],
    sae: SAE,
    *,
    batch_tokens: int | None,
    first: int = 0,
) -> Iterator[tuple[Batch, Float[Tensor, "batch tokens d_model"], SAE]]:
    """Yield batches of plain texts, the activations that the SAE reads, and the SAE on their device in float32."""
    hookpoint, local_sae = sae.input_hookpoint, sae
    triples = (("", text, True) for text in texts)
    for batch in batch_texts(model, reader, triples, batch_tokens=batch_tokens, first=first):
        values = record_batch(model, batch, [hookpoint])[hookpoint]
        if local_sae.W_enc.device != values.device or local_sae.W_enc.dtype != torch.float32:
            local_sae = sae.to(values.device, torch.float32)
        yield batch, values, local_sae
