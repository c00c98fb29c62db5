"""Gates of single tokens as rows of a table: conditions that are read where the intervention acts.

A gate becomes clauses, all of which must hold, each of them conditions of which one must: ``a & (b | ~c)`` has two.

    conditions_of((Feature(sae, 123) > 2.0) & (Projection(vec) < 1.0), layer=6)
"""

from __future__ import annotations

import torch
from torch import Tensor

from fgsteer.errors import SteeringError
from fgsteer.interventions.files import steering_sae_sha256
from fgsteer.interventions.gates import Both, Condition, Either, Gate, Not, Reading
from fgsteer.interventions.readings import Cosine, Feature, Probe, Projection
from fgsteer.serving.feature_rows import encoder_rows
from fgsteer.serving.rows import CLAUSES, ConditionRow, block_of

MAX_CONDITIONS = 16
_ELSE = "steer with fgsteer.steer, which knows all gates, or leave when= out"
_Clause = list[tuple[Condition, bool]]  # conditions, and whether each is negated


def conditions_of(gate: Gate, layer: int) -> tuple[ConditionRow, ...]:
    """The rows of a gate of an intervention at the output of a block.

    Raises:
        SteeringError: The gate is one of a prompt, reads elsewhere, is too large, or is of a class of your own.
        PairingError: No row can read a feature of it (normalised input).
    """
    clauses = _clauses(gate, negated=False)
    return tuple(
        _row(condition, negated, number, layer)
        for number, clause in enumerate(clauses)
        for condition, negated in clause
    )


def _clauses(gate: Gate, negated: bool) -> list[_Clause]:
    """The clauses of a gate or of its opposite. Raises SteeringError for too many."""
    if isinstance(gate, Not):
        return _clauses(gate.gate, not negated)
    if isinstance(gate, Both | Either):
        first, second = _clauses(gate.first, negated), _clauses(gate.second, negated)
        all_hold = isinstance(gate, Both) != negated
        clauses = first + second if all_hold else [a + b for a in first for b in second]
    elif isinstance(gate, Condition):
        clauses = [[(gate, negated)]]
    else:
        raise SteeringError(f"a gate of the class {type(gate).__name__} in vLLM", "readings that are compared", _ELSE)
    if len(clauses) > CLAUSES or sum(map(len, clauses)) > MAX_CONDITIONS:
        raise SteeringError(
            f"a gate of {len(clauses)} parts that must all hold, with {sum(map(len, clauses))} conditions, in vLLM",
            f"at most {CLAUSES} parts and {MAX_CONDITIONS} conditions",
            _ELSE,
        )
    return clauses


def _row(condition: Condition, negated: bool, clause: int, layer: int) -> ConditionRow:
    reading = condition.reading
    if reading.pooling:
        raise SteeringError(f"a gate of a prompt (.{reading.pooling}()) in vLLM", "a gate of each token", _ELSE)
    if reading.hookpoint.site != "resid_post" or block_of(reading.hookpoint) != layer:
        raise SteeringError(
            f"a gate that is read at {reading.hookpoint} in vLLM",
            f"a gate that is read where the intervention acts, at the output of block {layer}",
            _ELSE,
        )
    read, bias, threshold = _reads(reading)
    topk = reading.sae if isinstance(reading, Feature) and reading.sae.activation == "topk" else None
    return ConditionRow(
        read=read,
        bias=bias,
        threshold=threshold,
        limit=condition.threshold,
        is_above=condition.fires_above,
        is_negated=negated,
        is_cosine=isinstance(reading, Cosine),
        clause=clause,
        feature=reading.feature if isinstance(reading, Feature) and topk is not None else -1,
        sae="" if topk is None else steering_sae_sha256(topk),
    )


def _reads(reading: Reading) -> tuple[Tensor, float, float]:
    """The vector that is read, its bias, and what is at or below counts as 0. Raises SteeringError, PairingError."""
    if isinstance(reading, Projection | Cosine):
        return reading.direction / reading.direction.norm(), 0.0, -torch.inf
    if isinstance(reading, Probe):
        return reading.weight.float(), reading.bias, -torch.inf
    if isinstance(reading, Feature):
        read, bias, threshold = encoder_rows(reading.sae, [reading.feature])
        return read[0], float(bias), float(threshold)
    raise SteeringError(
        f"a gate that reads {type(reading).__name__} in vLLM", "a Projection, Cosine, Probe or Feature", _ELSE
    )
