"""Gates fitted to prompts: on which reading and threshold an intervention should act, and how well that holds.

fitted = fit_gate(model, tokenizer, [fg.Cosine(vec, layer).mean() for layer in (8, 12)], act_on, leave)
fg.generate(model, tokenizer, prompt, steering=vec.add(8.0, when=fitted.gate))
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fgsteer.activations.recording import record
from fgsteer.activations.tokens import pad, prompt_ids
from fgsteer.data.chat import Text
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.judges.learning import auc
from fgsteer.interventions.gates import Condition, Reading, pool
from fgsteer.interventions.readings import Preview
from fgsteer.models.properties import input_device, start_token_finder
from fgsteer.steering.previews import read_ahead

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
    if not choices:
        raise DataError("no readings", "at least one reading to choose from")
    check_sides(act_on, leave)
    found = [read_prompts(model, tokenizer, choices, prompts) for prompts in (act_on, leave)]
    best: tuple[float, float, Condition, Tensor, Tensor] | None = None
    for number, reading in enumerate(choices):
        for above in (True, False):
            positive, negative = (values[number, int(above)] for values in found)
            threshold, f1 = best_threshold(positive[::2], negative[::2], above)
            area = auroc(positive[::2], negative[::2], above)
            if best is None or (f1, area) > best[:2]:
                best = f1, area, Condition(reading, threshold, above), positive, negative
    assert best is not None
    *_, gate, positive, negative = best
    halves = [
        scores_of((gate.compare(a), gate.compare(b)), auroc(a, b, gate.fires_above))
        for a, b in ((positive[start::2], negative[start::2]) for start in (0, 1))
    ]
    return GateFit(gate, *halves)


def check_sides(act_on: Sequence[Text], leave: Sequence[Text]) -> None:
    """Raises DataError for too few prompts of a kind to choose a gate on one half and report it on the other."""
    if min(len(act_on), len(leave)) < LEAST:
        raise DataError(
            f"{len(act_on)} prompts to act on and {len(leave)} to leave",
            f"at least {LEAST} prompts of each kind",
            "pass more prompts: one half chooses the gate, the other one reports it",
        )


def read_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, readings: Sequence[Reading], prompts: Sequence[Text]
) -> Float[Tensor, "readings 2 prompts"]:
    """What each reading is of each prompt, its lowest and its highest, which are equal where it is pooled."""
    columns = []
    for values, of_prompt in values_by_token(model, tokenizer, readings, prompts):
        ends = [
            [value, value] if reading.pooling else [pool(sign * value, of_prompt, "max") * sign for sign in (-1, 1)]
            for reading, value in zip(readings, values, strict=True)
        ]
        columns.append(torch.stack([torch.cat(pair, 1).T for pair in ends]))
    return torch.cat(columns, 2)


def values_by_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, readings: Sequence[Reading], prompts: Sequence[Text]
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """What each reading is of each token (batch, tokens), or of the prompt (batch, 1), and which are the prompt's.

    Values are in float64 on the CPU, of one batch of prompts after the other.
    """
    is_start = start_token_finder(model)
    for start in range(0, len(prompts), ROWS):
        ids, attention = right_padded(model, tokenizer, prompts[start : start + ROWS])
        real = attention.bool()
        of_prompt = real & ~((attention.cumsum(1) == 1) & is_start(ids))
        previews = [reading for reading in readings if isinstance(reading, Preview)]
        ahead = dict(zip(map(id, previews), read_ahead(model, ids, real, previews), strict=True))
        places = [reading.hookpoint for reading in readings if not isinstance(reading, Preview)]
        states = record(model, ids, attention, places) if places else {}
        values = []
        for reading in readings:
            if isinstance(reading, Preview):
                values.append(ahead[id(reading)].double().cpu())
                continue
            h = states[reading.hookpoint]
            pooled = reading.of_prompt(h, of_prompt.to(h.device)) if reading.pooling else reading.values(h)
            values.append(pooled.double().cpu())
        yield values, of_prompt.cpu()


def right_padded(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]
) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
    """Ids and attention mask of prompts, padded on the right, where no position depends on padding."""
    rows = prompt_ids(tokenizer, prompts)
    ids, attention = (part.to(input_device(model)) for part in pad(rows, 0))
    return ids, attention


def best_threshold(positive: Tensor, negative: Tensor, above: bool) -> tuple[float, float]:
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


def auroc(positive: Tensor, negative: Tensor, above: bool) -> float:
    """The probability that a prompt to act on is further on the side of opening than one to leave; ties count half."""
    area = float(auc(positive, negative))
    return area if above else 1 - area


def scores_of(opened: tuple[Tensor, Tensor], area: float) -> GateScores:
    """The scores of decisions on prompts to act on and to leave, given the area under the ROC curve."""
    (rightly, wrongly), sizes = (int(side.sum()) for side in opened), (len(opened[0]), len(opened[1]))
    return GateScores(
        precision=rightly / (rightly + wrongly) if rightly + wrongly else float("nan"),
        recall=rightly / sizes[0],
        f1=2 * rightly / (rightly + wrongly + sizes[0]),
        auroc=area,
        prompts=sizes,
    )
