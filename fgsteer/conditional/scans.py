"""SCANS: steering whose sign is decided by where an appended word of consent moves the stream.

guard = scans(model, tokenizer, harmful, harmless, strength=3.5)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.activations.tokens import prompt_ids
from fgsteer.conditional.recipe import Conditional
from fgsteer.data.chat import Text
from fgsteer.directions.prompts import as_requests
from fgsteer.directions.shift import last_states
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import check_range, checked
from fgsteer.evaluation.metrics.gate_fit import auroc, best_threshold, check_sides, read_prompts, scores_of
from fgsteer.interventions.adding import Add
from fgsteer.interventions.readings import Cosine, Preview
from fgsteer.interventions.scopes import Scope
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.pairing import model_identity
from fgsteer.steering.previews import states_ahead

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIRST, _LAST = 10 / 32, 20 / 32  # of the depth: the published blocks 10 to 19 of 32
_BATCH = 16  # prompts


@checked
@torch.no_grad()
def scans(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    harmful: Sequence[Text],
    harmless: Sequence[Text],
    *,
    strength: float = 3.5,
    threshold: float | None = 0.75,
    neutral: float = 0.0,
    layers: Iterable[int] | None = None,
    read_layers: Iterable[int] | None = None,
    appended: str = "Sure",
    scope: Scope = "reply",
    bos: bool = False,
) -> Conditional:
    """Safety-conscious activation steering: ``h' = h + m·v`` if ``σ ≥ θ``, else ``h − m·v`` (SCANS, arXiv 2408.11491).

    At the output of each steered block v is the difference of the means of harmful and harmless prompts at their last
    token, at norm 1. The classifier reads the prompt and a word of consent after it: with ``u = h[last of the prompt] −
    h[last of the word]``, σ is the mean over blocks of cos(u, mean u of harmful prompts). It is read ahead of the
    steered pass, so that each prompt is read twice. Every other prompt makes v and the means; the rest report.

    In the published rule every prompt is steered, one way or the other. ``neutral`` leaves those alone that lie
    between: with it, ``−m·v`` is added where ``σ < θ − neutral`` alone.

    Args:
        model: A Hugging Face causal language model.
        tokenizer: Its tokenizer.
        harmful: Prompts to refuse: texts, which a chat model gets as a user's messages, or conversations.
        harmless: Prompts to answer.
        strength: The strength m, in units of the stream; 3.5 is that of Llama 2, 4 that of Vicuna.
        threshold: The threshold θ of σ. The paper's is .75 and tuned on test sets; None takes the best F1 on every
            other prompt.
        neutral: How far below θ steering against refusal begins.
        layers: Blocks at whose output v is added; by default from 10/32 to 20/32 of the depth, as published.
        read_layers: Blocks at whose output σ is read; by default from 10/32 of the depth on, as published.
        appended: The word that is appended to classify; the paper's is "Sure".
        scope: The tokens that are steered: "reply" is from the last token of the prompt on.
        bos: Whether a start token is steered too.

    Returns:
        Two additions a block, with one gate; σ ≥ θ is what its scores are of.

    Raises:
        DataError: A kind has fewer than four prompts, or the appended word has no token.
        SelectionError: Both kinds have the same mean at a block.
    """
    check_range("neutral", neutral, 0, 2)
    check_sides(harmful, harmless)
    depth = len(blocks_of(model))
    steered = [Hookpoint(n) for n in (range(round(_FIRST * depth), round(_LAST * depth)) if layers is None else layers)]
    read = [Hookpoint(n) for n in (range(round(_FIRST * depth), depth) if read_layers is None else read_layers)]
    ids = tokenizer(appended, add_special_tokens=False)["input_ids"]
    if not ids or not steered or not read:
        raise DataError(
            f"appended={appended!r:.40} of {len(ids)} tokens, {len(steered)} blocks to steer and {len(read)} to read",
            "a word of at least one token, and at least one block of either",
        )
    means = [last_states(model, tokenizer, side[::2], steered, None) for side in (harmful, harmless)]
    vectors = {at: _unit(means[0][at].mean(0) - means[1][at].mean(0), at) for at in steered}
    asked = [as_requests(model, tokenizer, side) for side in (harmful, harmless)]
    anchors = _mean_differences(model, prompt_ids(tokenizer, asked[0][::2]), read, ids)
    sigma = Preview([Cosine(anchors[at], at) for at in read], appended=ids)
    values = [read_prompts(model, tokenizer, [sigma], side)[0, 0] for side in asked]
    if threshold is None:
        threshold, _ = best_threshold(values[0][::2], values[1][::2], True)
    is_harmful, is_harmless = sigma > math.nextafter(threshold, -math.inf), sigma < threshold - neutral
    halves = [
        scores_of((a >= threshold, b >= threshold), auroc(a, b, True))
        for a, b in ((values[0][start::2], values[1][start::2]) for start in (0, 1))
    ]
    name = model_identity(model)["name"]
    added = [
        Add(
            direction=vectors[at],
            hookpoint=at,
            coefficient=sign * strength,
            scope=scope,
            bos=bos,
            when=gate,
            model_name=name,
            method="scans",
        )
        for at in steered
        for sign, gate in ((1, is_harmful), (-1, is_harmless))
    ]
    return Conditional(added, gate=is_harmful, fitted=halves[0], held_out=halves[1])


def _unit(difference: Float[Tensor, " d_model"], at: Hookpoint) -> Float[Tensor, " d_model"]:
    """A difference of means at norm 1. Raises SelectionError for none."""
    if not float(difference.norm()) > 0:
        raise SelectionError(f"equal means of both kinds at {at}", "prompts of two kinds that differ")
    unit: Tensor = difference / difference.norm()
    return unit.float()


def _mean_differences(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], places: Sequence[Hookpoint], appended: Sequence[int]
) -> dict[Hookpoint, Float[Tensor, " d_model"]]:
    """The mean over prompts of ``u = h[last of the prompt] − h[last appended]`` at each place."""
    batches = [
        states_ahead(model, prompts[start : start + _BATCH], places, appended)
        for start in range(0, len(prompts), _BATCH)
    ]
    return {at: torch.cat([batch[at] for batch in batches]).double().mean(0).float() for at in places}
