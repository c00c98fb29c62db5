"""Which answers are read under which steering, and what is minimised: a row of ``OBJECTIVES`` for each objective.

A unit is what one term of the loss needs: one answer, or a winning and a losing one. Each of its readings has a
strength, at which the vector is added, or is NULL_OUT, which removes it, or READ_OUT, by which a text sets its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.learning.losses import bipo_loss, reps_loss, simpo_loss
from fgsteer.learning.settings import VectorTraining

NULL_OUT: Literal["null-out"] = "null-out"
READ_OUT: Literal["read-out"] = "read-out"
Strength = float | Literal["null-out", "read-out"]


class Reading(NamedTuple):
    """An answer, by the number of its row, and how it is steered."""

    row: int
    strength: Strength


@dataclass(frozen=True)
class Unit:
    """The readings of one term of a loss: of one answer, or of the winner and the loser."""

    readings: tuple[Reading, ...]

    @property
    def rows(self) -> list[int]:
        """The rows that are read."""
        return [reading.row for reading in self.readings]


class Texts(NamedTuple):
    """What losses need of each row: the tokens that log-probabilities are divided by, and log π₀, both on the CPU."""

    tokens: Float[Tensor, " rows"]
    base: Float[Tensor, " rows"]


Draw = Callable[[], float]  # a strength
Rows = tuple[int, int | None]  # the winning and the losing answer of an example
MakeUnits = Callable[[Rows, Draw], list[Unit]]
PairLoss = Callable[[Sequence[Unit], Float[Tensor, "pairs 2"], Texts, VectorTraining], Float[Tensor, " pairs"]]


@dataclass(frozen=True)
class ObjectiveSpec:
    """One objective.

    Args:
        units: The units of an example, given what draws its strengths.
        pair_loss: The loss of each pair; None where it is the mean cross-entropy of the answers' tokens.
        needs_base: Whether it looks at log π₀.
        signed: Whether a whole batch has one strength, 1 or −1.
    """

    units: MakeUnits
    pair_loss: PairLoss | None = None
    needs_base: bool = False
    signed: bool = False


def _winner(rows: Rows, draw: Draw) -> list[Unit]:
    return [Unit((Reading(rows[0], draw()),))]


def _both_alone(rows: Rows, _: Draw) -> list[Unit]:
    return [Unit((Reading(row, READ_OUT),)) for row in rows if row is not None]


def _pair(rows: Rows, draw: Draw) -> list[Unit]:
    winner, loser = rows
    assert loser is not None  # examples_of gives one to each objective that compares
    return [Unit((Reading(winner, draw()), Reading(loser, draw())))]


def _pair_and_null_out(rows: Rows, draw: Draw) -> list[Unit]:
    winner, loser = rows
    assert loser is not None
    return [*_pair(rows, draw), Unit((Reading(loser, NULL_OUT), Reading(winner, NULL_OUT)))]


def _on(device: torch.device, values: Tensor, units: Sequence[Unit], side: int) -> Float[Tensor, " pairs"]:
    return values[[unit.rows[side] for unit in units]].to(device)


def _bipo(
    units: Sequence[Unit], values: Float[Tensor, "pairs 2"], texts: Texts, settings: VectorTraining
) -> Float[Tensor, " pairs"]:
    base = [_on(values.device, texts.base, units, side) for side in (0, 1)]
    signs = values.new_tensor([unit.readings[0].strength for unit in units])
    return bipo_loss(values[:, 0], values[:, 1], base[0], base[1], settings.beta, signs)


def _reps(
    units: Sequence[Unit], values: Float[Tensor, "pairs 2"], texts: Texts, _: VectorTraining
) -> Float[Tensor, " pairs"]:
    on = partial(_on, values.device)
    base = [on(texts.base, units, side) for side in (0, 1)]
    tokens = [on(texts.tokens, units, side) for side in (0, 1)]
    return reps_loss(values[:, 0], values[:, 1], base[0], base[1], tokens[0], tokens[1])


def _simpo(
    units: Sequence[Unit], values: Float[Tensor, "pairs 2"], texts: Texts, settings: VectorTraining
) -> Float[Tensor, " pairs"]:
    tokens = [_on(values.device, texts.tokens, units, side) for side in (0, 1)]
    return simpo_loss(values[:, 0], values[:, 1], tokens[0], tokens[1], settings.beta, settings.margin)


OBJECTIVES: Mapping[str, ObjectiveSpec] = {
    "lm": ObjectiveSpec(_winner),
    "bipo": ObjectiveSpec(_pair, _bipo, needs_base=True, signed=True),
    "reps": ObjectiveSpec(_pair_and_null_out, _reps, needs_base=True),
    "reft_r1": ObjectiveSpec(_both_alone),
    "simpo": ObjectiveSpec(_pair, _simpo),
}
