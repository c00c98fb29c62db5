"""Strengths of a vector: what each costs neutral text, and how large it is beside the activations that it changes.

meter = StrengthMeter(model, tokenizer, vec, vec.add, chat=is_chat_model(model, tokenizer))
meter.find(cost=0.3)          Strength(coefficient 5.7, cost 0.29, relative_norm 0.21)
meter.useful()                several strengths, from hardly any effect to broken text
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from fgsteer.activations.batches import batch_texts, record_batch
from fgsteer.activations.tokens import TokenReader
from fgsteer.data.chat import Text
from fgsteer.data.shipped import load_neutral
from fgsteer.errors import SteeringError
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.base import Intervention
from fgsteer.likelihood.calibration import calibrate
from fgsteer.likelihood.scoring import cross_entropies
from fgsteer.models.properties import context_window
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SENTENCES, _TOGETHER = 16, 4  # of the neutral sentences, and how many make one text
_REQUEST = "Write a few sentences about an ordinary day."
FIRST_GUESS = 0.25  # of the activations' norm
DOSES = (
    1 / 64,
    1 / 32,
    1 / 16,
    1 / 8,
    1 / 4,
    3 / 8,
    1 / 2,
    3 / 4,
    1,
    3 / 2,
)  # of the activations' norm: what ``useful`` tries
USEFUL_COSTS = (0.003, 2.0)  # nats per token: below, trained vectors steer no more; above, no language is left
TOLERANCE = 0.1  # of the cost that ``find`` is asked for


@dataclass(frozen=True, repr=False)
class Strength(OneLineRepr):
    """A strength of a vector, and what it does.

    Args:
        coefficient: The strength, as ``vec.add`` or ``vec.affine`` takes it.
        cost: The rise of the cross-entropy of neutral text, in nats per token.
        relative_norm: The norm of the vector times the strength, over the median norm of the activations.
    """

    coefficient: float
    cost: float
    relative_norm: float

    def as_dict(self) -> dict[str, float]:
        """The strength as plain JSON."""
        return asdict(self)


def neutral_texts(*, chat: bool) -> list[tuple[Text, Text]]:
    """Return pairs (prompt, completion) that costs are measured on, made of shipped neutral sentences.

    A completion is a few sentences. Its prompt is another one, or in a chat a user's request for such sentences, so
    that a cost is that of steering where a chat is steered.
    """
    sentences = load_neutral()[0][:_SENTENCES]
    groups = [sentences[start : start + _TOGETHER] for start in range(0, len(sentences), _TOGETHER)]
    if chat:
        return [([{"role": "user", "content": _REQUEST}], " ".join(group)) for group in groups]
    return [(first, " ".join(others)) for first, *others in groups]


class StrengthMeter:
    """Measures strengths of one vector on neutral texts.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        vector: The vector.
        make: A function from a strength to an intervention of the vector, such as ``vector.add``.
        chat: Whether the neutral texts are replies in a chat.

    Raises:
        SteeringError: The vector's norm is 0, so that no strength does anything.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        vector: SteeringVector,
        make: Callable[[float], Intervention],
        *,
        chat: bool,
    ) -> None:
        if not vector.norm:
            raise SteeringError("a vector of norm 0", "a vector that changes activations", "check what it was made of")
        self.model, self.tokenizer, self.vector, self.make = model, tokenizer, vector, make
        self.texts = neutral_texts(chat=chat)

    @cached_property
    def activation_norm(self) -> float:
        """The median norm of the activations at the vector's hookpoint, over the texts' scored tokens.

        It is the median because a few tokens, the first of a text above all, have norms some hundred times the others'.
        """
        triples = ((*pair, True) for pair in self.texts)
        reader = TokenReader(self.tokenizer, rule="answer", window=context_window(self.model))
        norms, at = [], self.vector.hookpoint
        for batch in batch_texts(self.model, reader, triples):
            values = record_batch(self.model, batch, [at])[at]
            norms.append(values[batch.selected.to(values.device)].float().norm(dim=-1).cpu())
        return float(torch.cat(norms).median())

    def measure(self, coefficients: Sequence[float]) -> list[Strength]:
        """Measure what each of several coefficients costs, in one batch."""
        entries = [None, *map(self.make, coefficients)]
        unsteered, *steered = cross_entropies(self.model, self.tokenizer, self.texts, entries)
        size = self.vector.norm / self.activation_norm
        return [Strength(c, value - unsteered, abs(c) * size) for c, value in zip(coefficients, steered, strict=True)]

    def useful(self) -> list[Strength]:
        """Measure strengths from 1/64 to 3/2 of the activations' norm; return those that steer and leave language.

        All of them are returned where none does.
        """
        unit = self.activation_norm / self.vector.norm
        tried = self.measure([_rounded(dose * unit) for dose in DOSES])
        return [strength for strength in tried if USEFUL_COSTS[0] <= strength.cost <= USEFUL_COSTS[1]] or tried

    def find(self, cost: float) -> Strength:
        """Find the coefficient, of two digits, that costs about ``cost`` nats per token; its own cost comes with it.

        Raises SteeringError where no coefficient does, as ``calibrate`` does.
        """
        start = FIRST_GUESS * self.activation_norm / self.vector.norm
        coefficient = calibrate(
            self.model, self.tokenizer, self.make, self.texts, target_ce_rise=cost, start=start, tolerance=TOLERANCE
        )
        return self.measure([_rounded(coefficient)])[0]


def _rounded(coefficient: float) -> float:
    return float(f"{coefficient:.2g}")
