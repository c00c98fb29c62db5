"""What is shown of a training while it runs: the loss, and what the vectors cost neutral text at present.

note = TrainingNote(model, tokenizer)
note({"cheerful": learner})                             "loss 0.412, neutral text +0.031 nats a token"
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch

from fgsteer.data.shipped import load_neutral
from fgsteer.learning.learner import Learner
from fgsteer.likelihood.passes import TextPasses
from fgsteer.likelihood.scoring import mean_cross_entropies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXTS = 8  # neutral ones
SHARE = 0.05  # of the time of a training, at most, that goes into its cost


class TrainingNote:
    """The loss of the last step and the rise of the cross-entropy of neutral texts, measured now and then.

    Vectors are added at the median of the strengths that they are trained at; of several, means are shown. Nothing of
    the training depends on it.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.passes: TextPasses | None = None
        self.rise: float | None = None
        self.due = 0.0  # when it may be measured again, by the monotonic clock

    def __call__(self, learners: Mapping[str, Learner]) -> str:
        """What to say. A strength that ReFT-r1's texts set themselves has no cost that is said."""
        losses = [learner.losses[-1] for learner in learners.values() if learner.losses]
        parts = [f"loss {fmean(losses):.3f}"] if losses else []
        began = time.monotonic()
        if began >= self.due and not any(learner.settings.objective == "reft_r1" for learner in learners.values()):
            self.rise = self.measure(learners)
            ended = time.monotonic()
            self.due = ended + (ended - began) * (1 / SHARE - 1)
        if self.rise is not None:
            parts.append(f"neutral text {self.rise:+.3f} nats a token")
        return ", ".join(parts)

    @torch.no_grad()
    def measure(self, learners: Mapping[str, Learner]) -> float:
        """The mean rise of the cross-entropy, in nats per token."""
        if self.passes is None:
            pairs = [("", text) for text in load_neutral()[0][:TEXTS]]
            self.passes = TextPasses(self.model, self.tokenizer, pairs, keep=True)
        entries = []
        for learner in learners.values():
            weights = learner.unit * learner.weights.detach()
            strength = 1.0 if learner.objective.signed else median(learner.settings.factors)
            entries.append(learner.space.add(weights, learner.space.direction(weights), strength))
        base, *steered = mean_cross_entropies(self.passes, TEXTS, [None, *entries])
        return fmean(steered) - base
