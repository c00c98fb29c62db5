"""Conditional activation steering (CAST): one gate on the prompt decides whether later blocks are steered.

guard = cast(model, tokenizer, harmful, harmless, refusal, coefficient=1.5)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.conditional.prompts import mean_states
from fgsteer.conditional.recipe import Conditional
from fgsteer.data.chat import Text
from fgsteer.directions.prompts import as_requests
from fgsteer.directions.shift import last_states
from fgsteer.errors import PairingError, SelectionError, SteeringError
from fgsteer.errors.checks import checked
from fgsteer.evaluation.metrics.gate_fit import check_sides, fit_gate
from fgsteer.interventions.readings import Cosine, TanhCosine
from fgsteer.interventions.scopes import Scope
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.vector import SteeringVector

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@checked
@torch.no_grad()
def cast(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    act_on: Sequence[Text],
    leave: Sequence[Text],
    behavior: SteeringVector | Sequence[SteeringVector],
    *,
    coefficient: float = 1.0,
    layers: Iterable[int] | None = None,
    pooling: Literal["mean", "last"] = "mean",
    similarity: Literal["cosine", "published"] = "cosine",
    scope: Scope = "all",
    bos: bool = False,
) -> Conditional:
    """Conditional activation steering: ``h' = h + 1[sim(h̄, c) beyond θ]·s·v`` (CAST, arXiv 2409.05907).

    ``h̄`` is the mean of the prompt's activations at the input of block ℓ, and the condition vector c there the first
    principal component of half the differences of the two kinds of prompts, paired in their order. Its mean is not
    taken out, as it is the signal, and c points to where it goes. ℓ, θ and the side are those of the best F1 on every
    other prompt of either kind, which alone made c; the rest report.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        act_on: Prompts on which the behavior is wanted: texts, which a chat model gets as a user's messages, or
            conversations. Eight or more of either kind leave four for each half.
        leave: Prompts that are to be left alone.
        behavior: The vector v, or several that are added each at its own hookpoint, such as ``caa`` at several layers.
        coefficient: The strength s.
        layers: Blocks at whose input the condition may be read; by default all up to the lowest that is steered.
        pooling: Whether ``h̄`` is the "mean" over the prompt's tokens, or the "last" one.
        similarity: "cosine" is cos(h̄, c) with its sign. "published" is that of the paper's code, cos(h̄, tanh(ĉ ĉᵀ h̄)),
            which is the same for h̄ and −h̄: on the wrong side of the stream its gate opens too.
        scope: The tokens that are steered, as in ``Intervention``.
        bos: Whether a start token is steered too, as the published code does.

    Returns:
        The additions with their gate, whose scores on both halves it holds.

    Raises:
        DataError: A kind has fewer than four prompts.
        PairingError: No layer that may be read comes before the lowest vector.
        SelectionError: Both kinds of prompts have the same activations.
    """
    vectors = [behavior] if isinstance(behavior, SteeringVector) else list(behavior)
    if not all(isinstance(vector, SteeringVector) for vector in vectors):
        raise SteeringError("a behavior that is no vector", "a SteeringVector, or several", "wrap a direction in one")
    if not vectors or pooling not in ("mean", "last") or similarity not in ("cosine", "published"):
        raise SteeringError(
            f"{len(vectors)} vectors, pooling={pooling!r:.20} and similarity={similarity!r:.20}",
            "at least one vector, pooling 'mean' or 'last', similarity 'cosine' or 'published'",
        )
    check_sides(act_on, leave)
    chosen = range(len(blocks_of(model))) if layers is None else layers
    candidates = [Hookpoint(layer, "resid_pre") for layer in chosen]
    places = [at for at in candidates if all(at == v.hookpoint or at.precedes(v.hookpoint) for v in vectors)]
    if not places or (layers is not None and len(places) < len(candidates)):
        raise PairingError(
            f"a condition at one of {', '.join(map(str, candidates))}",
            f"one before every vector, the lowest of which is at {min(v.hookpoint for v in vectors)}",
            "read at lower layers=, or steer at higher ones",
        )
    states = [
        mean_states(model, tokenizer, side[::2], places)
        if pooling == "mean"
        else last_states(model, tokenizer, side[::2], places, None)
        for side in (act_on, leave)
    ]
    kind = Cosine if similarity == "cosine" else TanhCosine
    readings = []
    for place in places:
        condition = condition_vector(states[0][place], states[1][place])
        if condition is not None:  # below all blocks, prompts that end alike have equal last tokens
            reading = kind(condition.float(), place)
            readings.append(reading.of_mean() if pooling == "mean" else reading.last())
    if not readings:
        raise SelectionError("equal activations of both kinds of prompts", "prompts of two kinds that differ")
    asked = [as_requests(model, tokenizer, side) for side in (act_on, leave)]
    fit = fit_gate(model, tokenizer, readings, *asked)
    added = [v.add(coefficient, scope=scope, bos=bos, when=fit.gate) for v in vectors]
    return Conditional(added, gate=fit.gate, fitted=fit.fitted, held_out=fit.held_out)


def condition_vector(
    act_on: Float[Tensor, "n d_model"], leave: Float[Tensor, "m d_model"]
) -> Float[Tensor, " d_model"] | None:
    """The first right singular vector of ``(aᵢ − bᵢ)/2``, pointing along their mean; None where all are 0."""
    pairs = min(len(act_on), len(leave))
    halves = (act_on[:pairs] - leave[:pairs]) / 2
    if not float(halves.norm()) > 0:
        return None
    first: Tensor = torch.linalg.svd(halves, full_matrices=False).Vh[0]
    return -first if float(first @ halves.mean(0)) < 0 else first
