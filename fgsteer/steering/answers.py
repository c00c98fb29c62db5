"""A model's own greedy answers, with their tokens: what it says to each prompt, in batches.

for answer in greedy_answers(model, tokenizer, prompts, max_new_tokens=32): print(answer.text)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fgsteer.activations.tokens import TokenRow, pad, prompt_ids
from fgsteer.data.chat import Text
from fgsteer.display.progress import Report
from fgsteer.models.properties import check_window, input_device, special_ids
from fgsteer.steering.entries import Entry
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 16  # prompts that are answered together


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt.

    Args:
        prompt: The ids of the prompt's tokens.
        ids: The ids of the answer's, without those that end a text.
        text: The answer.
        ended: Whether the model ended it, before the tokens ran out.
    """

    prompt: list[int]
    ids: list[int]
    text: str
    ended: bool

    def row(self, index: int) -> TokenRow:
        """Prompt and answer as a row of tokens; selected are those that chose a token of the answer, or its end.

        They begin with the prompt's last token; the answer's last is among them where the model ended it.
        """
        first = len(self.prompt) - 1
        chose = range(first, first + len(self.ids) + self.ended)
        return TokenRow([*self.prompt, *self.ids], chose, index, start=0, prompt_length=len(self.prompt))


@torch.no_grad()
def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int | Sequence[int],
    steering: Entry = None,
    rows: int = ROWS,
    prepend_bos: bool | None = None,
    progress: Report | None = None,
) -> list[Answer]:
    """Answer every prompt greedily.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        prompts: Texts, or conversations whose next message is answered.
        max_new_tokens: The tokens of each answer, at most: one number for all, or one for each.
        steering: An intervention, or a list of them that compose, on every prompt.
        rows: How many prompts are answered together.
        prepend_bos: As for ``TokenReader``.
        progress: Called with the number of answers.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        DataError: There is no prompt, one has no token, or one exceeds the positions of the model.
    """
    encoded = prompt_ids(tokenizer, prompts, prepend_bos=prepend_bos)
    budgets = [max_new_tokens] * len(encoded) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    order = sorted(range(len(encoded)), key=lambda n: (len(encoded[n]), n))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), rows):
        numbers = order[start : start + rows]
        texts = _continue(model, tokenizer, [encoded[n] for n in numbers], max(budgets[n] for n in numbers), steering)
        for n, ids in zip(numbers, texts, strict=True):
            kept = ids[: budgets[n]]
            text = str(tokenizer.decode(kept, skip_special_tokens=True))
            answers[n] = Answer(encoded[n], kept, text, len(kept) < budgets[n])
        if progress is not None:
            progress(len(answers))
    return [answers[n] for n in range(len(encoded))]


def _continue(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], new: int, steering: Entry
) -> list[list[int]]:
    """The new tokens of each row, up to the first that ends a text."""
    pad_id = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    ids, mask = (part.to(input_device(model)) for part in pad(prompts, pad_id, side="left"))
    check_window(model, ids.shape[1] + new, f"prompts of up to {ids.shape[1]} tokens and {new} new ones: texts")
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": new, "pad_token_id": pad_id}
    with steer(model, steering, per_row=False):
        output = model.generate(input_ids=ids, attention_mask=mask, **options)
    written: Tensor = (output if isinstance(output, Tensor) else output.sequences)[:, ids.shape[1] :]
    ends = special_ids(("eos_token_id",), model.generation_config)  # at which generation stops
    texts = []
    for row in written.tolist():
        end = next((n for n, token in enumerate(row) if token in ends), len(row))
        texts.append(row[:end])
    return texts
