"""The texts that are traced, as token ids: prompts with given completions, or with those that the model writes.

rows = given_rows(tokenizer, ["2 + 2 ="], [" 4"], window=None)
rows = written_rows(model, tokenizer, ["I think"], vec.add(8.0), seed=0, options={"max_new_tokens": 8})
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fgsteer.activations.tokens import TokenReader, prompt_ids
from fgsteer.data.chat import Text
from fgsteer.errors import DataError
from fgsteer.models.properties import check_window
from fgsteer.steering.entries import Entry
from fgsteer.steering.generation import generate_ids, seeded
from fgsteer.traces.parts import Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MOST_TOKENS = 8192
"""The tokens of all texts of a trace together."""


@dataclass(frozen=True)
class Row:
    """One text as token ids.

    Args:
        prompt: The number of its prompt.
        source: Where its completion comes from.
        ids: The ids of prompt and completion.
        prompt_tokens: How many of them stand before the completion.
        completion: The completion's text.
    """

    prompt: int
    source: Source
    ids: list[int]
    prompt_tokens: int
    completion: str


def given_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], completions: Sequence[str]
) -> list[Row]:
    """Prompts with given completions, joined as they are. Raises DataError for an empty completion."""
    reader = TokenReader(tokenizer, rule="answer", joint="", scored=True)
    triples = [(prompt, text, True) for prompt, text in zip(prompts, completions, strict=True)]
    rows = sorted((row for chunk in reader.rows(triples) for row in chunk), key=lambda row: row.index)
    for row in rows:
        check_window(model, len(row.ids), f"text {row.index}")
    check_size(sum(len(row.ids) for row in rows))
    # what a chat template writes after the answer is no part of it
    return [
        Row(row.index, "given", list(row.ids[: row.selected[-1] + 1]), row.prompt_length, completions[row.index])
        for row in rows
    ]


def written_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    steering: Entry,
    seed: int,
    options: dict[str, Any],
) -> list[Row]:
    """Prompts with what the steered and then the unsteered model writes, from the same random numbers.

    The texts are those of ``fg.generate`` after ``torch.manual_seed(seed)``.
    """
    _check_options(options)
    new_tokens = options.get("max_new_tokens") or 0
    check_size(2 * sum(len(ids) + int(new_tokens) for ids in prompt_ids(tokenizer, prompts)))
    by_row = False if isinstance(steering, list | tuple) else None
    ends, pad_id = _ends(model, options), tokenizer.pad_token_id
    rows = []
    sources: tuple[tuple[Source, Any], ...] = (("steered", steering), ("unsteered", None))
    for source, entry in sources:
        with seeded(model, seed):
            read, written = generate_ids(model, tokenizer, prompts, steering=entry, per_row=by_row, **options)
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        for number, (ids, new) in enumerate(zip(read, written.tolist(), strict=True)):
            end = next((n + 1 for n, token in enumerate(new) if token in ends), len(new))
            while end and new[end - 1] == pad_id and pad_id not in ends:  # another criterion ended it before the others
                end -= 1
            rows.append(Row(number, source, [*ids, *new[:end]], len(ids), str(texts[number])))
    check_size(sum(len(row.ids) for row in rows))
    return sorted(rows, key=lambda row: row.prompt)


def check_size(tokens: int) -> None:
    """Raises DataError for more tokens than a trace holds."""
    if tokens > MOST_TOKENS:
        raise DataError(
            f"{tokens:,} tokens",
            f"at most {MOST_TOKENS:,} tokens in all texts of a trace together",
            "trace fewer prompts, or pass a smaller max_new_tokens",
        )


def _check_options(options: dict[str, Any]) -> None:
    """Raises DataError for options under which a prompt has several continuations."""
    if (options.get("num_return_sequences") or 1) != 1:
        raise DataError(
            f"num_return_sequences = {options['num_return_sequences']!r:.40}",
            "one continuation of each prompt",
            "call trace once for each seed",
        )


def _ends(model: PreTrainedModel, options: dict[str, Any]) -> set[int]:
    """The tokens after which a continuation is over."""
    config = options.get("generation_config") or model.generation_config
    end = options["eos_token_id"] if "eos_token_id" in options else getattr(config, "eos_token_id", None)
    return set() if end is None else set(torch.as_tensor(end).flatten().tolist())
