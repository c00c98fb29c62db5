"""Vectors and interventions as rows of a table.

rows_of(fg.Rotate(hookpoint=6, direction=a, other=b, by=30.0)) has two rows
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
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
from fgsteer.interventions.files import steering_sae_sha256
from fgsteer.interventions.projecting import ClampSubspace
from fgsteer.interventions.rotating import Rotate
from fgsteer.saes.sae import SAE
from fgsteer.serving.rows import KEEP_NORM, PLAIN, RELATIVE, TableRows
from fgsteer.vector import SteeringVector

SCALED = (Add, AddRelative, AddKeepingNorm, Clamp, ClampSubspace)
"""Interventions whose coefficients, targets and bounds a request's scale can multiply."""


def rows_of(item: SteeringVector | Intervention) -> TableRows:
    """The table rows of a vector, or of an intervention without its scope.

    Raises:
        HookpointError: The hookpoint is within a block.
        SteeringError: The vector is zero, or the intervention has a gate, or rotates to an angle.
        PairingError: No row can read the features of the clamp's SAE (normalised input).
    """
    if isinstance(item, SteeringVector):
        rows = _rows_of_vector(item)
    else:
        item = item.detach()
        refuse_gate(item)
        if isinstance(item, ClampFeature):
            rows = _rows_of_clamp(item)
        elif isinstance(item, AdaptiveAdd):
            rows = _rows_of_adaptive(item)
        else:
            rows = _rows_of_update(item)
    _ = rows.layer  # refuses a hookpoint within a block
    return rows


def refuse_gate(item: Intervention) -> None:
    """Raises SteeringError for an intervention with a gate."""
    if item.when is not None:
        raise SteeringError(
            f"{type(item).__name__} with a gate (when=…) in vLLM",
            "an intervention that always acts",
            "steer with fgsteer.steer, or leave when= out",
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
        scaled="target" if isinstance(item, SCALED) and bool(target.any()) else "",
        mode=RELATIVE if update.relative is not None else KEEP_NORM if update.keep_norm is not None else PLAIN,
    )


def _rows_of_clamp(clamp: ClampFeature) -> TableRows:
    sae, terms = clamp.sae, clamp.terms()
    if sae.input_norm != "none":
        raise PairingError(
            f"a feature clamp of an SAE with input_norm={sae.input_norm!r}",
            'a clamp of an SAE with input_norm="none"',
            "rows of a table read activations as they are: serve the features' directions as a vector instead "
            "(from_features)",
        )
    features = [feature for feature, *_ in terms]
    read, bias, threshold = _encoder_rows(sae, features)
    target, lam, lo, hi = (torch.tensor([float(term[n]) for term in terms]) for n in (1, 2, 3, 4))
    rows = (read, sae.W_dec[features].float(), bias, threshold, target, lam, lo, hi)
    if sae.activation == "topk":
        return TableRows(clamp.hookpoint, *rows, features=tuple(features), sae=steering_sae_sha256(sae))
    return TableRows(clamp.hookpoint, *rows)


def _encoder_rows(sae: SAE, features: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What reads features, its bias, and the threshold below which a feature is 0. Raises PairingError."""
    read, bias, threshold = sae.W_enc[:, features].T.float(), sae.b_enc[features].float(), torch.zeros(len(features))
    if sae.threshold is not None and sae.activation == "jumprelu":
        threshold = sae.threshold[features].float().clamp(min=0)
    if sae.gate_bias is not None and sae.gate_scale is not None:  # open where pre > −gate_bias; reads pre·scale + b
        scale = sae.gate_scale[features].float()
        if not bool((scale > 0).all()):
            raise PairingError(
                "a gated SAE with a gate_scale of 0 or less",
                "positive gate scales",
                "a threshold cannot express its gate: serve the features' directions as a vector (from_features)",
            )
        read, threshold = read * scale[:, None], (bias - scale * sae.gate_bias[features].float()).clamp(min=0)
    return read, bias, threshold
