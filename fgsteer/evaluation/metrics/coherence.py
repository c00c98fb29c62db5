"""Coherence of generated texts without a judge: what the unsteered model makes of them, and whether they loop.

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

    The moving-average type-token ratio (Covington & McFall 2010) of bigrams: unlike the share in a
    whole text it does not fall with the text's length. ``1 ≤ window ≤ len(bigrams)``.
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
    """Of each text, (texts,) float64: coherence, cross-entropy in nats a token, and the repetition penalty."""

    coherence: Float[Tensor, " texts"]
    cross_entropy: Float[Tensor, " texts"]
    repetition: Float[Tensor, " texts"]


@dataclass(frozen=True, eq=False, repr=False)
class Coherence(OneLineRepr):
    """Scores texts against unsteered samples of the same model; made by ``fit``.

    ``coherence = exp(−max(0, CE(text) − CE₀)) · min(1, D_w(text) / D_w)²``, in [0, 1]. CE is in nats a token under
    the unsteered model, ``CE₀`` its mean over the samples. ``D_w`` is ``distinct_share`` in windows of w
    bigrams of tokens, ``distinct[w − 1]`` its mean over the samples; w is as many as the text has,
    at most the samples' median. So a text of any length is compared with
    unsteered text of the same length, and a longer one by windows of the samples' length.
    Squared, because a text said twice over has half the distinct bigrams and should not pass:
    it scores about 0.3, one said three times about 0.1. Period beyond the samples' length goes unseen.
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
        """From unsteered samples, drawn as the texts to be scored: the same prompts, length and sampling.

        With ``prompts`` samples are continuations, whose prompts are context. Greedy samples may loop, and loops
        would then pass: sample. Samples with nothing to score are left out. Raises DataError when no
        sample has two tokens to score, or for another number of prompts than samples.
        """
        losses = text_cross_entropies(model, tokenizer, samples, prompts=prompts, joint=joint)
        found = [b for b in _bigrams(model, tokenizer, samples, prompts, joint) if b]
        if not found:
            raise DataError(f"{count(len(samples), 'sample')} without a bigram", "generated texts of several tokens")
        window = statistics.median_low([len(b) for b in found])
        shares = [[distinct_share(b, n) for b in found if len(b) >= n] for n in range(1, window + 1)]
        distinct = torch.tensor([statistics.fmean(share) for share in shares], dtype=torch.float64)
        return cls(model, tokenizer, float(losses.nanmean()), distinct, joint)

    def measure(self, texts: Sequence[str], prompts: Sequence[Text] | None = None) -> CoherenceScores:
        """Coherence of each text and the two figures that it is made of; see the class.

        A text without a token to score has cross-entropy nan and coherence 0: it says nothing. One
        without two tokens cannot repeat and has penalty 1.
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
    """Neighbours among the tokens of every text that are scored."""
    triples = ((prompt, text, True) for prompt, text in with_prompts(texts, prompts))
    found: list[list[tuple[int, int]]] = [[] for _ in texts]
    reader = TokenReader(
        tokenizer, rule="answer", window=context_window(model), joint=joint, skip_empty=True, scored=True
    )
    for rows in reader.rows(triples):
        for row in rows:
            ids = [row.ids[place] for place in row.selected]
            found[row.index] = list(pairwise(ids))
    return found
