"""The parts of a trace: texts, tokens, what each intervention did, features.

text = found.texts[0]
text.written[3].top_before[0].text
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fgsteer.display.tables import Cell
from fgsteer.errors.reprs import OneLineRepr

TokenKind = Literal["special", "prompt", "generated"]
Source = Literal["given", "steered", "unsteered"]


@dataclass(frozen=True, repr=False)
class NextToken(OneLineRepr):
    """A token that a model might have written at a place, and how likely.

    Args:
        id: Its id.
        text: Its text, as it decodes alone.
        log_probability: Its log-probability, in nats.
    """

    id: int
    text: str
    log_probability: float


@dataclass(frozen=True, repr=False)
class TokenAction(OneLineRepr):
    """What one intervention did at one token.

    Args:
        acts: Whether it acted: the token is in its scope, and its gate is open there.
        gate: Whether its gate is open; None where it has none, or where no token of the text is in its scope.
        strength: What its direction was multiplied by, with its sign, and 0 where it did not act. Of an intervention
            with several directions it is the Euclidean norm of these numbers. It is in the units of the intervention:
            of ``Add`` its coefficient, of ``AddRelative`` that many times the activation's norm.
        dose: How far it moved the activation, ``‖h′ − h‖/‖h‖``, with h as the intervention got it.
    """

    acts: bool
    gate: bool | None
    strength: float
    dose: float


@dataclass(frozen=True, repr=False)
class TracedToken(OneLineRepr):
    """One token, before and after steering.

    "Before" is the unsteered model and "after" the steered one, both on the same tokens up to here. Log-probabilities,
    divergences and the likeliest tokens are of the distribution from which this token was drawn, which the token before
    it predicts; the first token of a text has none. ``KL(p‖q) = Σ_v p(v) (log p(v) − log q(v))`` over the whole
    vocabulary, in nats; a server knows none.

    Args:
        id: Its id.
        text: What it adds to the text.
        kind: "special" (BOS, EOS, and marks of a chat template), "prompt", or "generated", which is a given completion
            too.
        log_probability_before: Its log-probability under the unsteered model, in nats.
        log_probability_after: The same under the steered model.
        kl_steered_unsteered: KL(steered‖unsteered): what it costs to say this instead of what the model would say.
        kl_unsteered_steered: KL(unsteered‖steered).
        top_before: The likeliest tokens in its place under the unsteered model, most likely first.
        top_after: The same under the steered model.
        dose: How far all interventions together moved the activation, ``‖h′ − h‖/‖h‖``, at the hookpoint where that is
            largest; h is what came to that hookpoint in the steered pass. It is nan where a server wrote the trace.
        actions: What each intervention did, in the order of ``Trace.interventions``; none where a server wrote it.
        features_before: The activation of each feature of ``Trace.features`` in the unsteered pass.
        features_after: The same in the steered pass.
    """

    id: int
    text: str
    kind: TokenKind
    log_probability_before: float | None
    log_probability_after: float | None
    kl_steered_unsteered: float | None
    kl_unsteered_steered: float | None
    top_before: tuple[NextToken, ...]
    top_after: tuple[NextToken, ...]
    dose: float
    actions: tuple[TokenAction, ...] = ()
    features_before: tuple[float, ...] = ()
    features_after: tuple[float, ...] = ()

    @property
    def log_ratio(self) -> float:
        """``log p_after − log p_before``: how much likelier steering made the token, in nats; nan where not known."""
        before, after = self.log_probability_before, self.log_probability_after
        return math.nan if before is None or after is None else after - before


@dataclass(frozen=True, repr=False)
class TracedText(OneLineRepr):
    """A prompt with one completion, token by token.

    Args:
        prompt: The number of the prompt, from 0.
        source: Where the completion comes from: "given", or written by the "steered" or by the "unsteered" model.
        completion: The completion's text.
        prompt_tokens: How many tokens stand before the completion.
        tokens: All tokens of prompt and completion.
    """

    prompt: int
    source: Source
    completion: str
    prompt_tokens: int
    tokens: tuple[TracedToken, ...]

    @property
    def written(self) -> tuple[TracedToken, ...]:
        """The completion's tokens, each with the distribution from which it was drawn."""
        return self.tokens[self.prompt_tokens :]

    @property
    def kl_steered_unsteered(self) -> float:
        """The sum of KL(steered‖unsteered) over the completion's tokens, in nats; nan where a server wrote the trace.

        On text that the steered model wrote, sampled at temperature 1 and without truncation, it is an unbiased
        estimate of what steering costs a text of so many tokens.
        """
        known = [value for token in self.written if (value := token.kl_steered_unsteered) is not None]
        return math.fsum(known) if known or not self.written else math.nan

    @property
    def log_ratio(self) -> float:
        """The sum of ``log p_after − log p_before`` over the completion's tokens, in nats; nan where none is known.

        On text that the steered model wrote, sampled at temperature 1 and without truncation, its mean over texts is
        that of ``kl_steered_unsteered``; of a single text it is noisier.
        """
        known = [value for token in self.written if not math.isnan(value := token.log_ratio)]
        return math.fsum(known) if known else math.nan

    @property
    def mean_dose(self) -> float:
        """The mean dose over the completion's tokens; nan without any."""
        return _mean(token.dose for token in self.written)

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        before, after = (
            _mean(v for token in self.written if (v := getattr(token, f"log_probability_{name}")) is not None)
            for name in ("before", "after")
        )
        return {
            "prompt": self.prompt,
            "text": self.source,
            "tokens": len(self.written),
            "log-probability before": before,
            "log-probability after": after,
            "KL(steered‖unsteered)": _cell(self.kl_steered_unsteered),
            "dose": _cell(self.mean_dose),
            "completion": self.completion,
        }


@dataclass(frozen=True, repr=False)
class TracedIntervention(OneLineRepr):
    """An intervention of a trace, in words.

    Args:
        kind: Its class, such as "Add".
        hookpoint: Where it acts.
        scope: The tokens that it is for.
        gate: Its gate, "" without one.
        description: All of it in one line.
    """

    kind: str
    hookpoint: str
    scope: str
    gate: str
    description: str


@dataclass(frozen=True, repr=False)
class TracedFeature(OneLineRepr):
    """A feature whose activations a trace holds.

    Args:
        id: Its number in its SAE.
        label: What it is said to mean, "" where no label is known.
        mean_before: Its mean activation in unsteered passes, over all tokens that are not special.
        mean_after: The same in steered passes.
    """

    id: int
    label: str
    mean_before: float
    mean_after: float

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {"feature": self.id, "label": self.label, "before": self.mean_before, "after": self.mean_after}


def _cell(value: float) -> Cell:
    """A number for a table; None, which tables leave out, where it is not known."""
    return None if math.isnan(value) else value


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else math.nan
