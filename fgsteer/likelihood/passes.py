"""Forward passes over texts under many entries: what is common to entries, and to texts, is run once.

Texts become batches of tokens once. Entries share a pass as far as it has room, the blocks below the first steered one
are run once for all entries, and answers of one token to one prompt share a row.

    passes = TextPasses(model, tokenizer, [("2 + 2 =", "4")])
    for batch, numbers, logits in passes.scored_logits([None, vec.add(4.0), vec.add(8.0)]): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgsteer.activations.batches import Batch, batch_texts, tokens_in_batch
from fgsteer.activations.outputs import hidden_states_of
from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text
from fgsteer.likelihood.lower_blocks import (
    can_skip_blocks,
    has_plain_blocks,
    output_of_blocks,
    skip_blocks,
    unchanged_blocks,
)
from fgsteer.models.hookpoints import blocks_of, uncompiled
from fgsteer.models.properties import context_window, input_device, virtual_tokens
from fgsteer.steering.entries import Entry, interventions_of
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_LOGITS = 1 << 26  # held at once when many rows are scored: this bounds memory, and changes no result
MAX_KEPT_BYTES = 1 << 28  # of blocks' outputs that are kept from one call to the next


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a batch that are run, and where the logits of its scored tokens stand.

    Args:
        ids: The token ids.
        attention: The attention mask.
        ends: Where each row's prompt ends.
        row: The row of the logits that predict each scored token, (n,).
        column: Their column, (n,).
    """

    ids: Int[Tensor, "rows tokens"]
    attention: Int[Tensor, "rows tokens"]
    ends: list[int]
    row: Int[Tensor, " n"]
    column: Int[Tensor, " n"]


class TextPasses:
    """Texts in batches, and the logits that a model gives on them under many entries.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        pairs: Pairs (prompt, completion).
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.
        joint: As in ``log_probabilities``.
        skip_empty: As in ``log_probabilities``.
        scored: Whether completions are scored; else all of a text is a prompt, whose next token counts.
        keep: Whether outputs of lower blocks are kept from one call to the next.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[tuple[Text, Text]],
        *,
        batch_tokens: int | None = None,
        joint: str | None = None,
        skip_empty: bool = False,
        scored: bool = True,
        keep: bool = False,
    ) -> None:
        self.model, self.scored, self.keep = model, scored, keep
        tokens = tokens_in_batch(batch_tokens, input_device(model))
        self.fits = max(1, min(tokens, MAX_LOGITS // model.config.get_text_config().vocab_size))
        triples = ((prompt, completion, True) for prompt, completion in pairs)
        with TokenReader(
            tokenizer,
            rule="answer" if scored else "all",
            bos=not scored,
            window=context_window(model),
            joint=joint,
            skip_empty=skip_empty,
            scored=scored,
        ) as reader:
            self.batches = list(batch_texts(model, reader, triples, batch_tokens=self.fits))
        plain = has_plain_blocks(model) and not virtual_tokens(model)
        self._picks_columns = plain and "logits_to_keep" in inspect.signature(uncompiled(model).forward).parameters
        self._rows: dict[tuple[int, bool], _Rows] = {}
        self._outputs: dict[tuple[int, bool], dict[int, Any]] = {}  # of blocks, by batch, then by depth
        self._kept_bytes = 0

    def scored_logits(
        self, entries: Sequence[Entry], *, unchanged_first: bool = False
    ) -> Iterator[tuple[Batch, list[int], Float[Tensor, "entries n vocabulary"]]]:
        """Yield each batch with numbers of entries and, under each, the logits that predict its n scored tokens.

        Logits are in the model's dtype. Every batch comes with each entry once; with ``unchanged_first``, those that
        change nothing come first of its entries.
        """
        skips, blocks = len(entries) > 1 or self.keep, len(blocks_of(self.model))
        skips = skips and can_skip_blocks(self.model)
        depths = [unchanged_blocks(entry, blocks) if skips else 0 for entry in entries]
        merge = self.scored and not any(i.scope == "generated" for entry in entries for i in interventions_of(entry))
        for number, batch in enumerate(self.batches):
            rows = self._rows_of(number, merge)
            slices = list(_slices(depths, blocks, max(1, self.fits // rows.ids.numel())))
            if unchanged_first:
                if depth := min(depths, default=0):
                    self._output(number, rows, merge, depth)  # the others' first part, and of this one
                slices.sort(key=lambda numbers: -depths[numbers[0]])
            for numbers in slices:
                chosen = [entries[n] for n in numbers]
                yield batch, numbers, self._logits(number, rows, merge, chosen, min(depths[n] for n in numbers))
            if not self.keep:
                self._forget()

    def _rows_of(self, number: int, merge: bool) -> _Rows:
        """The rows that are run for a batch; to ``merge`` is to run rows once that differ in their last token alone.

        The last token predicts nothing that is scored.
        """
        if (number, merge) not in self._rows:
            self._rows[number, merge] = self._make_rows(self.batches[number], merge)
        return self._rows[number, merge]

    def _make_rows(self, batch: Batch, merge: bool) -> _Rows:
        if not self.scored:
            ends = [len(row.ids) for row in batch.rows]
            return _Rows(batch.ids, batch.attention, ends, torch.arange(len(ends)), torch.tensor(ends) - 1)
        row, column = batch.selected[:, 1:].cpu().nonzero(as_tuple=True)
        texts: dict[Any, int] = {}
        firsts: list[int] = []
        places = []
        for number, text in enumerate(batch.rows):
            key = (tuple(text.ids[:-1]), text.prompt_length)
            if not merge or key not in texts:
                texts[key] = len(firsts)
                firsts.append(number)
            places.append(texts[key])
        ends = [batch.rows[number].prompt_length for number in firsts]
        width = batch.ids.shape[1] - (len(firsts) < len(places))
        ids, attention = batch.ids[firsts, :width], batch.attention[firsts, :width]
        return _Rows(ids, attention, ends, torch.tensor(places)[row], column)

    def _logits(
        self, number: int, rows: _Rows, merge: bool, entries: Sequence[Any], depth: int
    ) -> Float[Tensor, "entries n vocabulary"]:
        """The logits of a batch's scored tokens under entries that leave the ``depth`` lowest blocks as they are."""
        model, times, columns = self.model, len(entries), rows.column
        steering = entries[0] if times == 1 else [entry for entry in entries for _ in rows.ends]
        ids, attention = rows.ids.repeat(times, 1), rows.attention.repeat(times, 1)
        options = {}
        if self._picks_columns:
            kept, columns = torch.unique(columns, return_inverse=True)
            options["logits_to_keep"] = kept.to(ids.device)
        output = self._output(number, rows, merge, depth) if depth else None
        lower = nullcontext() if output is None else skip_blocks(model, depth, output, times)
        with note_prompt_ends(model, rows.ends * times), lower, steer(model, steering, per_row=times > 1):
            logits: Tensor = model(input_ids=ids, attention_mask=attention, use_cache=False, **options).logits
        logits = logits if options else logits[:, -ids.shape[1] :]  # without those of virtual tokens
        by_entry = logits.view(times, len(rows.ends), *logits.shape[1:])
        return by_entry[:, rows.row.to(logits.device), columns.to(logits.device)]

    def _output(self, number: int, rows: _Rows, merge: bool, depth: int) -> Any:
        """What the ``depth``-th block returns for a batch, from the nearest block below whose output is kept."""
        kept = self._outputs.setdefault((number, merge), {})
        if depth not in kept:
            below = max((d for d in kept if d < depth), default=0)
            lower = skip_blocks(self.model, below, kept[below]) if below else nullcontext()
            with note_prompt_ends(self.model, rows.ends), lower:
                output = output_of_blocks(self.model, rows.ids, rows.attention, depth)
            if output is None:
                return None
            hidden = hidden_states_of(output)
            self._kept_bytes += hidden.numel() * hidden.element_size()
            if self._kept_bytes > MAX_KEPT_BYTES:
                self._forget()
                kept = self._outputs.setdefault((number, merge), {})
            kept[depth] = output
        return kept[depth]

    @torch.no_grad()
    def stream_norm(self, layer: int) -> float | None:
        """The median norm of the residual stream after a block, over the first batch's tokens; None where not known."""
        if not (self.batches and can_skip_blocks(self.model) and layer < len(blocks_of(self.model))):
            return None
        output = self._output(0, self._rows_of(0, True), True, layer + 1)
        if output is None:
            return None
        rows, hidden = self._rows_of(0, True), hidden_states_of(output)
        return float(hidden[rows.attention.to(hidden.device).bool()].float().norm(dim=-1).median())

    def _forget(self) -> None:
        self._outputs.clear()
        self._kept_bytes = 0


def _slices(depths: Sequence[int], blocks: int, at_once: int) -> Iterator[list[int]]:
    """Entries that share a pass, of nearby depths; those that change nothing have passes of their own."""
    order = sorted(range(len(depths)), key=depths.__getitem__)
    for changing in (True, False):
        numbers = [n for n in order if (depths[n] < blocks) == changing]
        for start in range(0, len(numbers), at_once):
            yield numbers[start : start + at_once]
