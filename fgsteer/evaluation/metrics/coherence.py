"""Coherence of generated texts by the unsteered model: how probable it finds them, and whether they repeat themselves.

judge = Coherence.fit(model, tokenizer, unsteered_samples)
judge.score(texts)                                                       (texts,), 0 to 1
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.evaluation.metrics.answers import text_cross_entropies, with_prompts
from fgsteer.models.properties import context_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def distinct_share(bigrams: Sequence[Any], window: int) -> float:
    """Share of distinct ones among ``window`` consecutive bigrams, averaged over all such windows of a text.

    This is the moving-average type-token ratio of bigrams (Covington & McFall 2010): unlike the share in a whole text
    it does not fall with the text's length. ``1 ≤ window ≤ len(bigrams)``.
    """
    starts = len(bigrams) - window + 1
    before: dict[Any, int] = {}
    distinct = 0
    for place, bigram in enumerate(bigrams):
        # the windows that hold this place and no earlier one of the same bigram
        first = max(0, place - window + 1, before.get(bigram, -1) + 1)
        distinct += max(0, min(place, starts - 1) - first + 1)
        before[bigram] = place
    return distinct / (starts * window)


@dataclass(frozen=True, eq=False, repr=False)
class CoherenceScores(OneLineRepr):
    """Coherence of texts, and the two measures that it is made of.

    Args:
        coherence: Coherence of each text in [0, 1], (texts,), float64.
        cross_entropy: Cross-entropy under the unsteered model in nats a token, (texts,), float64.
        repetition: The factor for repetition in [0, 1], 1 for none, (texts,), float64.
    """

    coherence: Float[Tensor, " texts"]
    cross_entropy: Float[Tensor, " texts"]
    repetition: Float[Tensor, " texts"]


@dataclass(frozen=True, eq=False, repr=False)
class Coherence(OneLineRepr):
    """Scores texts against unsteered samples of the same model; ``fit`` makes it.

    ``coherence = exp(−max(0, CE(text) − CE₀)) · min(1, D_w(text) / D_w)²``, in [0, 1]. CE is in nats a token under the
    unsteered model, and ``CE₀`` is its mean over the samples. ``D_w`` is ``distinct_share`` in windows of w bigrams of
    tokens, and ``distinct[w − 1]`` is its mean over the samples; w is the number of the text's bigrams, at most the
    samples' median. So a text of any length is compared with unsteered text of the same length, and a longer one by
    windows of the samples' length. The share is squared because a text that is said twice over has half the distinct
    bigrams and should not pass: it scores about 0.3, and one said three times about 0.1. A repetition after more
    tokens than the samples have is not noticed.

    Args:
        model: The unsteered model.
        tokenizer: Its tokenizer.
        cross_entropy: ``CE₀``, in nats a token.
        distinct: ``D_w`` of the samples for w = 1, 2, …, (window,).
        joint: What joins prompt and text, as in ``log_probabilities``; "" for what a model generated.
    """

    model: Any
    tokenizer: Any
    cross_entropy: float
    distinct: Float[Tensor, " window"]
    joint: str | None = ""

    @classmethod
    @checked
    def fit(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        samples: Sequence[str],
        *,
        prompts: Sequence[Text] | None = None,
        joint: str | None = "",
    ) -> Coherence:
        """Fit to unsteered samples, which are drawn as the texts to be scored: same prompts, length and sampling.

        Draw the samples, do not decode greedily: greedy texts may loop, and loops would then pass.

        Args:
            model: The unsteered model.
            tokenizer: Its tokenizer.
            samples: The samples; those with nothing to score are left out.
            prompts: A prompt for each sample, which continues it: prompts are context.
            joint: What joins prompt and sample, as in ``log_probabilities``.

        Raises:
            DataError: No sample has two tokens to score, or there is another number of prompts than samples.
        """
        losses = text_cross_entropies(model, tokenizer, samples, prompts=prompts, joint=joint)
        bigrams = [row for row in _bigrams(model, tokenizer, samples, prompts, joint) if row]
        if not bigrams:
            raise DataError(
                f"{count(len(samples), 'sample')} without two tokens to score", "generated texts of several tokens"
            )
        window = statistics.median_low([len(row) for row in bigrams])
        shares = [[distinct_share(row, n) for row in bigrams if len(row) >= n] for n in range(1, window + 1)]
        distinct = torch.tensor([statistics.fmean(share) for share in shares], dtype=torch.float64)
        return cls(model, tokenizer, float(losses.nanmean()), distinct, joint)

    @checked
    def measure(self, texts: Sequence[str], prompts: Sequence[Text] | None = None) -> CoherenceScores:
        """Coherence of each text, and the two measures that it is made of.

        A text without a token to score has cross-entropy nan and coherence 0. One without two tokens cannot repeat
        itself and has penalty 1.

        Args:
            texts: The texts.
            prompts: A prompt for each text, which continues it.

        Raises:
            DataError: There is another number of prompts than texts.
        """
        losses = text_cross_entropies(self.model, self.tokenizer, texts, prompts=prompts, joint=self.joint)
        penalty = torch.ones(len(texts), dtype=torch.float64)
        for index, bigrams in enumerate(_bigrams(self.model, self.tokenizer, texts, prompts, self.joint)):
            if bigrams:
                window = min(len(bigrams), len(self.distinct))
                penalty[index] = distinct_share(bigrams, window) / float(self.distinct[window - 1])
        penalty = penalty.clamp(max=1).square()
        fluency = (self.cross_entropy - losses).clamp(max=0).exp()
        return CoherenceScores((fluency * penalty).nan_to_num(0.0), losses, penalty)

    @property
    def name(self) -> str:
        """What runs call this judge of coherence."""
        return "unsteered"

    def coherence(self, texts: Sequence[str], prompts: Sequence[Text] | None = None) -> Float[Tensor, " texts"]:
        """The same as ``score``: what a benchmark asks of a ``CoherenceJudge``."""
        return self.score(texts, prompts)

    def score(self, texts: Sequence[str], prompts: Sequence[Text] | None = None) -> Float[Tensor, " texts"]:
        """Coherence of each text, (texts,) float64 in [0, 1]; see the class."""
        return self.measure(texts, prompts).coherence


def _bigrams(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    prompts: Sequence[Text] | None,
    joint: str | None,
) -> list[list[tuple[int, int]]]:
    """The pairs of neighbouring tokens that are scored, of every text."""
    triples = ((prompt, text, True) for prompt, text in with_prompts(texts, prompts))
    bigrams: list[list[tuple[int, int]]] = [[] for _ in texts]
    reader = TokenReader(
        tokenizer, rule="answer", window=context_window(model), joint=joint, skip_empty=True, scored=True
    )
    for rows in reader.rows(triples):
        for row in rows:
            ids = [row.ids[place] for place in row.selected]
            bigrams[row.index] = list(pairwise(ids))
    return bigrams
