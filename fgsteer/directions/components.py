"""Components of a shift, read and acted on: tokens and features that each resembles, and interventions by component.

print(describe_components(model, tokenizer, shift, sae=sae))
fg.generate(model, tokenizer, prompts, steering=component_interventions(model, shift, [0]))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.nn.functional import normalize

from fgsteer.directions.shift import ResidualShift
from fgsteer.display.tables import Cell, Share, Table
from fgsteer.errors import DataError, PairingError
from fgsteer.errors.checks import check_range, checked
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.adding import Add
from fgsteer.interventions.base import Intervention
from fgsteer.interventions.projecting import SubtractProjection
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.models.unembedding import residual_direction, top_tokens
from fgsteer.saes.sae import SAE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, repr=False)
class ComponentRow(OneLineRepr):
    """What a component of a shift resembles.

    Args:
        component: Its number, 0 the dominant one.
        share: The share of the squared shift that it holds.
        raised: The tokens that it raises most, read through the final norm and the head.
        lowered: The tokens that it lowers most.
        features: The SAE features whose decoder rows have the largest absolute cosine with it, and that cosine.
        labels: What these features are said to mean.
    """

    component: int
    share: float
    raised: tuple[str, ...]
    lowered: tuple[str, ...]
    features: tuple[tuple[int, float], ...] = ()
    labels: tuple[str, ...] = ()

    def cells(self) -> dict[str, Cell]:
        """The row of a table."""
        named = zip(self.features, self.labels, strict=True)
        return {
            "component": self.component,
            "share": Share(self.share),
            "raises": " ".join(self.raised),
            "lowers": " ".join(self.lowered),
            "features": "; ".join(f"{feature} ({cosine:+.2f}) {label}".strip() for (feature, cosine), label in named),
        }


@checked
@torch.no_grad()
def describe_components(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    shift: ResidualShift,
    *,
    sae: SAE | None = None,
    components: int = 8,
    tokens: int = 6,
    features: int = 3,
) -> Table[ComponentRow]:
    """Read components of a shift through the logit lens and through the features of an SAE.

    Args:
        model: A Hugging Face causal language model, the base or the tuned one.
        tokenizer: Its tokenizer.
        shift: The components.
        sae: An SAE at the shift's hookpoint, or None for the tokens alone.
        components: How many components are read, from the dominant one on.
        tokens: The number of tokens raised and lowered.
        features: The number of features.

    Returns:
        A row for each component.

    Raises:
        PairingError: The SAE is at another hookpoint or of another width.
        HookpointError: What is written at the hookpoint does not act linearly on the residual stream.
        DataError: A number is out of its range.
    """
    for name, value in (("components", components), ("tokens", tokens), ("features", features)):
        check_range(name, value, 1, MAX_COUNT, whole=True)
    rows = shift.components[:components].float()
    written = residual_direction(model, shift.hookpoint, rows)
    raised, lowered = (top_tokens(model, tokenizer, sign * written, tokens) for sign in (1.0, -1.0))
    nearest: list[tuple[tuple[int, float], ...]] = [()] * len(rows)
    labels: dict[int, str] = {}
    if sae is not None:
        _check_place(shift, sae)
        cosines = rows @ normalize(sae.W_dec.float().cpu(), dim=1).T
        order = cosines.abs().topk(min(features, sae.d_sae), dim=1).indices
        nearest = [tuple((int(j), float(row[j])) for j in own) for row, own in zip(cosines, order, strict=True)]
        labels = dict(sae.labels)
    return Table(
        ComponentRow(
            number,
            float(shift.shares[number]),
            raised[number],
            lowered[number],
            nearest[number],
            tuple(labels.get(feature, "") for feature, _ in nearest[number]),
        )
        for number in range(len(rows))
    )


def _check_place(shift: ResidualShift, sae: SAE) -> None:
    """Raises PairingError for an SAE that does not write where the shift was read."""
    if (sae.hookpoint, sae.d_model) != (shift.hookpoint, shift.components.shape[1]):
        raise PairingError(
            f"an SAE at {sae.hookpoint} of width {sae.d_model}",
            f"one at {shift.hookpoint} of width {shift.components.shape[1]}, where the shift was read",
            f'pass hookpoints=["{sae.hookpoint}"] to residual_shift, or another SAE',
        )


@checked
def component_interventions(
    model: nn.Module,
    shift: ResidualShift,
    components: Sequence[int] = (0,),
    *,
    strength: float = 1.0,
    limit: float | None = None,
    kind: Literal["projection", "constant"] = "projection",
    layers: Sequence[int] | None = None,
) -> list[Intervention]:
    """Interventions on components of a shift at the output of every block, at the last token of each pass.

    ``h' = h − α·clip(v·h, −c, c)·v`` for kind "projection", and ``h' = h − α·v`` for "constant" (arXiv 2502.09674).
    Components are orthogonal, so that several act as if together. As in the paper's code they act at all blocks,
    although they were read after one: ``layers=[shift.hookpoint.layer]`` keeps them there.

    Args:
        model: The model that is steered.
        shift: The components v, of norm 1.
        components: Their numbers, 0 the dominant one.
        strength: The strength α; 1 removes a projection, a negative one adds.
        limit: The bound c of a projection, in units of the residual stream, 0 or more; None for none.
        kind: What is subtracted.
        layers: The blocks; by default all of them.

    Returns:
        Interventions that compose, for ``fg.generate`` and others, in the scope "reply".

    Raises:
        SelectionError: There is no such component.
        DataError: The kind is none of both, the limit is below 0 or given for a constant, or there is no component.
        HookpointError: There is no such block.
    """
    if kind not in ("projection", "constant"):
        raise DataError(f"kind = {kind!r:.40}", "'projection' or 'constant'")
    if kind == "constant" and limit is not None:
        raise DataError("a limit of a constant", "a limit of a projection", 'leave limit= out, or kind="constant"')
    if not len(components):
        raise DataError("no components", "at least one", "pass [0] for the dominant one")
    made: list[Intervention] = []
    for layer in range(len(blocks_of(model))) if layers is None else layers:
        for number in components:
            vector = shift.vector(number)
            common: dict[str, Any] = {"direction": vector.direction, "hookpoint": Hookpoint(layer)}
            common |= {"scope": "reply", "bos": True, "method": "residual_shift"}
            if kind == "constant":
                made.append(Add(coefficient=-strength, **common))
            else:
                made.append(SubtractProjection(strength=strength, limit=limit, **common))
    return made
