"""Which token of one model belongs to which of another, and the activations of both.

pairs = pair_texts(side_a, side_b, texts, max_tokens=128)
x, y = PairedActivations(side_a, side_b).read(pairs)[:2]                  (tokens, d_a) and (tokens, d_b)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from fgsteer.activations.batches import batch_rows, record_batch, tokens_in_batch
from fgsteer.activations.memory import AnyBatch, map_with_oom_backoff
from fgsteer.activations.tokens import TokenReader, TokenRow, special_starts
from fgsteer.data.chat import Text, check_text, refuse_one_text
from fgsteer.errors import DataError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.properties import context_window, input_device
from fgsteer.statistics.sinks import MASSIVE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_TOGETHER = 64  # texts whose activations are held at once, and of which the median norm is taken
MAX_TOKENS = 128  # tokens that are read of a text by default


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two models, with its tokenizer, and where its activations are read."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    hookpoint: Hookpoint


class PairedText(NamedTuple):
    """A text as both models read it: in each row the paired tokens are ``selected``, as many in both, in order."""

    source: TokenRow
    target: TokenRow


def pair_texts(
    source: Side, target: Side, texts: Sequence[Text], *, max_tokens: int | None, prepend_bos: bool | None = None
) -> list[PairedText]:
    """Pair the tokens of texts as two models read them.

    Where both tokenizers give the same ids, tokens pair one by one. Else a token of one pairs with the token of the
    other that ends at the same character of the text; where several end there, as the bytes of one character do, with
    the last of them. Position 0 and special tokens have no partner.

    Args:
        source: The model that is mapped from.
        target: The model that is mapped to.
        texts: Texts; conversations too, where both tokenizers give the same ids.
        max_tokens: Tokens that are read of a text, from its beginning.
        prepend_bos: As in ``collect``, for both models.

    Returns:
        A pair of rows for each text with a pair of tokens.

    Raises:
        DataError: There is no text, or tokens cannot be aligned: a tokenizer does not tell where its tokens stand, or
            two tokenizers differ on a conversation.
    """
    refuse_one_text(texts)
    texts = [check_text(text, f"text {number}") for number, text in enumerate(texts)]
    rows = [_rows_of(side, texts, max_tokens, prepend_bos) for side in (source, target)]
    sides = (source, target)
    share_ids = source.tokenizer is target.tokenizer or source.tokenizer.get_vocab() == target.tokenizer.get_vocab()
    specials = [special_starts(side.tokenizer) for side in sides]
    paired = []
    for index in sorted(set(rows[0]) & set(rows[1])):
        own = rows[0][index], rows[1][index]
        begun = [list(row.ids[row.start :]) for row in own]
        length = min(map(len, begun))
        if share_ids and begun[0][:length] == begun[1][:length]:
            places = [(own[0].start + n, own[1].start + n) for n in range(length)]
        else:
            ends = [_token_ends(side, texts[index], row) for side, row in zip(sides, own, strict=True)]
            places = [(place, ends[1][end]) for end, place in sorted(ends[0].items()) if end in ends[1]]
        kept = [
            pair
            for pair in places
            if all(place and row.ids[place] not in s for place, row, s in zip(pair, own, specials, strict=True))
        ]
        if kept:
            first, second = zip(*kept, strict=True)
            paired.append(PairedText(replace(own[0], selected=first), replace(own[1], selected=second)))
    return paired


def _rows_of(
    side: Side, texts: Sequence[Text], max_tokens: int | None, prepend_bos: bool | None
) -> dict[int, TokenRow]:
    """The token row of each text that has a token, by the number of the text."""
    window = context_window(side.model)
    limit = max_tokens if window is None or max_tokens is None else min(window, max_tokens)
    with TokenReader(
        side.tokenizer, prepend_bos=prepend_bos, max_tokens=limit, window=window, skip_empty=True
    ) as reader:
        return {row.index: row for rows in reader.rows(("", text, True) for text in texts) for row in rows}


def _token_ends(side: Side, text: Text, row: TokenRow) -> dict[int, int]:
    """The places of a row's tokens by the character at which they end. Raises DataError where that is not known."""
    if not isinstance(text, str):
        raise DataError(
            f"a conversation as text {row.index}, which the two tokenizers render or split differently",
            "plain texts for tokenizers that differ, as tokens are aligned by the characters at which they end",
            "pass the contents of the messages as texts",
        )
    name = type(side.tokenizer).__name__
    if not getattr(side.tokenizer, "is_fast", False):
        raise DataError(
            f"the tokenizer {name}, which does not tell where in a text its tokens stand",
            "fast tokenizers, where two tokenizers differ, as tokens are aligned by the characters at which they end",
            "load it with use_fast=True, or convert it to a tokenizer.json",
        )
    encoded = side.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(row.ids[row.start :])
    if list(encoded["input_ids"])[: len(ids)] != ids:
        raise DataError(
            f"the tokenizer {name}, which splits {text!r:.40} otherwise without its special tokens",
            "a tokenizer whose special tokens change nothing of what follows",
            "pass prepend_bos=False, or leave this text out",
        )
    spans = encoded["offset_mapping"][: len(ids)]
    return {end: row.start + number for number, (start, end) in enumerate(spans) if end > start}


def pieces(pairs: Sequence[PairedText]) -> Iterator[Sequence[PairedText]]:
    """Yield the texts whose activations are held at once."""
    for start in range(0, len(pairs), TEXTS_TOGETHER):
        yield pairs[start : start + TEXTS_TOGETHER]


@dataclass(eq=False)
class PairedActivations:
    """Reads the activations of paired tokens, without massive ones.

    Attributes:
        source: The model that is mapped from.
        target: The model that is mapped to.
        max_norm_ratio: Tokens whose norm, in either model, is more than this many times its median are left out; the
            medians are those of the first texts that are read. None leaves none out.
        batch_tokens: Padded tokens in a forward pass; None takes what suits the device.
        limits: The largest norm that is read of each model.
        left_out: How many pairs were left out.
    """

    source: Side
    target: Side
    max_norm_ratio: float | None = MASSIVE
    batch_tokens: int | None = None
    limits: tuple[float, float] | None = None
    left_out: int = field(default=0)

    def __post_init__(self) -> None:
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise DataError(f"max_norm_ratio = {self.max_norm_ratio}", "more than 1, or None to leave nothing out")

    def read(
        self, pairs: Sequence[PairedText]
    ) -> tuple[Float[Tensor, "kept d_source"], Float[Tensor, "kept d_target"], Bool[Tensor, " tokens"]]:
        """The activations of both models in float32 on the target's device, and which of all paired tokens are kept.

        Raises DataError for activations that are not finite, and for texts whose tokens are all left out.
        """
        acts = [_record(self.source, [pair.source for pair in pairs], self.batch_tokens)]
        acts.append(_record(self.target, [pair.target for pair in pairs], self.batch_tokens))
        acts[0] = acts[0].to(acts[1].device)
        norms = [torch.linalg.vector_norm(each, dim=1) for each in acts]
        for side, norm in zip((self.source, self.target), norms, strict=True):
            if not bool(norm.isfinite().all()):
                raise DataError(
                    f"activations at {side.hookpoint} of {type(side.model).__name__} that are not finite",
                    "finite values",
                    "load the model in float32 or bfloat16, as float16 overflows in many models",
                )
        if self.limits is None:
            ratio = torch.inf if self.max_norm_ratio is None else self.max_norm_ratio
            self.limits = ratio * float(norms[0].median()), ratio * float(norms[1].median())
        kept = (norms[0] <= self.limits[0]) & (norms[1] <= self.limits[1])
        self.left_out += int((~kept).sum())
        return acts[0][kept], acts[1][kept], kept


@torch.no_grad()
def _record(side: Side, rows: Sequence[TokenRow], batch_tokens: int | None) -> Float[Tensor, "tokens width"]:
    """The activations of the selected tokens of rows, in their order, in float32."""
    device = input_device(side.model)
    pad_id = side.tokenizer.pad_token_id
    batches = batch_rows(
        sorted(rows, key=lambda row: len(row.ids)),
        batch_tokens=tokens_in_batch(batch_tokens, device),
        pad_id=pad_id if isinstance(pad_id, int) else 0,
        device=device,
    )

    def read(batch: AnyBatch) -> Tensor:
        return record_batch(side.model, batch, [side.hookpoint])[side.hookpoint]  # type: ignore[arg-type]

    acts: dict[int, Tensor] = {}
    for batch, h in map_with_oom_backoff(batches, read):
        for number, row in enumerate(batch.rows):
            acts[row.index] = h[number, torch.tensor(row.selected, device=h.device)].float()
    values = torch.cat([acts[row.index] for row in rows])
    return values.cpu() if values.device.type == "mps" else values  # which has no float64 for the fit
