"""Ablation of a direction wherever blocks read from or write to the residual stream.

fg.generate(model, tokenizer, prompts, steering=ablate_everywhere(model, vector))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fgsteer.errors.checks import checked
from fgsteer.interventions import Ablate, ClampSubspace
from fgsteer.interventions.scopes import Scope
from fgsteer.models.hookpoints import Hookpoint, Site, blocks_of, resolve
from fgsteer.vector import SteeringVector

SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")


@checked
def ablate_everywhere(
    model: nn.Module, vector: SteeringVector | Sequence[SteeringVector], *, scope: Scope = "all", bos: bool = True
) -> list[Ablate] | list[ClampSubspace]:
    """Directional ablation: ``h' = h − (r̂·h) r̂`` at the input and at both sublayers of every block.

    No block then reads the direction from the stream, or leaves it there (arXiv 2406.11717). Where a norm comes between
    a sublayer and the stream, what the norm gives is ablated.

    Args:
        model: A Hugging Face causal language model, of a family whose sublayers' outputs are known.
        vector: The direction, whose norm and hookpoint do not count; or several, whose subspace is removed. Removing
            one after the other would put back what they have in common.
        scope: The tokens at which it is removed, as in ``Intervention``.
        bos: Whether it is removed at a start token at position 0 too, as in the paper.

    Returns:
        Interventions that compose, three for each block.

    Raises:
        HookpointError: The blocks of the model add something else than their sublayers' outputs.
        SteeringError: The direction is zero.
    """
    places = [Hookpoint(layer, site) for layer in range(len(blocks_of(model))) for site in SITES]
    for place in places:
        resolve(model, place)
    if not isinstance(vector, SteeringVector):
        directions = torch.stack([one.direction for one in vector])
        return [
            ClampSubspace(directions=directions, hookpoint=place, scope=scope, bos=bos, method="ablate_everywhere")
            for place in places
        ]
    method = str(vector.provenance.get("method") or "")
    return [
        Ablate(direction=vector.direction, hookpoint=place, scope=scope, bos=bos, method=method) for place in places
    ]
