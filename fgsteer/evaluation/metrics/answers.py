"""Measures of a model's answers and texts: cross-entropy by text, probabilities of answers, steerability.

Cross-entropy and KL divergence of whole sets of texts, which calibration needs too, are in ``fgsteer.likelihood``.

    text_cross_entropies(model, tokenizer, texts)                         nats a token, (texts,)
    answer_probabilities(model, tokenizer, questions, [None, vec.add(4.0)]).share
    measure_steerability(model, tokenizer, vec.add, questions, [-4, -2, 0, 2, 4]).anti_steerable
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text, refuse_one_text
from fgsteer.data.contrast_files import as_contrast
from fgsteer.data.contrasts import ContrastPair, ContrastSet
from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.checks import checked, describe_value
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.interventions import Intervention
from fgsteer.likelihood.scoring import log_probabilities
from fgsteer.steering.entries import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
def text_cross_entropies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompts: Sequence[Text] | None = None,
    joint: str | None = None,
    batch_tokens: int | None = None,
) -> Float[Tensor, " texts"]:
    """Cross-entropy of each text under the unsteered model.

    ``CE(text) = −mean_t log p(token_t | tokens before)``.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: The texts.
        prompts: A prompt for each text, which continues it: the prompt is context and is not scored.
        joint: What joins prompt and text, as in ``log_probabilities``; "" for what a model generated.
        batch_tokens: Padded tokens of a batch.

    Returns:
        Nats a predicted token, (texts,), float64. A text without a token to score, such as an empty continuation,
        has nan, which is not mistaken for a value.

    Raises:
        DataError: There is another number of prompts than texts.
    """
    pairs = with_prompts(texts, prompts)
    scored = log_probabilities(model, tokenizer, pairs, joint=joint, skip_empty=True, batch_tokens=batch_tokens)
    return scored.cross_entropy[0]


@checked
def perplexities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    prompts: Sequence[Text] | None = None,
    joint: str | None = None,
    batch_tokens: int | None = None,
) -> Float[Tensor, " texts"]:
    """Perplexity of each text under the unsteered model, ``exp(CE(text))``.

    Arguments and errors are those of ``text_cross_entropies``. The perplexity of a whole set of texts, in which every
    token counts alike, is ``exp(cross_entropy(...))``.

    Returns:
        Perplexities, (texts,), float64.
    """
    losses = text_cross_entropies(model, tokenizer, texts, prompts=prompts, joint=joint, batch_tokens=batch_tokens)
    return losses.exp()


def with_prompts(texts: Sequence[str], prompts: Sequence[Text] | None) -> list[tuple[Text, Text]]:
    """(prompt, text) pairs. Raises DataError for a single string, or another number of prompts."""
    refuse_one_text(texts)
    if isinstance(prompts, str) or (prompts is not None and len(prompts) != len(texts)):
        raise DataError(
            f"{count(len(prompts), 'prompt')} for {count(len(texts), 'text')}",
            "a list with one prompt for each text",
        )
    return list(zip(prompts or [""] * len(texts), texts, strict=True))


@dataclass(frozen=True, eq=False, repr=False)
class AnswerProbabilities(OneLineRepr):
    """Log-probabilities of the two answers to each question, each summed over the answer's tokens.

    Args:
        positive: Those of the positive answers, (interventions, questions), nats, float64.
        negative: Those of the negative answers, likewise.
    """

    positive: Float[Tensor, "interventions questions"]
    negative: Float[Tensor, "interventions questions"]

    @property
    def probability(self) -> Float[Tensor, "interventions questions"]:
        """Probability of the positive answer among everything that the model could say."""
        return self.positive.exp()

    @property
    def share(self) -> Float[Tensor, "interventions questions"]:
        """``p⁺ / (p⁺ + p⁻)``: probability of the positive answer among the two."""
        return self.difference.sigmoid()

    @property
    def difference(self) -> Float[Tensor, "interventions questions"]:
        """``log p⁺ − log p⁻``; for answers of one token the difference of their logits."""
        return self.positive - self.negative


@checked
def answer_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: ContrastSet | str | Path | Sequence[ContrastPair],
    steering: Sequence[Entry] = (None,),
    *,
    joint: str | None = None,
    batch_tokens: int | None = None,
) -> AnswerProbabilities:
    """How probable each question's positive and negative answer is under each intervention.

    An answer's log-probability is the sum over its tokens, ``Σ_t log p(token_t | prompt, tokens before)``, by softmax
    over the full vocabulary. Longer answers are less probable, and nothing corrects for it. This is the A/B evaluation
    of CAA (arXiv 2312.06681).

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: A contrast set of pairs with prompts, such as ``ContrastPair(" A", " B", prompt="…\\nAnswer:")``.
        steering: What is compared, as in ``log_probabilities``: interventions, lists of them, or None.
        joint: What joins prompt and answer, as in ``log_probabilities``.
        batch_tokens: Padded tokens of a batch.

    Returns:
        The two answers' log-probabilities, (interventions, questions).

    Raises:
        DataError: There are no pairs, or two answers do not part at their first token: "(A" and "(B" may begin with
            the same "(", which says nothing of the choice.
    """
    pairs = as_contrast(questions).pairs
    if not pairs:
        raise DataError(
            "questions without pairs",
            "pairs of two answers",
            "pass ContrastPair(positive, negative, prompt=...) entries",
        )
    answers = [(pair.prompt, text) for pair in pairs for text in (pair.positive, pair.negative)]
    _check_parting(tokenizer, answers, joint)
    sums = log_probabilities(model, tokenizer, answers, steering, joint=joint, batch_tokens=batch_tokens).sums
    return AnswerProbabilities(sums[:, 0::2], sums[:, 1::2])


def _check_parting(tokenizer: PreTrainedTokenizerBase, answers: Sequence[tuple[Text, Text]], joint: str | None) -> None:
    """Raises DataError for neighbours whose tokens are not the same up to, and other at, the first token scored."""
    triples = ((prompt, answer, True) for prompt, answer in answers)
    reader = TokenReader(tokenizer, rule="answer", joint=joint, scored=True)
    rows = {row.index: row for window in reader.rows(triples) for row in window}
    for index in range(0, len(answers), 2):
        a, b = rows[index], rows[index + 1]
        same = [x == y for x, y in zip(a.ids, b.ids, strict=False)]
        parting = same.index(False) if False in same else len(same)
        if not a.selected[0] == b.selected[0] == parting:
            both = [answer for _, answer in answers[index : index + 2]]
            raise DataError(
                f"question {index // 2}, whose answers {both!r:.80} part at token {parting} but are scored from tokens "
                f"{a.selected[0]} and {b.selected[0]}",
                "answers that differ in their first token, after the same prompt",
                'move what the answers share to the end of the prompt, with joint="" if no space belongs between',
            )


@dataclass(frozen=True, eq=False, repr=False)
class Steerability(OneLineRepr):
    """How steerable samples are.

    Args:
        slopes: By how many nats a unit of the coefficient moves each sample's ``log p(y⁺) − log p(y⁻)``, (samples,).
    """

    slopes: Float[Tensor, " samples"]

    @property
    def mean(self) -> float:
        """Mean slope."""
        return float(self.slopes.mean())

    @property
    def anti_steerable(self) -> float:
        """Share of the samples that are steered the wrong way: whose slope is negative."""
        return float((self.slopes < 0).double().mean())


@checked
def steerability(
    coefficients: Sequence[float] | Float[Tensor, " coefficients"],
    differences: Float[Tensor, "coefficients samples"],
) -> Steerability:
    """Least-squares slope, by sample, of ``d = log p(y⁺) − log p(y⁻)`` on the coefficient c.

    ``slope_i = Σ_k (c_k − c̄)(d_ki − d̄_i) / Σ_k (c_k − c̄)²`` (Tan et al. 2024, arXiv 2407.12404).

    Args:
        coefficients: The coefficients, (k,).
        differences: The differences d, (k, samples), in nats.

    Returns:
        The slopes, (samples,).

    Raises:
        DataError: The shapes do not agree, there is no sample, all coefficients are the same, or a value is not
            finite.
    """
    c = torch.as_tensor(coefficients, dtype=torch.float64).cpu()
    d = differences.detach().cpu().double()
    if c.ndim != 1 or d.ndim != 2 or len(c) != len(d) or not d.numel():
        raise DataError(
            f"coefficients of shape {tuple(c.shape)} and differences of shape {tuple(d.shape)}",
            "shapes (k,) and (k, samples), with one sample at least",
        )
    if not c.isfinite().all() or not c.min() < c.max():
        raise DataError(f"coefficients {c.tolist()}", "finite numbers of which at least two differ")
    if not d.isfinite().all():
        raise DataError("differences that are not finite", "finite log-probabilities", "use smaller coefficients")
    centred = c - c.mean()
    return Steerability(centred @ (d - d.mean(0)) / centred.square().sum())


@checked
def measure_steerability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[float], Intervention],
    questions: ContrastSet | str | Path | Sequence[ContrastPair],
    coefficients: Sequence[float],
    *,
    joint: str | None = None,
    batch_tokens: int | None = None,
) -> Steerability:
    """``steerability`` towards the questions' positive answers, measured at several coefficients.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        make: The function from a coefficient to an intervention, such as ``vec.add``.
        questions: Questions as for ``answer_probabilities``.
        coefficients: At least two different coefficients.
        joint: What joins prompt and answer, as in ``log_probabilities``.
        batch_tokens: Padded tokens of a batch.

    Returns:
        The slopes of the questions.

    Raises:
        SteeringError: ``make`` returns something else than an intervention.
        DataError: As ``answer_probabilities`` and ``steerability`` raise it.
    """
    entries = [make(float(c)) for c in coefficients]
    for c, entry in zip(coefficients, entries, strict=True):
        if not isinstance(entry, Intervention):
            raise SteeringError(
                f"{describe_value(entry)} from make({c})", "an intervention", "pass vec.add itself, without a call"
            )
    answers = answer_probabilities(model, tokenizer, questions, entries, joint=joint, batch_tokens=batch_tokens)
    return steerability(coefficients, answers.difference)
