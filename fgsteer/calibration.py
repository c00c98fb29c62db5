"""Strength made comparable: the coefficient that costs neutral text a given number of nats.

c = calibrate(model, tokenizer, vec.add, texts, target_ce_rise=0.5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fgsteer.activations import Batch, text_batches
from fgsteer.errors import DataError, SteeringError
from fgsteer.interventions import Intervention
from fgsteer.steering import Steering, steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOGIT_ELEMENTS = 1 << 26  # logits held at once when many rows are scored: bounds memory, not results
DOUBLINGS = 40


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log-likelihood (batch, tokens − 1) of each token after the first, in nats."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), ids[:, 1:].to(logits.device), reduction="none"
    )


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
    total, count = 0.0, 0
    with steer(model, steering):
        for batch in _batches(model, tokenizer, texts, batch_tokens):
            logits = model(input_ids=batch.ids, attention_mask=batch.attention, use_cache=False).logits
            real = batch.selected[:, 1:].to(logits.device)
            total += float((_losses(logits, batch.ids) * real).sum())
            count += int(real.sum())
    return total / count


def _batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int
) -> Iterator[Batch]:
    if isinstance(texts, str) or not len(texts):
        raise DataError(f"texts {texts!r:.40}", "a list of at least one text")
    triples = (("", text, True) for text in texts)
    return text_batches(model, tokenizer, triples, rule="all", batch_tokens=tokens)


@torch.no_grad()
def cross_entropies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    steering: Sequence[Intervention | None],
    *,
    batch_tokens: int = 16384,
) -> list[float]:
    """``cross_entropy`` of the same texts under each intervention (None: unsteered), many to a forward pass.

    Raises DataError as ``cross_entropy`` does.
    """
    totals = torch.zeros(len(steering), dtype=torch.float64)
    count = 0
    fits = max(1, min(batch_tokens, LOGIT_ELEMENTS // model.config.get_text_config().vocab_size))
    for batch in _batches(model, tokenizer, texts, fits):
        rows, length = batch.ids.shape
        at_once = max(1, fits // (rows * length))
        real = batch.selected[:, 1:]
        count += int(real.sum())
        for start in range(0, len(steering), at_once):
            part = steering[start : start + at_once]
            ids, attention = batch.ids.repeat(len(part), 1), batch.attention.repeat(len(part), 1)
            with steer(model, [item for item in part for _ in range(rows)], per_row=True):
                logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
            losses = _losses(logits, ids) * real.repeat(len(part), 1).to(logits.device)
            totals[start : start + at_once] += losses.view(len(part), -1).double().sum(1).cpu()
    return (totals / count).tolist()


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
    at_zero = cross_entropy(model, tokenizer, texts, steering=make(0.0)) - cross_entropy(model, tokenizer, texts)
    if at_zero >= target_ce_rise:
        raise SteeringError(f"a rise of {at_zero:.3f} nats at coefficient 0", f"less than the target {target_ce_rise}")
    found = calibrate_many(
        model, tokenizer, [make], texts, target_ce_rise=target_ce_rise, start=start, tolerance=tolerance
    )[0]
    if math.isnan(found):
        raise SteeringError(
            f"a rise below {target_ce_rise} nats at every coefficient tried", "a vector that moves the model"
        )
    return found


def calibrate_many(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    makes: Sequence[Callable[[float], Intervention]],
    texts: Sequence[str],
    *,
    target_ce_rise: float = 0.5,
    start: float = 1.0,
    tolerance: float = 0.02,
    batch_tokens: int = 16384,
) -> list[float]:
    """The coefficient of ``calibrate`` for each of many interventions, many to a forward pass.

    Each is doubled from ``start`` until the rise reaches the target, then the bracket is narrowed; nan where
    the target is not reached after forty doublings. Raises SteeringError for ``start`` ≤ 0 or a
    target that is no finite number > 0.
    """
    if not 0 < target_ce_rise < math.inf:
        raise SteeringError(f"target_ce_rise = {target_ce_rise}", "nats a token, finite and > 0")
    if not start > 0:
        raise SteeringError(f"start = {start}", "a coefficient > 0 to double from")
    base = cross_entropies(model, tokenizer, texts, [None])[0]
    searches = [_Search(target_ce_rise, float(start)) for _ in makes]
    for turn in range(2 * DOUBLINGS):
        running = [i for i, search in enumerate(searches) if search.found is None]
        if not running:
            break
        given = [makes[i](searches[i].guess) for i in running]
        values = cross_entropies(model, tokenizer, texts, given, batch_tokens=batch_tokens)
        for i, value in zip(running, values, strict=True):
            searches[i].tell(value - base, tolerance, turn)
    return [search.guess if search.found is None else search.found for search in searches]


class _Search:
    """Bracketing and bisection for one coefficient; between bisections it follows a power law through the bracket."""

    def __init__(self, target: float, start: float) -> None:
        self.target, self.guess = target, start
        self.low, self.high = (0.0, 0.0), (math.inf, math.inf)  # (coefficient, rise)
        self.found: float | None = None

    def tell(self, rise: float, tolerance: float, turn: int) -> None:
        """Take the rise at ``guess``; settle, or set the next guess."""
        if abs(rise - self.target) <= tolerance * self.target:
            self.found = self.guess
        elif rise < self.target:
            self.low = (self.guess, rise)
        else:  # nan and inf too: far past the target
            self.high = (self.guess, rise)
        (a, rise_a), (b, rise_b) = self.low, self.high
        if self.found is None and b == math.inf:
            self.found = math.nan if turn + 1 >= DOUBLINGS else None
            self.guess = 2 * a
        elif self.found is None:
            self.guess = (a + b) / 2
            if turn % 3 and rise_a > 0 and math.isfinite(rise_b):
                power = math.log(self.target / rise_a) / math.log(rise_b / rise_a)
                self.guess = min(max(a * (b / a) ** power, a + 0.05 * (b - a)), b - 0.05 * (b - a))
            if (b - a) <= 1e-9 * b:  # the rise jumps over the target
                self.found = self.guess
