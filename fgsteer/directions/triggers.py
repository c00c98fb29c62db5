"""Trigger words: those of requests that a direction's projection comes from, and requests without them.

found = find_triggers(tuned, tokenizer, shift.vector(), refused)
changed = remove_words(refused, [row.word for row in found])
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fgsteer.data.chat import Text, check_text, refuse_one_text
from fgsteer.directions.relevance import STEPS, token_relevance
from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked, describe_value
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class TriggerWord(OneLineRepr):
    """A word that is among those of requests which a projection comes from.

    Args:
        word: The word, in lower case.
        prompts: In how many requests it is.
        relevance: Its relevance in these, as a share of that of the most relevant word, a mean.
    """

    word: str
    prompts: int
    relevance: float

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        return {"word": self.word, "prompts": self.prompts, "relevance": self.relevance}


@checked
def find_triggers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    vector: SteeringVector,
    prompts: Sequence[Text],
    *,
    per_prompt: int = 3,
    min_characters: int = 4,
    baseline: Literal["mean", "zero"] = "mean",
    steps: int = STEPS,
    batch_tokens: int | None = None,
) -> Table[TriggerWord]:
    """The words of requests that raise a projection most, such as that on the dominant component of a shift.

    Of each request the ``per_prompt`` words of the largest positive ``token_relevance`` count (after arXiv 2502.09674,
    whose relevance is another and by token).

    Args:
        model: A Hugging Face causal language model, such as the tuned one.
        tokenizer: Its tokenizer.
        vector: The direction and the place where it is read.
        prompts: Requests: texts, which a chat model gets as a user's messages, or conversations.
        per_prompt: The words of a request, at most.
        min_characters: The fewest characters of a word; the paper's tokens are longer than 3.
        baseline: As in ``token_relevance``.
        steps: As in ``token_relevance``.
        batch_tokens: As in ``token_relevance``.

    Returns:
        The words, those of most requests first, and of the most relevant in each.

    Raises:
        DataError: There is no prompt, or an argument is out of its range.
        PairingError: The vector has another width than the model.
        HookpointError: The model lacks the vector's hookpoint.
    """
    check_range("per_prompt", per_prompt, 1, MAX_COUNT, whole=True)
    check_range("min_characters", min_characters, 1, MAX_COUNT, whole=True)
    shares: dict[str, list[float]] = {}
    relevances = token_relevance(
        model, tokenizer, vector, prompts, baseline=baseline, steps=steps, batch_tokens=batch_tokens
    )
    for one in relevances:
        words = {word: value for word, value in one.by_word().items() if len(word) >= min_characters and value > 0}
        best = sorted(words, key=lambda word: -words[word])[:per_prompt]
        for word in best:
            shares.setdefault(word, []).append(words[word] / words[best[0]])
    rows = [TriggerWord(word, len(own), sum(own) / len(own)) for word, own in shares.items()]
    return Table(sorted(rows, key=lambda row: (-row.prompts, -row.relevance, row.word)))


@checked
def remove_words(prompts: Sequence[Text], words: Sequence[str], replacement: str = "") -> list[Text]:
    """Requests without some words, whole and in any case; of conversations the user's messages are changed.

    Args:
        prompts: Texts or conversations.
        words: The words.
        replacement: What stands in their place; nothing by default, with one space for those around it.

    Returns:
        The requests, in their order.

    Raises:
        DataError: A prompt is none, or nothing is left of it; or a word is empty.
    """
    refuse_one_text(prompts)
    refuse_one_text(words)
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise DataError(f"{describe_value(word)} among the words", "words of at least one character")
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in words), re.IGNORECASE)

    def change(text: str, where: str) -> str:
        if not words or not pattern.search(text):
            return text
        changed = re.sub(r" {2,}", " ", pattern.sub(lambda _: replacement, text)).strip()
        if not changed:
            raise DataError(f"{where} of which nothing is left", "more than the words that are removed")
        return changed

    result: list[Text] = []
    for number, prompt in enumerate(prompts):
        text = check_text(prompt, f"prompt {number}")
        if isinstance(text, str):
            result.append(change(text, f"prompt {number}"))
        else:
            result.append(
                [
                    {**m, "content": change(m["content"], f"prompt {number}")} if m["role"] == "user" else dict(m)
                    for m in text
                ]
            )
    return result
