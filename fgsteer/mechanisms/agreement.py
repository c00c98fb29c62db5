"""How near another run comes to the steered one, on the texts of an attribution: faithfulness and token match.

agreement = Agreement(); agreement.add(base_logits, steered_logits, other_logits); agreement.faithfulness
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.display.tables import Cell, Table
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.likelihood.lower_blocks import unchanged_blocks
from fgsteer.mechanisms.attribution import SteeringAttribution
from fgsteer.mechanisms.texts import SteeredText, first_block, from_block, logits_of, text_device
from fgsteer.steering.entries import Entry, interventions_of
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESAMPLES = 1000  # of texts, for intervals


@dataclass
class Agreement:
    """Sums over the positions of each text, from which faithfulness is a ratio.

    Args:
        kl: ``Σ KL(steered‖other)`` of each text, in nats.
        kl_base: ``Σ KL(steered‖unsteered)`` of each text.
        matches: Positions at which the other run goes on as the steered one, of those where steering changes that.
        changed: How many of those there are.
        positions: How many positions were read.
    """

    kl: list[float] = field(default_factory=list)
    kl_base: list[float] = field(default_factory=list)
    matches: int = 0
    changed: int = 0
    positions: int = 0

    def add(
        self,
        base: Float[Tensor, "tokens vocabulary"],
        steered: Float[Tensor, "tokens vocabulary"],
        other: Float[Tensor, "tokens vocabulary"],
    ) -> None:
        """Add one text's positions."""
        logs = [_log_softmax(logits.to(steered.device)) for logits in (steered, base, other)]
        p = logs[0].exp()
        self.kl_base.append(float((p * (logs[0] - logs[1])).sum()))
        self.kl.append(float((p * (logs[0] - logs[2])).sum()))
        tokens, before, now = (log.argmax(-1) for log in logs)
        changed = tokens != before
        self.changed += int(changed.sum())
        self.matches += int((changed & (now == tokens)).sum())
        self.positions += len(tokens)

    @property
    def faithfulness(self) -> float:
        """``1 − KL(steered‖other) / KL(steered‖unsteered)``: 1 for the steered run, 0 for the unsteered one.

        It is nan where steering changes nothing.
        """
        return 1 - sum(self.kl) / sum(self.kl_base) if sum(self.kl_base) else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of faithfulness, by a bootstrap over texts."""
        draws = torch.Generator().manual_seed(0)
        picks = torch.randint(len(self.kl), (RESAMPLES, len(self.kl)), generator=draws)
        kl, base = (torch.tensor(sums, dtype=torch.float64)[picks].sum(1) for sums in (self.kl, self.kl_base))
        low, high = torch.quantile(1 - kl / base, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    @property
    def token_match(self) -> float:
        """The share of tokens changed by steering that the other run changes in the same way; nan where none is."""
        return self.matches / self.changed if self.changed else math.nan


def _log_softmax(logits: Float[Tensor, "tokens vocabulary"]) -> Float[Tensor, "tokens vocabulary"]:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


@dataclass(frozen=True, eq=False, repr=False)
class Faithful(OneLineRepr):
    """How near a run comes to the steered one.

    Args:
        name: What was run.
        kl: ``KL(steered‖run)``, in nats a token.
        faithfulness: ``1 − KL(steered‖run) / KL(steered‖unsteered)``.
        low: The lower end of its 95 % interval, by a bootstrap over texts.
        high: The upper end.
        token_match: The share of tokens changed by steering that the run changes in the same way.
    """

    name: str
    kl: float
    faithfulness: float
    low: float
    high: float
    token_match: float

    @classmethod
    def of(cls, name: str, agreement: Agreement) -> Faithful:
        """What an agreement comes to."""
        kl = sum(agreement.kl) / agreement.positions
        return cls(name, kl, agreement.faithfulness, *agreement.interval, agreement.token_match)

    def cells(self) -> dict[str, Cell]:
        """What a table shows of it."""
        return {
            "run": self.name,
            "KL": self.kl,
            "faithfulness": round(self.faithfulness, 4),
            "from": round(self.low, 4),
            "to": round(self.high, 4),
            "same tokens": round(self.token_match, 4),
        }


@torch.no_grad()
def plain_logits(
    model: PreTrainedModel, text: SteeredText, first: int, steering: Entry
) -> Float[Tensor, "tokens vocabulary"]:
    """The logits of a text's continuation, read at once under a steering that leaves the ``first`` blocks alone."""
    ids = text_device(model, text)
    items = interventions_of(steering)
    with from_block(model, ids, first, 1), steer(model, items, prompt_lengths=[text.prompt_length]):
        return logits_of(model, ids, len(ids[0]) - text.prompt_length)[0]


@checked
@torch.no_grad()
def steering_faithfulness(
    model: PreTrainedModel, attribution: SteeringAttribution, steerings: Mapping[str, Entry]
) -> Table[Faithful]:
    """How near other steerings come to the attributed one, on its texts.

    That is ``1 − KL(steered‖other) / KL(steered‖unsteered)``, with the sums over texts above and below.

    Args:
        model: The model that was attributed.
        attribution: The attribution, which holds steering and texts.
        steerings: {name: interventions}, such as sparsified vectors and their controls.

    Returns:
        A row for each, in their order.

    Raises:
        DataError: There is nothing to compare.
    """
    if not steerings:
        raise DataError("no steerings", "{name: interventions}")
    agreements = {name: Agreement() for name in steerings}
    first = first_block(attribution.hookpoint)
    for text in attribution.texts:
        base, steered = (plain_logits(model, text, first, entry) for entry in (None, attribution.steering))
        for name, steering in steerings.items():
            depth = unchanged_blocks(steering, first)
            agreements[name].add(base, steered, plain_logits(model, text, depth, steering))
    return Table(Faithful.of(name, agreement) for name, agreement in agreements.items())
