"""Strength made comparable: the coefficient that costs neutral text a given number of nats.

c = calibrate(model, tokenizer, vec.add, texts, target_ce_rise=0.5)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from fgsteer.activations import text_batches
from fgsteer.errors import DataError, SteeringError
from fgsteer.interventions import Intervention
from fgsteer.steering import Steering, steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def cross_entropy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    steering: Steering = None,
    batch_tokens: int = 4096,
) -> float:
    """Mean negative log-likelihood of the texts, in nats per predicted token, under steering if given.

    Raises DataError for no text, or a text of one token.
    """
    if isinstance(texts, str) or not len(texts):
        raise DataError(f"texts {texts!r:.40}", "a list of at least one text")
    total, count = 0.0, 0
    with steer(model, steering):
        for batch in text_batches(
            model, tokenizer, (("", text, True) for text in texts), rule="all", batch_tokens=batch_tokens
        ):
            logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
            real = batch.selected[:, 1:].to(logits.device)
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1].float().transpose(1, 2), batch.ids[:, 1:].to(logits.device), reduction="none"
            )
            total += float((losses * real).sum())
            count += int(real.sum())
    return total / count


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    make: Callable[[float], Intervention],
    texts: Sequence[str],
    *,
    target_ce_rise: float = 0.5,
    start: float = 1.0,
    tolerance: float = 0.02,
) -> float:
    """The coefficient c ≥ 0 at which ``make(c)`` raises the cross-entropy of the texts by the target.

    ``CE(steered by make(c)) − CE(unsteered) = target_ce_rise`` nats per token, found by doubling
    from ``start`` and bisection, within ``tolerance`` of the target (relative). The strength
    rule of SAE-TS (arXiv 2411.02193). Raises SteeringError when the rise at c = 0 is above
    the target already, or no coefficient reaches it.
    """
    if not start > 0:
        raise SteeringError(f"start = {start}", "a coefficient > 0 to double from")
    base = cross_entropy(model, tokenizer, texts)

    def rise(coefficient: float) -> float:
        return cross_entropy(model, tokenizer, texts, steering=make(coefficient)) - base

    at_zero = rise(0.0)
    if at_zero >= target_ce_rise:
        raise SteeringError(f"a rise of {at_zero:.3f} nats at coefficient 0", f"less than the target {target_ce_rise}")
    low, high = 0.0, start
    for _ in range(40):
        if rise(high) >= target_ce_rise:
            break
        low, high = high, 2 * high
    else:
        raise SteeringError(
            f"a rise below {target_ce_rise} nats up to coefficient {high:.3g}", "a vector that moves the model"
        )
    for _ in range(40):
        middle = (low + high) / 2
        got = rise(middle)
        if abs(got - target_ce_rise) <= tolerance * target_ce_rise:
            return middle
        low, high = (middle, high) if got < target_ce_rise else (low, middle)
    return (low + high) / 2
