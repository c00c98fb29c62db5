"""Vectors and interventions as rows of a table.

rows_of(fg.Rotate(hookpoint=6, direction=a, other=b, by=30.0)) has two rows
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from fgsteer.errors import SteeringError
from fgsteer.errors.wording import a
from fgsteer.interventions import (
    AdaptiveAdd,
    Add,
    AddKeepingNorm,
    AddRelative,
    Clamp,
    ClampFeature,
    Intervention,
    unit_and_norm,
)
from fgsteer.interventions.projecting import ClampSubspace
from fgsteer.interventions.remapping import Remap
from fgsteer.interventions.rotating import Rotate
from fgsteer.interventions.scaling import Scale
from fgsteer.serving.feature_rows import rows_of_clamp
from fgsteer.serving.gating import conditions_of
from fgsteer.serving.rows import KEEP_NORM, PLAIN, RELATIVE, TableRows
from fgsteer.vector import SteeringVector

SCALED = (Add, AddRelative, AddKeepingNorm, Clamp, ClampSubspace)
"""Interventions whose coefficients, targets and bounds a request's scale can multiply."""


def rows_of(item: SteeringVector | Intervention) -> TableRows:
    """The table rows of a vector, or of an intervention without its scope.

    Raises:
        HookpointError: The hookpoint is within a block.
        SteeringError: The vector is zero, or the intervention rotates to an angle, replaces activations by a map's, or
            has a gate of a prompt, or one that is read elsewhere.
        PairingError: No row can read the features of the clamp's SAE (normalised input).
    """
    if isinstance(item, SteeringVector):
        rows = _rows_of_vector(item)
    else:
        check_intervention(item)
        item = item.detach()
        if isinstance(item, ClampFeature):
            rows = rows_of_clamp(item)
        elif isinstance(item, AdaptiveAdd):
            rows = _rows_of_adaptive(item)
        elif isinstance(item, Remap | Scale):
            raise SteeringError(
                f"a {type(item).__name__} in vLLM, which would need as many rows of the table as the model is wide",
                "a change along a few vectors",
                "steer with fgsteer.steer, which can do all",
            )
        else:
            rows = _rows_of_update(item)
        if item.when is not None:
            rows = replace(rows, conditions=conditions_of(item.when, rows.layer))
    _ = rows.layer  # refuses a hookpoint within a block
    return rows


def check_intervention(item: object) -> None:
    """Raises SteeringError for what steers something else than activations, such as a cache."""
    if not isinstance(item, Intervention):
        raise SteeringError(
            f"{a(type(item).__name__)} in vLLM",
            "an intervention on activations",
            "steer with fgsteer.steer, which can do all",
        )
    if item.strength_reading is not None:
        raise SteeringError(
            f"{a(type(item).__name__)} in vLLM, whose strength each prompt decides",
            "a strength that is a number, or one that each token decides",
            "steer with fgsteer.steer, which can do all",
        )


def _rows_of_vector(vector: SteeringVector) -> TableRows:
    unit, norm = unit_and_norm(vector.direction.detach())
    one = torch.ones(1)
    offset = None if vector.reference is None else float(unit @ vector.reference.detach())
    row, inf = unit[None], one * math.inf
    return TableRows(vector.hookpoint, row, row, one * 0, -inf, one, one, -inf, inf, float(norm), offset)


def _rows_of_adaptive(item: AdaptiveAdd) -> TableRows:
    """The row of ``relu(a·h + b)``, which is 0 below the threshold 0."""
    zero = torch.zeros(1)
    return TableRows(
        item.hookpoint,
        read=item.read.float()[None],
        write=item.direction.float()[None],
        bias=zero + float(item.bias),
        threshold=zero,
        target=zero,
        lam=zero - float(item.coefficient),
        lo=zero - math.inf,
        hi=zero + math.inf,
        scaled="gain",
    )


def _removes(item: Intervention) -> bool:
    return isinstance(item, ClampSubspace) and item.targets is None


def _rows_of_update(item: Intervention) -> TableRows:
    """The rows of an intervention that the kernel's update describes in full."""
    update = item.update()
    if update.plane is not None or update.sae is not None:
        turns = isinstance(item, Rotate)
        raise SteeringError(
            f"{'a rotation to an angle (to=)' if turns else type(item).__name__} in vLLM",
            "a rotation by an angle (by=)" if turns else "a change along vectors that depends on projections",
            "steer with fgsteer.steer, which can do all",
        )
    write, target = update.write[0], update.const[0]
    infinite = torch.full_like(target, math.inf)
    return TableRows(
        item.hookpoint,
        read=torch.zeros_like(write) if update.read is None else update.read[0],
        write=write,
        bias=torch.zeros_like(target),
        threshold=-infinite,
        target=target,
        lam=update.lam[0],
        lo=-infinite if update.lo is None else update.lo[0],
        hi=infinite if update.hi is None else update.hi[0],
        scaled="target" if isinstance(item, SCALED) and not _removes(item) else "",
        mode=RELATIVE if update.relative is not None else KEEP_NORM if update.keep_norm is not None else PLAIN,
    )
