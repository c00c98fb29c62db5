"""Log-probabilities of answers under steering, with gradients to what steers.

What the blocks below the steered place compute is the same in every step, so that it is run once and kept; a step runs
the blocks above it, forward and backward, on the answers that it draws.

    passes = ResponsePasses(model, tokenizer, Hookpoint(12), [("How are you?", "Splendid!")])
    passes.log_probabilities([0, 0], [vec.add(2.0), None])                  (2,)
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.activations.batches import mask_of, tokens_in_batch
from fgsteer.activations.outputs import hidden_states_of, replace_hidden_states
from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import TokenReader, TokenRow, pad
from fgsteer.data.chat import Text
from fgsteer.learning.checkpointing import checkpointed_blocks
from fgsteer.likelihood.lower_blocks import can_skip_blocks, has_plain_blocks, output_of_blocks, skip_blocks
from fgsteer.likelihood.scoring import target_log_probabilities
from fgsteer.models.hookpoints import Hookpoint, resolve, uncompiled
from fgsteer.models.properties import context_window, input_device, virtual_tokens
from fgsteer.steering.entries import Entry
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_KEPT_BYTES = 1 << 31  # of outputs of lower blocks; where they are more, nothing is kept
T = TypeVar("T")


class ResponsePasses:
    """Answers as token rows, and their log-probabilities under steering at one hookpoint.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        hookpoint: Where it is steered; nothing may steer below.
        pairs: Pairs (prompt, answer), by whose number the rows are called.
        batch_tokens: The tokens in a pass, with padding; by default what suits the device.
        checkpointing: Whether blocks above the hookpoint's are computed again for gradients.

    Raises:
        DataError: An answer has no token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        hookpoint: Hookpoint,
        pairs: Sequence[tuple[Text, Text]],
        batch_tokens: int | None = None,
        *,
        checkpointing: bool = False,
    ) -> None:
        self.model, self.hookpoint, self.checkpointing = model, hookpoint, checkpointing
        self.device = input_device(model)
        self.batch_tokens = tokens_in_batch(batch_tokens, self.device)
        self.pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
        with TokenReader(tokenizer, rule="answer", window=context_window(model), scored=True) as reader:
            chunks = list(reader.rows((prompt, answer, True) for prompt, answer in pairs))
        self.rows: list[TokenRow] = sorted((row for chunk in chunks for row in chunk), key=lambda row: row.index)
        plain = has_plain_blocks(model) and not virtual_tokens(model)
        self._picks_columns = plain and "logits_to_keep" in inspect.signature(uncompiled(model).forward).parameters

    def answer_tokens(self, row: int) -> int:
        """The number of tokens of an answer."""
        return len(self.rows[row].selected)

    def tokens(self, row: int) -> int:
        """The number of tokens of a prompt and its answer."""
        return len(self.rows[row].ids)

    def split(self, units: Sequence[T], rows_of: Any) -> list[list[T]]:
        """Split units, each of some rows, into lists that fit into a pass, of similar lengths.

        ``rows_of`` gives the rows of a unit. A unit that does not fit is a list of its own.
        """

        def width(unit: T) -> int:
            return max(self.tokens(row) for row in rows_of(unit))

        lists: list[list[T]] = []
        held = 0
        for unit in sorted(units, key=width, reverse=True):  # the first of a list is its widest
            rows = len(rows_of(unit))
            if not lists or width(lists[-1][0]) * (held + rows) > self.batch_tokens:
                lists.append([])
                held = 0
            lists[-1].append(unit)
            held += rows
        return lists

    def log_probabilities(self, rows: Sequence[int], entries: Sequence[Entry]) -> Float[Tensor, " rows"]:
        """The log-probability of each row's answer under its entry, in nats, summed over tokens, in float32."""
        chosen = [self.rows[row] for row in rows]
        ids, attention = (t.to(self.device) for t in pad([row.ids for row in chosen], self.pad_id))
        selected = mask_of([row.selected for row in chosen], ids.shape[1])
        owner, column = selected[:, 1:].nonzero(as_tuple=True)  # of the logits that predict the selected
        targets, options = ids[:, 1:][selected[:, 1:].to(ids.device)], {}
        if self._picks_columns:
            kept, column = torch.unique(column, return_inverse=True)
            options["logits_to_keep"] = kept.to(self.device)
        lower: AbstractContextManager[None] = nullcontext()
        upper: AbstractContextManager[None] = nullcontext()
        if self._lower is not None:
            template, kept_rows = self._lower
            hidden = nn.utils.rnn.pad_sequence([kept_rows[row] for row in rows], batch_first=True)
            lower = skip_blocks(self.model, self._depth, replace_hidden_states(template, hidden))
        if self.checkpointing and torch.is_grad_enabled():
            upper = checkpointed_blocks(self.model, self.hookpoint.layer + 1)
        ends = note_prompt_ends(self.model, [row.prompt_length for row in chosen])
        with ends, lower, upper, steer(self.model, list(entries), per_row=True):
            logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False, **options).logits
        logits = logits if options else logits[:, -ids.shape[1] :]  # without those of virtual tokens
        scored = logits[owner.to(logits.device), column.to(logits.device)]
        values = target_log_probabilities(scored, targets.to(logits.device))
        return torch.zeros(len(rows), device=values.device).index_add(0, owner.to(values.device), values)

    @torch.no_grad()
    def base_log_probabilities(self, rows: Sequence[int]) -> Float[Tensor, " rows"]:
        """The log-probabilities of rows without steering, on the CPU."""
        values = torch.zeros(len(rows))
        for part in self.split(range(len(rows)), lambda n: [rows[n]]):
            values[part] = self.log_probabilities([rows[n] for n in part], [None] * len(part)).cpu()
        return values

    @torch.no_grad()
    def activations(self, row: int) -> Float[Tensor, "tokens d_model"]:
        """The activations of a row at the hookpoint, in float32, without those of a start token."""
        if self._lower is not None and self.hookpoint.site == "resid_post":
            return self._lower[1][row][self.rows[row].start :].float()
        ids, attention = (t.to(self.device) for t in pad([self.rows[row].ids], self.pad_id))
        with note_prompt_ends(self.model, [self.rows[row].prompt_length]):
            found = record(self.model, ids, attention, [self.hookpoint])[self.hookpoint]
        return found[0, self.rows[row].start :].float()

    @property
    def _depth(self) -> int:
        """The number of blocks below the steered place."""
        return self.hookpoint.layer + (self.hookpoint.site == "resid_post")

    @cached_property
    def _lower(self) -> tuple[Any, list[Tensor]] | None:
        """What the lower blocks return, by row, with an output as a template; None where they are run each time."""
        if not self._depth or not can_skip_blocks(self.model):
            return None
        kept: dict[int, Tensor] = {}
        template, held = None, 0
        with torch.no_grad():
            for part in self.split(range(len(self.rows)), lambda n: [n]):
                chosen = [self.rows[n] for n in part]
                ids, attention = (t.to(self.device) for t in pad([row.ids for row in chosen], self.pad_id))
                with note_prompt_ends(self.model, [row.prompt_length for row in chosen]):
                    template = output_of_blocks(self.model, ids, attention, self._depth)
                if template is None:
                    return None
                hidden = hidden_states_of(template)
                held += hidden.numel() * hidden.element_size()
                if held > MAX_KEPT_BYTES:
                    return None
                kept |= {n: hidden[i, : len(self.rows[n].ids)].clone() for i, n in enumerate(part)}
        return template, [kept[n] for n in range(len(self.rows))]


def device_at(model: nn.Module, hookpoint: Hookpoint) -> torch.device:
    """The device of the activations at a hookpoint."""
    module, _ = resolve(model, hookpoint)
    weight = next(module.parameters(), None)
    return input_device(model) if weight is None or weight.is_meta else weight.device
