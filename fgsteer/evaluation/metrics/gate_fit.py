"""Gates fitted to prompts: on which reading and threshold an intervention should act, and how well that holds.

fitted = fit_gate(model, tokenizer, [fg.Cosine(vec, layer).mean() for layer in (8, 12)], act_on, leave)
fg.generate(model, tokenizer, prompt, steering=vec.add(8.0, when=fitted.gate))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fgsteer.activations.recording import record
from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.chat import Text
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.judges.learning import auc
from fgsteer.interventions.gates import Condition, Reading
from fgsteer.models.properties import input_device, start_token_finder
from fgsteer.steering.gating import pool

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROWS = 16  # of a forward pass
LEAST = 4  # prompts of each kind: two of them for each half


@dataclass(frozen=True, repr=False)
class GateScores(OneLineRepr):
    """How well a gate tells prompts apart, on one half of them.

    Args:
        precision: The share of the prompts on which it opens that it should open on; nan where it opens on none.
        recall: The share of the prompts that it should open on on which it does.
        f1: Their harmonic mean, 0 where it opens rightly on none.
        auroc: The probability that a prompt to act on reads higher than one to leave, ties counting half; of a gate
            that opens below its threshold, lower.
        prompts: The numbers of prompts to act on and to leave.
    """

    precision: float
    recall: float
    f1: float
    auroc: float
    prompts: tuple[int, int]


@dataclass(frozen=True, repr=False)
class GateFit(OneLineRepr):
    """A gate that was fitted on one half of the prompts, and its scores.

    Args:
        gate: The condition, for ``when=``.
        fitted: Its scores on the half that chose reading, threshold and side, which flatter it.
        held_out: Its scores on the other half.
    """

    gate: Condition
    fitted: GateScores
    held_out: GateScores


@checked
@torch.no_grad()
def fit_gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    readings: Reading | Sequence[Reading],
    act_on: Sequence[Text],
    leave: Sequence[Text],
) -> GateFit:
    """Find the reading, threshold and side that tell prompts to act on from prompts to leave alone, by the best F1.

    Every other prompt of both kinds chooses (in arXiv 2409.05907 all of them), the others report. A reading of tokens
    counts as its maximum over a prompt where it opens above the threshold, as its minimum where it opens below. The
    threshold is halfway between two values. Readings that tell nothing apart give a gate that is always open, whose
    AUROC is about one half.

    Args:
        model: The model, unsteered.
        tokenizer: Its tokenizer.
        readings: The readings to choose from, such as one for each of several layers.
        act_on: Prompts on which the gate should open, texts or chat messages.
        leave: Prompts on which it should stay shut.

    Returns:
        The gate, and its scores on both halves.

    Raises:
        DataError: There is no reading, or a kind has fewer than four prompts.
        HookpointError: The model lacks a hookpoint.
    """
    choices = [readings] if isinstance(readings, Reading) else list(readings)
    if not choices or min(len(act_on), len(leave)) < LEAST:
        raise DataError(
            f"{len(choices)} readings, {len(act_on)} prompts to act on and {len(leave)} to leave",
            f"at least one reading and {LEAST} prompts of each kind",
            "pass more prompts: one half chooses the gate, the other one reports it",
        )
    found = [_values(model, tokenizer, choices, prompts) for prompts in (act_on, leave)]
    best: tuple[float, float, Condition, Tensor, Tensor] | None = None
    for number, reading in enumerate(choices):
        for above in (True, False):
            positive, negative = (values[number, int(above)] for values in found)
            threshold, f1 = _best_threshold(positive[::2], negative[::2], above)
            area = _auroc(positive[::2], negative[::2], above)
            if best is None or (f1, area) > best[:2]:
                best = f1, area, Condition(reading, threshold, above), positive, negative
    assert best is not None
    *_, gate, positive, negative = best
    halves = [_scores(gate, positive[start::2], negative[start::2]) for start in (0, 1)]
    return GateFit(gate, *halves)


def _values(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, readings: Sequence[Reading], prompts: Sequence[Text]
) -> Tensor:
    """What each reading is of each prompt: its lowest and highest, (readings, 2, prompts); equal where it is pooled."""
    is_start, columns = start_token_finder(model), []
    for start in range(0, len(prompts), ROWS):
        ids, attention = encode_prompts(tokenizer, list(prompts[start : start + ROWS]))
        ids, attention = ids.to(input_device(model)), attention.to(input_device(model))
        states = record(model, ids, attention, [reading.hookpoint for reading in readings])
        first = attention.bool() & (attention.cumsum(1) == 1)
        of_prompt = attention.bool() & ~(first & is_start(ids))
        rows = []
        for reading in readings:
            values = reading.values(states[reading.hookpoint])
            mask = of_prompt.to(values.device)
            if reading.pooling:
                ends = [pool(values, mask, reading.pooling)] * 2
            else:
                ends = [-pool(-values, mask, "max"), pool(values, mask, "max")]
            rows.append(torch.cat(ends, 1).T)
        columns.append(torch.stack(rows).double().cpu())
    return torch.cat(columns, 2)


def _best_threshold(positive: Tensor, negative: Tensor, above: bool) -> tuple[float, float]:
    """The threshold of the best F1, and that F1."""
    values = sorted({value for value in torch.cat([positive, negative]).tolist() if not math.isnan(value)})
    if not values:
        return 0.0, 0.0
    thresholds = [values[0] - 1, *((low + high) / 2 for low, high in pairwise(values)), values[-1] + 1]
    scored = [(_f1(positive, negative, threshold, above), threshold) for threshold in thresholds]
    f1, threshold = max(scored, key=lambda entry: entry[0])
    return threshold, f1


def _opened(values: Tensor, threshold: float, above: bool) -> int:
    return int(((values > threshold) if above else (values < threshold)).sum())


def _f1(positive: Tensor, negative: Tensor, threshold: float, above: bool) -> float:
    rightly, wrongly = _opened(positive, threshold, above), _opened(negative, threshold, above)
    return 2 * rightly / (rightly + wrongly + len(positive))


def _auroc(positive: Tensor, negative: Tensor, above: bool) -> float:
    area = float(auc(positive, negative))
    return area if above else 1 - area


def _scores(gate: Condition, positive: Tensor, negative: Tensor) -> GateScores:
    threshold, above = gate.threshold, gate.fires_above
    rightly, wrongly = _opened(positive, threshold, above), _opened(negative, threshold, above)
    return GateScores(
        precision=rightly / (rightly + wrongly) if rightly + wrongly else float("nan"),
        recall=rightly / len(positive),
        f1=_f1(positive, negative, threshold, above),
        auroc=_auroc(positive, negative, above),
        prompts=(len(positive), len(negative)),
    )
