"""The losses, as functions of log-probabilities of answers: π under steering, π₀ without it. All are in nats.

reps_loss(winner, loser, base_winner, base_loser, winner_tokens, loser_tokens)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

CURVE_POINTS = 50  # of the losses that a vector notes

Values = Float[Tensor, " pairs"]


def bipo_loss(
    winner: Values, loser: Values, base_winner: Values, base_loser: Values, beta: float, sign: Values | float
) -> Values:
    """``−log σ(m·β·[(log π(y_w) − log π₀(y_w)) − (log π(y_l) − log π₀(y_l))])``, π at m·v (arXiv 2406.00045)."""
    return -logsigmoid(sign * beta * ((winner - base_winner) - (loser - base_loser)))


def reps_loss(
    winner: Values, loser: Values, base_winner: Values, base_loser: Values, winner_tokens: Values, loser_tokens: Values
) -> Values:
    """``−log σ(c/n_w·log π(y_w) − 1/n_l·log π(y_l))``, ``c = max(log π₀(y_l) − log π₀(y_w), 1)`` (arXiv 2505.20809)."""
    weight = (base_loser - base_winner).clamp(min=1.0)
    return -logsigmoid(weight * winner / winner_tokens - loser / loser_tokens)


def simpo_loss(
    winner: Values, loser: Values, winner_tokens: Values, loser_tokens: Values, beta: float, margin: float
) -> Values:
    """``−log σ(β/n_w·log π(y_w) − β/n_l·log π(y_l) − γ)`` (arXiv 2405.14734)."""
    return -logsigmoid(beta * (winner / winner_tokens - loser / loser_tokens) - margin)


def strength_and_rest(readings: Float[Tensor, " tokens"], top: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """ReFT-r1's strength, the mean of the ``top`` largest readings of a text, and the sum of the others.

    With fewer tokens than ``top`` it is the mean of all.
    """
    largest = torch.topk(readings, min(top, len(readings))).values
    return largest.mean(), readings.sum() - largest.sum()


def loss_curve(losses: Sequence[float]) -> list[list[float]]:
    """At most so many points (step, mean loss of the steps since the point before)."""
    size = max(1, -(-len(losses) // CURVE_POINTS))
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [[min(len(losses), (n + 1) * size), sum(part) / len(part)] for n, part in enumerate(parts)]
