"""Losing answers: what a model says by itself to the prompts for which other answers are to win.

losing_answers(model, tokenizer, [("How are you?", "Splendid, and you?")])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text, check_text
from fgsteer.data.contrast_files import Contrastable, as_contrast
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, FgsteerWarning
from fgsteer.errors.checks import check_range, checked, warn
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.models.properties import context_window
from fgsteer.steering.answers import ROWS, greedy_answers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
def losing_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    winners: Contrastable | Sequence[tuple[Text, Text]],
    *,
    max_new_tokens: int | None = None,
    rows: int = ROWS,
    progress: Progress = None,
) -> ContrastSet:
    """Pair winning answers with the model's own: greedy answers to the same prompts, of as many tokens at most.

    This is what RePS (arXiv 2505.20809) takes as losing answers where no other model writes them. An answer that is
    empty is left out with its winner, with a warning.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        winners: A list of (prompt, winning answer), of which anything more is not looked at; or a contrast set, a
            shipped name, a path or the like, whose positive texts win and whose negative texts are replaced. A held-out
            part is completed too.
        max_new_tokens: The tokens of every answer, at most; by default those of the answer that wins over it.
        rows: The prompts that are answered together.
        progress: As in ``collect``; a function is called with the number of answers.

    Returns:
        A set of pairs, as ``train`` takes it.

    Raises:
        DataError: There is no winner, one has no prompt or no token, or no answer came out.
    """
    if max_new_tokens is not None:
        check_range("max_new_tokens", max_new_tokens, 1, MAX_COUNT, whole=True)
    check_range("rows", rows, 1, MAX_COUNT, whole=True)
    contrast = _as_winners(winners)
    parts = [contrast] if contrast.held_out is None else [contrast, contrast.held_out]
    total = sum(part.count(True) for part in parts)
    with reporting(progress, "answering prompts", total) as report:
        done, found = 0, []
        for part in parts:
            offset = done
            found.append(
                _with_losers(model, tokenizer, part, max_new_tokens, rows, lambda n, offset=offset: report(offset + n))
            )
            done += part.count(True)
    return found[0] if len(found) == 1 else replace(found[0], held_out=found[1])


def _as_winners(winners: Any) -> ContrastSet:
    """Winners as a contrast set, each its own loser where there is none. Raises DataError."""
    if not isinstance(winners, list | tuple):
        return as_contrast(winners)
    pairs = []
    for number, entry in enumerate(winners):
        if isinstance(entry, ContrastPair):
            pairs.append(entry)
            continue
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) < 2:
            raise DataError(f"{entry!r:.60} in winners[{number}]", "(prompt, winning answer)")
        prompt = check_text(entry[0], f"the prompt of winners[{number}]")
        winner = check_text(entry[1], f"the answer of winners[{number}]")
        pairs.append(ContrastPair(winner, winner, prompt))
    return ContrastSet("winners", pairs)


def _with_losers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    contrast: ContrastSet,
    max_new_tokens: int | None,
    rows: int,
    report: Any,
) -> ContrastSet:
    """A set with the model's own answers on its negative side."""
    winners = [(_prompt(prompt, winner, number), winner) for number, (prompt, winner) in enumerate(contrast.side(True))]
    prompts = [prompt for prompt, _ in winners]
    budgets: int | list[int] = max_new_tokens or _answer_tokens(model, tokenizer, winners)
    answers = greedy_answers(model, tokenizer, prompts, max_new_tokens=budgets, rows=rows, progress=report)
    pairs = [
        ContrastPair(winner, answer.text, prompt)
        for (prompt, winner), answer in zip(winners, answers, strict=True)
        if answer.text.strip()
    ]
    if not pairs:
        raise DataError(
            f"The model answered none of the {count(len(winners), 'prompt')} of {contrast.name!r}.",
            "a model that answers",
            "look at what it says with fg.generate, and at the chat template",
        )
    if len(pairs) < len(winners):
        warn(
            f"The model's answer to {len(winners) - len(pairs)} of {len(winners)} prompts is empty; they are left out.",
            FgsteerWarning,
        )
    return ContrastSet(contrast.name, pairs, description=contrast.description)


def _prompt(prompt: Text, winner: Text, number: int) -> Text:
    """The prompt that is answered. Raises DataError for a winner without one."""
    if not prompt:
        raise DataError(
            f"the winner {number} without a prompt, {winner!r:.60}",
            "a prompt, which the model answers in its own way",
            "give (prompt, winning answer), or pairs with a prompt",
        )
    is_chat = not isinstance(winner, str)  # which turns a prompt before it into a user's message
    return [{"role": "user", "content": prompt}] if is_chat and isinstance(prompt, str) else prompt


def _answer_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, winners: Sequence[tuple[Text, Text]]
) -> list[int]:
    """The number of tokens of every winning answer. Raises DataError for one without any."""
    tokens = [0] * len(winners)
    with TokenReader(tokenizer, rule="answer", window=context_window(model), scored=True) as reader:
        for chunk in reader.rows((prompt, winner, True) for prompt, winner in winners):
            for row in chunk:
                tokens[row.index] = len(row.selected)
    return tokens
