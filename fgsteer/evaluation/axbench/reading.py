"""Activations of the tokens of texts, without the beginning that all chats share.

for number, values in token_activations(model, tokenizer, texts, Hookpoint(12)): ...            values (tokens, d_model)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.batches import batch_rows, record_batch, tokens_in_batch
from fgsteer.activations.tokens import TokenReader, prompt_ids
from fgsteer.data.chat import Text
from fgsteer.errors import DataError
from fgsteer.evaluation.axbench.files import AxBenchText
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.properties import context_window, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def as_prompt(tokenizer: Any, instruction: str) -> Text:
    """An instruction as a chat, or for a model without a chat template as a text with a line of its own."""
    if getattr(tokenizer, "chat_template", None) is None:
        return f"{instruction}\n"
    return [{"role": "user", "content": instruction}]


def shared_beginning(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many tokens all prompts begin with: BOS, and what the chat template writes before the first message."""
    one, other = prompt_ids(tokenizer, [as_prompt(tokenizer, word) for word in ("yes", "1")])
    return next((n for n, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), 0)


@torch.no_grad()
def token_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[AxBenchText],
    hookpoint: Hookpoint,
    *,
    prepend_bos: bool | None = None,
    batch_tokens: int | None = None,
) -> Iterator[tuple[int, Float[Tensor, "tokens d_model"]]]:
    """Yield the number of each text with the activations of its tokens after the shared beginning, in float32.

    Texts come in another order than they were given. Raises DataError for a text without a token after it, or with
    activations that are not finite.
    """
    begin = shared_beginning(tokenizer)
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    device = input_device(model)
    triples = [(as_prompt(tokenizer, text.input), text.output, True) for text in texts]
    with TokenReader(tokenizer, prepend_bos=prepend_bos, window=context_window(model)) as reader:
        for chunk in reader.rows(triples):
            rows = [replace(row, selected=[t for t in row.selected if t >= begin]) for row in chunk]
            size = tokens_in_batch(batch_tokens, device)
            for batch in batch_rows(rows, batch_tokens=size, pad_id=pad_id, device=device):
                acts = record_batch(model, batch, [hookpoint])[hookpoint]
                for row, values in zip(batch.rows, acts, strict=True):
                    chosen = values[list(row.selected)].float()
                    if not len(chosen) or not bool(chosen.isfinite().all()):
                        what = "no token after what all chats begin with" if not len(chosen) else "values not finite"
                        raise DataError(
                            f"{what} in {row.where}", "finite activations of at least one token", "drop the text"
                        )
                    yield row.index, chosen
