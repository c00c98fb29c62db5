"""Gates on prompts: where one opens, how rightly, and what steering does there and elsewhere.

score_gate(model, tokenizer, (a > 0.1) & ~(b > 2.0), act_on, leave)          precision, recall, F1, AUROC
gate_effect(model, tokenizer, vec.add(8.0, when=gate), act_on, leave)        KL, and the share that keeps every bit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from fgsteer.data.chat import Text
from fgsteer.errors import DataError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.evaluation.metrics.gate_fit import (
    ROWS,
    GateScores,
    auroc,
    read_prompts,
    right_padded,
    scores_of,
    values_by_token,
)
from fgsteer.interventions.gates import Both, Condition, Either, Gate, Not
from fgsteer.steering.entries import Entry
from fgsteer.steering.hooks import steer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
@torch.no_grad()
def gate_decisions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gate: Gate, prompts: Sequence[Text]
) -> Bool[Tensor, " prompts"]:
    """On which prompts a gate opens, for the unsteered model: at any of a prompt's tokens, where tokens decide.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        gate: The gate, of any conditions.
        prompts: Texts or conversations, as ``generate`` reads them.

    Returns:
        Whether it opens, for each prompt.

    Raises:
        DataError: There is no prompt.
        SteeringError: The gate is one of your own.
    """
    readings = list({id(c.reading): c.reading for c in gate.conditions}.values())
    opened = []
    for values, of_prompt in values_by_token(model, tokenizer, readings, prompts):
        found = {id(reading): value for reading, value in zip(readings, values, strict=True)}
        opened.append((_open(gate, found, of_prompt.shape) & of_prompt).any(1))
    if not opened:
        raise DataError("no prompts", "at least one prompt")
    return torch.cat(opened)


def _open(gate: Gate, values: Mapping[int, Tensor], shape: torch.Size, negated: bool = False) -> Tensor:
    """The tokens at which a gate, or its opposite, is open, given what each reading is."""
    if isinstance(gate, Condition):
        return gate.compare(values[id(gate.reading)], negated).expand(shape)
    if isinstance(gate, Not):
        return _open(gate.gate, values, shape, not negated)
    assert isinstance(gate, Both | Either)
    first, second = _open(gate.first, values, shape, negated), _open(gate.second, values, shape, negated)
    return first & second if isinstance(gate, Both) != negated else first | second


@checked
@torch.no_grad()
def score_gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    gate: Gate,
    act_on: Sequence[Text],
    leave: Sequence[Text],
) -> GateScores:
    """How well a gate tells prompts to act on from prompts to leave alone.

    The AUROC of one condition is that of what it reads. Of conditions that are combined, it is that of the decisions
    alone, ``(recall + specificity) / 2``. A gate that was fitted to these prompts is flattered by them.

    Args:
        model: The model, unsteered.
        tokenizer: Its tokenizer.
        gate: The gate.
        act_on: Prompts on which it should open.
        leave: Prompts on which it should stay shut.

    Returns:
        Precision, recall, F1 and AUROC.

    Raises:
        DataError: A kind has no prompt.
    """
    opened = tuple(gate_decisions(model, tokenizer, gate, prompts) for prompts in (act_on, leave))
    above = True
    while isinstance(gate, Not):
        gate, above = gate.gate, not above
    if isinstance(gate, Condition):
        above = gate.fires_above == above
        reads = [read_prompts(model, tokenizer, [gate.reading], prompts)[0, int(above)] for prompts in (act_on, leave)]
    else:
        reads, above = [side.double() for side in opened], True
    return scores_of((opened[0], opened[1]), auroc(reads[0], reads[1], above))


@dataclass(frozen=True, repr=False)
class GateEffect(OneLineRepr):
    """What conditional steering does at the first token of a reply, to prompts that it is for and to others.

    Args:
        kl_act_on: The mean ``KL(unsteered‖steered)`` of prompts to act on, in nats.
        kl_leave: That of prompts to leave alone.
        unchanged_act_on: The share of prompts to act on all of whose logits keep every bit.
        unchanged_leave: That of prompts to leave alone, 1 where no gate opens wrongly.
    """

    kl_act_on: float
    kl_leave: float
    unchanged_act_on: float
    unchanged_leave: float


@checked
@torch.no_grad()
def gate_effect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    steering: Entry,
    act_on: Sequence[Text],
    leave: Sequence[Text],
) -> GateEffect:
    """What steering does where it should act, and that it does nothing elsewhere: KL, and prompts that keep every bit.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        steering: An intervention with a gate or with a strength that prompts decide, or a list of them that compose.
        act_on: Prompts on which it should act, texts or conversations, as ``generate`` reads them.
        leave: Prompts on which it should not.

    Returns:
        The mean divergence and the share of unchanged prompts, of either kind.

    Raises:
        DataError: A kind has no prompt.
    """
    (kl_act_on, same_act_on), (kl_leave, same_leave) = (
        _effect(model, tokenizer, steering, prompts) for prompts in (act_on, leave)
    )
    return GateEffect(kl_act_on, kl_leave, same_act_on, same_leave)


def _effect(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, steering: Entry, prompts: Sequence[Text]
) -> tuple[float, float]:
    """The mean KL of the next token, and the share of prompts that keep every bit."""
    if not len(prompts):
        raise DataError("no prompts", "at least one prompt of each kind")
    divergence, unchanged = 0.0, 0
    for start in range(0, len(prompts), ROWS):
        ids, attention = right_padded(model, tokenizer, prompts[start : start + ROWS])
        plain = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        with steer(model, steering, per_row=False):
            steered = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        real = attention.bool()[..., None].to(plain.device)
        rows, ends = torch.arange(len(ids), device=plain.device), attention.sum(1).to(plain.device) - 1
        first, second = (logits[rows, ends].float().log_softmax(-1) for logits in (plain, steered))
        divergence += float((first.exp() * (first - second)).sum())
        unchanged += int(((plain == steered) | ~real).flatten(1).all(1).sum())
    return divergence / len(prompts), unchanged / len(prompts)
