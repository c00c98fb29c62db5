"""The unsteered and the steered pass over one text, and what is read of both, token by token.

before, after = (run_text(model, row, entry, sae.input_hookpoint) for entry in (None, vec.add(8.0)))
compare_next_tokens(before.logits, after.logits, row.ids, top=5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.prompt_ends import note_prompt_ends
from fgsteer.activations.recording import record
from fgsteer.interventions.base import Intervention
from fgsteer.models.hookpoints import Hookpoint, uncompiled
from fgsteer.models.properties import input_device
from fgsteer.steering.hooks import steer
from fgsteer.steering.watching import Step, watch
from fgsteer.traces.parts import TokenAction
from fgsteer.traces.tokens import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_LOGITS = 1 << 22  # turned to float64 at once: this bounds memory, and changes no result


@dataclass(frozen=True, eq=False)
class TextPass:
    """What one pass over a text gave.

    Args:
        logits: The logits at each token, in the model's dtype.
        states: The activations at the hookpoint that was asked for, after what acts there; None without one.
        steps: What the interventions did, in the order of application.
    """

    logits: Float[Tensor, "tokens vocabulary"]
    states: Float[Tensor, "tokens d_model"] | None
    steps: list[Step]


@torch.no_grad()
def run_text(model: PreTrainedModel, row: Row, items: Sequence[Intervention], hookpoint: Hookpoint | None) -> TextPass:
    """One pass over prompt and completion at once, steered as if the prompt were read and the completion written."""
    ids = torch.tensor([row.ids], device=input_device(model))
    mask = torch.ones_like(ids)
    with (
        torch.compiler.set_stance("force_eager"),  # a compiled graph lists no steps
        note_prompt_ends(model, [row.prompt_tokens]),
        watch(model) as steps,
        steer(model, list(items), per_row=False),
    ):
        states = None if hookpoint is None else record(model, ids, mask, [hookpoint])[hookpoint][0]
        steps.clear()  # those of the pass that recorded
        logits = uncompiled(model)(input_ids=ids, attention_mask=mask, use_cache=False).logits[0, -len(row.ids) :]
        return TextPass(logits, states, list(steps))


@dataclass(frozen=True, eq=False)
class NextTokens:
    """The distributions of one token's place, of both models: one of each text's tokens but the first."""

    before: float
    after: float
    kl_steered_unsteered: float
    kl_unsteered_steered: float
    top_before: list[tuple[int, float]]
    top_after: list[tuple[int, float]]


@torch.no_grad()
def compare_next_tokens(
    before: Float[Tensor, "tokens vocabulary"], after: Float[Tensor, "tokens vocabulary"], ids: Sequence[int], top: int
) -> list[NextTokens]:
    """What both models expected in the place of each token but the first, in float64."""
    places: list[NextTokens] = []
    at_once = max(1, MOST_LOGITS // before.shape[-1])
    for start in range(0, len(ids) - 1, at_once):
        end = min(start + at_once, len(ids) - 1)
        targets = torch.tensor(ids[start + 1 : end + 1], device=before.device)[:, None]
        log_p, log_q = (logits[start:end].to(before.device).double().log_softmax(-1) for logits in (after, before))
        columns: list[list[Any]] = [
            *(values.gather(1, targets)[:, 0].tolist() for values in (log_q, log_p)),
            *(divergence(*pair).tolist() for pair in ((log_p, log_q), (log_q, log_p))),
            *(_likeliest(values, top) for values in (log_q, log_p)),
        ]
        places += [NextTokens(*values) for values in zip(*columns, strict=True)]
    return places


def divergence(log_p: Float[Tensor, "n vocabulary"], log_q: Float[Tensor, "n vocabulary"]) -> Float[Tensor, " n"]:
    """``KL(p‖q) = Σ_v p(v) (log p(v) − log q(v))`` of each row, where 0 log 0 is 0; rounding leaves none below 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1).clamp(min=0.0)


def _likeliest(log_probabilities: Float[Tensor, "n vocabulary"], top: int) -> list[list[tuple[int, float]]]:
    values, ids = log_probabilities.topk(min(top, log_probabilities.shape[-1]), dim=-1)
    return [list(zip(*pair, strict=True)) for pair in zip(ids.tolist(), values.tolist(), strict=True)]


@torch.no_grad()
def token_actions(
    steps: Sequence[Step], order: Sequence[int], tokens: int
) -> tuple[list[tuple[TokenAction, ...]], list[float]]:
    """What each intervention did at each token, and how far all of them moved the activation there.

    Args:
        steps: The steps of a pass over one text.
        order: The number of each update's intervention among those that steer.
        tokens: How many tokens the text has.
    """
    idle = TokenAction(False, None, 0.0, 0.0)
    table: list[list[TokenAction]] = [[idle] * len(order) for _ in range(tokens)]
    for step in steps:
        numbers = step.strengths()[0, -tokens:].double()
        strengths = (numbers[:, 0] if numbers.shape[1] == 1 else numbers.norm(dim=-1)).tolist()
        acts = [True] * tokens if step.where is None else step.where[0, -tokens:].tolist()
        gates = [None] * tokens if step.gate is None else step.gate[0, -tokens:].tolist()
        doses = _doses(step.before, step.after, tokens)
        for place, values in enumerate(zip(acts, gates, strengths, doses, strict=True)):
            table[place][order[step.number]] = TokenAction(*values)
    joint = torch.zeros(tokens, dtype=torch.float64)
    for hookpoint in {step.hookpoint for step in steps}:
        here = [step for step in steps if step.hookpoint == hookpoint]
        joint = torch.maximum(joint, torch.tensor(_doses(here[0].before, here[-1].after, tokens), dtype=torch.float64))
    return [tuple(row) for row in table], joint.tolist()


def _doses(before: Tensor, after: Tensor, tokens: int) -> list[float]:
    """``‖after − before‖/‖before‖`` of each token; 0 where nothing moved."""
    old, new = (part[0, -tokens:].double() for part in (before, after))
    moved, norm = (new - old).norm(dim=-1), old.norm(dim=-1)
    doses: list[float] = torch.where(moved > 0, moved / norm, 0.0).tolist()
    return doses
