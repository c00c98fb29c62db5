"""What is kept under steering: the perplexity of plain text, questions with one right answer, tasks of lm-eval.

kept = measure_retention(model, tokenizer, vec.add(8.0))
kept.choices.difference                                  the share of questions that are lost or gained
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool
from torch import Tensor

from fgsteer.data.chat import refuse_one_text
from fgsteer.data.shipped import load_choices, load_neutral
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked, is_whole_number
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval, wilson
from fgsteer.evaluation.tasks import run_tasks
from fgsteer.likelihood.scoring import log_probabilities
from fgsteer.steering.entries import Entry, interventions_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Choice = tuple[str, Sequence[str], int]  # a question, its answers, and the number of the right one
MEASURES = ("acc_norm,none", "acc,none", "exact_match,strict-match", "exact_match,none")


@dataclass(frozen=True, repr=False)
class Change(OneLineRepr):
    """A measure of the model with and without steering.

    Args:
        unsteered: Without.
        steered: With.
        difference: ``steered − unsteered``, paired.
    """

    unsteered: Interval
    steered: Interval
    difference: Interval


@dataclass(frozen=True, repr=False)
class Retention(OneLineRepr):
    """What is kept under steering.

    Args:
        cross_entropy: That of plain texts, in nats a token, averaged over texts.
        choices: The share of questions of which the right answer is the most probable.
        tasks: The accuracy in tasks of lm-eval, unsteered and steered, by name.
    """

    cross_entropy: Change
    choices: Change
    tasks: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def perplexity(self) -> tuple[float, float]:
        """The perplexity of plain text, unsteered and steered: the exponential of the mean cross-entropy."""
        return math.exp(self.cross_entropy.unsteered.mean), math.exp(self.cross_entropy.steered.mean)


@checked
def measure_retention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Entry,
    *,
    texts: Sequence[str] | None = None,
    choices: Sequence[Choice] | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch_tokens: int | None = None,
) -> Retention:
    """How far steering leaves plain text and common knowledge as they are.

    Perplexity is that of given texts and not of the steered model's own, which loops would lower.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        steering: An intervention, or a list of them that compose.
        texts: Plain texts, at least two; by default the shipped neutral ones.
        choices: Questions as (question, answers, number of the right one), at least two; by default the shipped ones.
        tasks: Names of tasks of lm-eval, such as ["arc_easy"], which must then be installed.
        limit: Documents of each task.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Raises:
        DataError: There are fewer than two texts or questions, or a question is none.
        JudgeError: Tasks are named, and lm-eval is not installed.
    """
    plain = list(load_neutral()[0] if texts is None else texts)
    refuse_one_text(plain if texts is None else texts)
    if len(plain) < 2:
        raise DataError(f"{len(plain)} texts", "at least two, which intervals are over")
    pairs: Any = [("", text) for text in plain]
    losses = log_probabilities(model, tokenizer, pairs, [None, steering], batch_tokens=batch_tokens).cross_entropy
    right = answered_rightly(model, tokenizer, [None, steering], choices, batch_tokens=batch_tokens)
    scores = right.double()
    shares = [wilson(float(row.sum()), len(row)) for row in right]
    return Retention(
        Change(_over_items(losses[0]), _over_items(losses[1]), _over_items(losses[1] - losses[0])),
        Change(shares[0], shares[1], _over_items(scores[1] - scores[0])),
        _task_scores(model, tokenizer, tasks, steering, limit) if tasks else {},
    )


def _over_items(values: Tensor) -> Interval:
    return mean_interval([dict(enumerate(values.tolist()))], lambda number: number)


@checked
def answered_rightly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Sequence[Entry] = (None,),
    choices: Sequence[Choice] | None = None,
    *,
    batch_tokens: int | None = None,
) -> Bool[Tensor, "entries questions"]:
    """Whether the right answer to each question is the most probable one, ``argmax_a Σ_t log p(a_t | question, a_<t)``.

    The question is put as "Question: …\\nAnswer:", and letters of answers are not used.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        steering: What is compared: interventions, lists of them to compose, or None for the unsteered model.
        choices: As in ``measure_retention``.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Raises:
        DataError: There are fewer than two questions, or one has fewer than two answers, or no right one.
    """
    asked = list(load_choices() if choices is None else choices)
    if len(asked) < 2:
        raise DataError(f"{len(asked)} questions", "at least two, which intervals are over")
    for number, choice in enumerate(asked):
        whole = isinstance(choice, tuple | list) and len(choice) == 3 and is_whole_number(choice[2])
        if not whole or isinstance(choice[1], str) or not 0 <= choice[2] < len(choice[1]) or len(choice[1]) < 2:
            raise DataError(
                f"question {number}: {choice!r:.80}", "(question, [answers], the right one's number from 0)"
            )
    texts: Any = [(f"Question: {question}\nAnswer:", answer) for question, answers, _ in asked for answer in answers]
    sums = log_probabilities(model, tokenizer, texts, steering, batch_tokens=batch_tokens).sums
    parts = torch.split(sums, [len(answers) for _, answers, _ in asked], 1)
    return torch.stack([part.argmax(1) == right for part, (_, _, right) in zip(parts, asked, strict=True)], 1)


def _task_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    steering: Entry,
    limit: int | None,
) -> dict[str, tuple[float, float]]:
    """The accuracy in each task, without and with steering. Raises JudgeError without lm-eval, DataError."""
    results = [
        run_tasks(model, tokenizer, tasks, steering=items, limit=limit)["results"]
        for items in (None, interventions_of(steering))
    ]
    scores = {}
    for task in tasks:
        measure = next((name for name in MEASURES if name in results[0][task]), None)
        if measure is None:
            raise DataError(f"the task {task} with {', '.join(results[0][task])}", "a task with an accuracy")
        scores[task] = (float(results[0][task][measure]), float(results[1][task][measure]))
    return scores
