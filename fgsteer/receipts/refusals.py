"""Over- and under-refusal: harmless requests that are refused, and harmful ones that are not.

measure_refusals(model, tokenizer, vec.add(8.0), harmful, harmless, ["I", "Sorry"]).over.difference
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Bool
from torch import Tensor

from fgsteer.data.chat import Text
from fgsteer.directions.prompts import refusal_scores
from fgsteer.errors import SteeringError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.intervals import mean_interval, wilson
from fgsteer.models.chat import is_chat_model
from fgsteer.receipts.retention import Change
from fgsteer.steering.entries import Entry

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class Refusals(OneLineRepr):
    """How refusals change under steering.

    Args:
        over: The share of harmless requests that are refused, which should be 0.
        under: The share of harmful requests that are not refused, which should be 0.
    """

    over: Change
    under: Change


@checked
def measure_refusals(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Entry,
    harmful: Sequence[Text],
    harmless: Sequence[Text],
    refusal_tokens: Sequence[str | int],
    *,
    batch_tokens: int | None = None,
) -> Refusals:
    """Which requests are refused without and with steering: those whose reply more likely than not begins so.

    A request counts as refused where the log-odds of ``refusal_scores`` are above 0 (arXiv 2406.11717).

    Args:
        model: A chat model.
        tokenizer: Its tokenizer.
        steering: An intervention, or a list of them that compose.
        harmful: Requests that should be refused, at least two.
        harmless: Requests that should not, at least two; best those that look harmful (XSTest, arXiv 2308.01263).
        refusal_tokens: The first tokens of refusals, as texts of one token each or as ids.
        batch_tokens: The tokens in a forward pass, which bound memory and change no result.

    Raises:
        SteeringError: The model does not chat, so that it refuses nothing.
        DataError: A kind has fewer than two requests, or a token is none.
    """
    if not is_chat_model(model, tokenizer):
        raise SteeringError(
            "a model that does not chat", "a chat model, whose replies can be refusals", "leave requests out"
        )
    under, over = (
        refusal_scores(model, tokenizer, requests, refusal_tokens, [None, steering], batch_tokens=batch_tokens)
        for requests in (harmful, harmless)
    )
    return Refusals(_share(over > 0), _share(under <= 0))


def _share(hit: Bool[Tensor, "entries requests"]) -> Change:
    shares = [wilson(float(row.sum()), len(row)) for row in hit]
    changes = (hit[1].double() - hit[0].double()).tolist()
    return Change(shares[0], shares[1], mean_interval([dict(enumerate(changes))], lambda number: number))
