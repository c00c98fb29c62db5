"""AdaSteer: strengths that follow a prompt's place between two classes of prompts.

steering = adasteer(rejection, harmfulness, rules=ADASTEER_RULES["Qwen2.5-7B-Instruct"])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from fgsteer.conditional.statistics import check_places, model_name_of
from fgsteer.errors import DataError, SelectionError
from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.interventions.adding import AddByPrompt
from fgsteer.interventions.readings import Preview, Probe
from fgsteer.interventions.scopes import Scope
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.statistics.contrast import ContrastStatistics


@dataclass(frozen=True, repr=False)
class AdaSteerRule(OneLineRepr):
    """How a strength follows the coordinate t of a prompt: ``clip(slope·(t + offset), at_least, at_most)``.

    Args:
        layer: The block at whose output t is read.
        slope: The change of the strength for each unit of t.
        offset: What is added to t.
        at_least: The least strength; None for no bound.
        at_most: The largest strength; None for no bound.
    """

    layer: int
    slope: float
    offset: float
    at_least: float | None = None
    at_most: float | None = None


ADASTEER_RULES: Mapping[str, tuple[AdaSteerRule, AdaSteerRule]] = MappingProxyType(
    {
        "Llama-3.1-8B-Instruct": (
            AdaSteerRule(8, 0.02, 60.0, -0.22, -0.08),
            AdaSteerRule(13, -0.05, 15.0, -0.75, None),  # −.05(t + 5) − .5, without an upper bound
        ),
        "gemma-2-9b-it": (AdaSteerRule(12, 0.004, -35.0, -0.02, 0.06), AdaSteerRule(19, 0.01, -50.0, -0.06, 0.02)),
        "Qwen2.5-7B-Instruct": (AdaSteerRule(5, 0.1, -140.0, -0.2, 0.0), AdaSteerRule(13, -0.06, -50.0, -0.6, 0.4)),
    }
)
"""The constants of the paper's code for three models: of the rejection direction, and of the harmfulness direction."""


@checked
def adasteer_coordinate(stats: ContrastStatistics, layer: int) -> Preview:
    """Where a prompt lies between two classes: ``t = 100·(h − μ_a)·(μ_b − μ_a)/‖μ_b − μ_a‖²``, read ahead.

    It is 0 at the mean of class a, the positive side of the statistics, and 100 at that of class b, the negative side.
    h is the activation at the prompt's last token, in a pass that nothing steers (arXiv 2504.09466).

    Args:
        stats: Statistics of the two classes, such as ``prompt_statistics`` gives.
        layer: The block at whose output it is read.

    Returns:
        The reading, for gates and for ``AddByPrompt``.

    Raises:
        PairingError: The statistics do not hold this block.
        SelectionError: Both classes have the same mean.
    """
    at, contrast = stats.at("residual", Hookpoint(layer))
    toward = -contrast.difference
    squared = float(toward @ toward)
    if not squared > 0:
        raise SelectionError(f"classes with the same mean at {at}", "two classes of prompts that differ")
    weight = 100 * toward / squared
    return Preview(Probe(weight.float(), at, bias=-float(contrast.positive.mean @ weight)))


@checked
def adasteer(
    rejection: ContrastStatistics,
    harmfulness: ContrastStatistics,
    *,
    rules: tuple[AdaSteerRule, AdaSteerRule],
    project: bool = True,
    scope: Scope = "prompt",
    bos: bool = False,
) -> list[AddByPrompt]:
    """Adaptive steering: ``h' = h + α·v_R + β·v_H`` at every block, α and β by the prompt (AdaSteer, arXiv 2504.09466).

    ``α = clip(a₁(t_R + a₂))`` and ``β = clip(b₁(t_H + b₂))``, with coordinates t as of ``adasteer_coordinate``, and v
    the difference of the means of class a and class b at each block. A prompt whose strengths are both clipped to 0
    keeps every bit. Prompts are read twice, as both coordinates are of a pass that nothing steers.

    In the published files v_H is projected on v_R, so that both terms move along one line, ``(α + β·k)·v_R`` with
    ``k = v_H·v_R/‖v_R‖²``. That is the default; ``project=False`` keeps v_H whole.

    Args:
        rejection: Statistics of the rejection direction: class a is the positive side, class b the negative one.
        harmfulness: Those of the harmfulness direction. The paper has one class a for both.
        rules: How α follows t_R and how β follows t_H; ``ADASTEER_RULES`` has the published ones.
        project: Whether v_H is projected on v_R.
        scope: The tokens that are steered; the paper's are those of the prompt.
        bos: Whether a start token is steered too, as the published code does.

    Returns:
        Two additions for each block output that both statistics hold. The published rules steer all blocks.

    Raises:
        DataError: There are not two rules.
        PairingError: The statistics are of other widths or places, or lack a rule's layer.
        SelectionError: Two classes have the same mean at a block.
    """
    places = check_places(rejection, harmfulness)
    if len(rules) != 2 or not all(isinstance(rule, AdaSteerRule) for rule in rules):
        raise DataError(f"rules={rules!r:.60}", "two rules, of rejection and of harmfulness", "pass two AdaSteerRules")
    coordinates = [
        adasteer_coordinate(stats, rule.layer) for stats, rule in zip((rejection, harmfulness), rules, strict=True)
    ]
    added = []
    for at in places:
        towards, harm = rejection.residual[at].difference, harmfulness.residual[at].difference
        if not float(towards.norm()) > 0:
            raise SelectionError(f"classes of rejection with the same mean at {at}", "two classes that differ")
        if project:
            harm = (harm @ towards) / (towards @ towards) * towards
        added += [
            AddByPrompt(
                direction=direction.float(),
                hookpoint=at,
                reading=reading,
                coefficient=rule.slope,
                bias=rule.offset,
                at_least=rule.at_least,
                at_most=rule.at_most,
                scope=scope,
                bos=bos,
                model_name=model_name_of(rejection),
                method="adasteer",
            )
            for direction, reading, rule in zip((towards, harm), coordinates, rules, strict=True)
        ]
    return added
