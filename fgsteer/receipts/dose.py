"""How large a change is beside the activations, at the length at which a model is used.

measure_dose(model, tokenizer, vec.add(8.0)).relative      ‖c·v‖ / mean‖h‖ over the last tokens of a long context
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fgsteer.activations.recording import record
from fgsteer.activations.tokens import prompt_ids
from fgsteer.data.chat import refuse_one_text
from fgsteer.data.shipped import load_neutral
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.base import Intervention
from fgsteer.interventions.kernel import apply
from fgsteer.models.properties import context_window, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT, LAST = 2048, 256  # tokens; hidden-directions reads the last 1,024 of 12,288
# of hidden-directions 0.1.6, found on a few models: from this relative dose on, and what it calls that
ZONES = ((0.7, "working"), (1.5, "warn"), (1.9, "collapse"))
BELOW = "below working"


@dataclass(frozen=True, repr=False)
class Dose(OneLineRepr):
    """How large a change is beside the activations.

    Args:
        relative: ``mean‖Δh‖ / mean‖h‖``, with ``‖Δh‖ = ‖c·v‖`` where c·v is added, over the last tokens of a long
            context.
        mean_norm: The mean norm of the activations there.
        short_norm: Their mean norm over the first tokens, as many as the last ones; short prompts overstate it.
        context: The tokens of the context.
        last: How many of them are its last ones.
    """

    relative: float
    mean_norm: float
    short_norm: float
    context: int
    last: int

    @property
    def zone(self) -> str:
        """What hidden-directions 0.1.6 calls such a dose; found on a few models, so that it is a hint."""
        return next((name for least, name in reversed(ZONES) if self.relative >= least), BELOW)


@checked
@torch.no_grad()
def measure_dose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Intervention,
    *,
    texts: Sequence[str] | None = None,
    context: int = CONTEXT,
    last: int = LAST,
) -> Dose:
    """The relative dose ``mean‖Δh‖ / mean‖h‖`` at deployment length: over the last tokens of a long context.

    Of ``vec.add(c)`` it is ``‖c·v‖ / mean‖h‖``. The first tokens of a text have norms many times those of later ones,
    so that doses on short prompts look small. A gate counts as open.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        steering: An intervention whose change depends on the activation that it changes, or on nothing.
        texts: Texts that are put one after the other, and again in another order, until the context is full; by
            default the shipped neutral ones.
        context: The tokens of the context, at most the model's window.
        last: The last tokens, over which norms are averaged.

    Raises:
        DataError: There is no text, or the last tokens are more than half of the context.
        SteeringError: The change depends on the prompt or on activations elsewhere.
    """
    check_range("context", context, 2, MAX_COUNT, whole=True)
    check_range("last", last, 1, MAX_COUNT, whole=True)
    refuse_one_text(() if texts is None else texts)
    plain = list(load_neutral()[0] if texts is None else texts)
    if not any(text.strip() for text in plain):
        raise DataError("no texts", "at least one text to make a context of")
    length = min(context, context_window(model) or context)
    last = min(last, length // 2) if last == LAST else last
    if not 1 <= last <= length // 2:
        raise DataError(f"last = {last} of a context of {length} tokens", f"at most {length // 2}")
    ids = torch.tensor([_context_ids(tokenizer, plain, length)], device=input_device(model))
    values = record(model, ids, torch.ones_like(ids), [steering.hookpoint])[steering.hookpoint].float()
    norms, end = values[0].norm(dim=-1), values[:, -last:]
    mean = float(norms[-last:].mean())
    update = steering.update().prepare(end.device, end.dtype)
    change = float((apply(end, update) - end).norm(dim=-1).mean())
    return Dose(change / mean, mean, float(norms[:last].mean()), length, last)


def _context_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> list[int]:
    """The ids of texts one after the other, of so many tokens."""
    order, shuffle = list(texts), random.Random(0).shuffle
    parts: list[str] = []
    ids: list[int] = []
    while len(ids) < length:
        parts += order
        ids = prompt_ids(tokenizer, [" ".join(parts)])[0]
        shuffle(order)
    return ids[:length]
