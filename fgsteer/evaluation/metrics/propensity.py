"""How much more probable a model finds one side of a contrast than the other, text by text, with an interval.

propensity = Propensity(load_contrast("wedding"))
values, unit = propensity.values(model, tokenizer, [None, vec.add(4.0)])
propensity.interval(propensity.shares(values[1] - values[0]))        the effect of steering
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.data.contrasts import ContrastSet
from fgsteer.errors import DataError
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval
from fgsteer.likelihood.passes import TextPasses
from fgsteer.likelihood.scoring import text_log_probabilities
from fgsteer.steering.entries import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Shares = Float[np.ndarray, " units"]


class Propensity:
    """``mean⁺ − mean⁻`` of the two sides' log-probabilities, as a sum of what each unit adds to it.

    Units are pairs, then single positives, then single negatives. Pairs of one prompt resemble each other and are
    one cluster of ``interval``; a prompt that all pairs share is part of what is measured. Raises DataError where
    one of these kinds has a single member, which has no interval.
    """

    def __init__(self, contrast: ContrastSet) -> None:
        self.contrast = contrast
        self.positives, self.negatives = contrast.count(True), contrast.count(False)
        self.pairs = len(contrast.pairs)
        self.texts = [*contrast.side(True), *contrast.side(False)]
        self.groups = (self.pairs, self.positives - self.pairs, self.negatives - self.pairs)
        if 1 in self.groups:
            numbers = "{} pairs, {} more positives and {} more negatives".format(*self.groups)
            raise DataError(
                f"the contrast set {contrast.name!r} with {numbers}",
                "none or at least two of each of these, to take an interval over",
                "add texts to the contrast set, or leave the single one out",
            )

    @property
    def numbers(self) -> dict[str, int]:
        """How many texts a side has, and pairs among them."""
        return {"positives": self.positives, "negatives": self.negatives, "pairs": self.pairs}

    def values(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        entries: Sequence[Entry],
        batch_tokens: int | None = None,
    ) -> tuple[Float[Tensor, "entries texts"], str]:
        """Each text's log-probability under each entry of ``log_probabilities``, and its unit.

        Nats a token; but nats an answer, sums, where all are pairs with a prompt whose two completions
        have equally many tokens. Of unequal ones, sums would charge the longer with what steering costs every token.
        """
        return self.values_of(self.passes(model, tokenizer, batch_tokens), entries)

    def passes(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int | None = None
    ) -> TextPasses:
        """The texts in batches, for many calls of ``values_of``."""
        return TextPasses(model, tokenizer, self.texts, batch_tokens=batch_tokens, keep=True)

    def values_of(self, passes: TextPasses, entries: Sequence[Entry]) -> tuple[Float[Tensor, "entries texts"], str]:
        """What ``values`` gives, on texts that are in batches already."""
        scored = text_log_probabilities(passes, len(self.texts), entries)
        answers = self.groups[1:] == (0, 0) and all(pair.prompt for pair in self.contrast.pairs)
        if answers and torch.equal(scored.counts[: self.pairs], scored.counts[self.pairs :]):
            return scored.sums, "nats an answer"
        return scored.sums / scored.counts, "nats a token"

    def shares(self, values: Float[Tensor, " texts"]) -> Shares:
        """What each unit adds to ``mean⁺ − mean⁻`` of values by text."""
        positive = values[: self.positives].numpy() / self.positives
        negative = values[self.positives :].numpy() / self.negatives
        pairs = self.pairs
        return np.concatenate([positive[:pairs] - negative[:pairs], positive[pairs:], -negative[pairs:]])

    def interval(self, shares: Shares) -> Interval:
        """The sum of shares with its 95 % interval, each kind of unit a stratum and a prompt's pairs one cluster."""
        kinds = [kind for kind in np.split(np.arange(len(shares)), np.cumsum(self.groups)[:-1]) if len(kind)]
        # mean_interval() takes the mean of the kinds' means
        scaled = [{int(unit): float(shares[unit]) * len(kind) * len(kinds) for unit in kind} for kind in kinds]
        return mean_interval(scaled, self._clusters.__getitem__)

    @cached_property
    def _clusters(self) -> list[str | int]:
        """Each unit's cluster: a pair's prompt; a unit without one, or whose prompt all pairs share, is its own."""
        prompts = [repr(pair.prompt) if pair.prompt else number for number, pair in enumerate(self.contrast.pairs)]
        fixed = len(set(prompts)) == 1
        return [number if fixed or number >= self.pairs else prompts[number] for number in range(sum(self.groups))]
