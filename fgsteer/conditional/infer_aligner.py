"""InferAligner: the vectors of an aligned model, gated in every layer by what the steered model reads itself.

steering = infer_aligner(prompt_statistics(model, …), prompt_statistics(aligned, …))
"""

from __future__ import annotations

from collections.abc import Iterable

from fgsteer.conditional.statistics import check_places, model_name_of
from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import checked
from fgsteer.interventions.adding import Add
from fgsteer.interventions.readings import Probe
from fgsteer.interventions.scopes import Scope
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import ContrastStatistics


@checked
def infer_aligner(
    stats: ContrastStatistics,
    aligned: ContrastStatistics,
    *,
    coefficient: float = 1.0,
    layers: Iterable[int] | None = None,
    bias: float | None = None,
    scope: Scope = "all",
    bos: bool = False,
) -> list[Add]:
    """Cross-model guidance: ``h' = h + α·1[s·a + b > 0]·θ`` in every layer (InferAligner, arXiv 2401.11206).

    ``s = mean harmful − mean harmless`` of the model that is steered decides in its layer for each prompt, by the
    activation a at the prompt's last token, and θ is the same difference of an aligned model. The paper has no code and
    does not say b, α or the layers: b puts the threshold halfway between the two means of s·a, α is 1 and the layers
    are all that the statistics hold, unless you say otherwise. A gate reads what lower layers have steered.

    Args:
        stats: Statistics of the model that is steered, with harmful prompts as the positive side:
            ``prompt_statistics``.
        aligned: The same of the aligned model, of one family: both must mean the same by the axes of their streams.
        coefficient: The strength α.
        layers: The blocks whose outputs are steered.
        bias: The number b, in squared units of the stream, for every layer.
        scope: The tokens that are steered; the paper's are all.
        bos: Whether a start token is steered too.

    Returns:
        One addition for each layer, each with its own gate.

    Raises:
        PairingError: The models are of other widths or the statistics of other places; map one model's vectors to the
            other's space first.
        SelectionError: Both kinds of prompts have the same mean in a layer.
    """
    places = check_places(stats, aligned)
    if layers is not None:
        wanted = [Hookpoint(layer) for layer in layers]
        if not wanted:
            raise PairingError("layers=[]", "at least one layer", "leave layers= out for all that have statistics")
        if missing := [at for at in wanted if at not in places]:
            raise PairingError(
                f"layers={[at.layer for at in wanted]}, without statistics at {missing[0]}",
                f"some of {', '.join(map(str, places))}",
            )
        places = wanted
    added = []
    for at in places:
        own = stats.residual[at]
        middle = (own.positive.mean + own.negative.mean) / 2
        if not float(own.difference.norm()) > 0:
            raise SelectionError(f"the same mean of both kinds of prompts at {at}", "prompts that differ")
        gate = Probe(own.difference.float(), at, -float(own.difference @ middle) if bias is None else bias).last() > 0
        added.append(
            Add(
                direction=aligned.residual[at].difference.float(),
                hookpoint=at,
                coefficient=coefficient,
                scope=scope,
                bos=bos,
                when=gate,
                model_name=model_name_of(stats),
                method="infer_aligner",
            )
        )
    return added
