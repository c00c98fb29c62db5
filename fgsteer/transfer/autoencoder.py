"""Training of a map with a hidden layer, ``f(x) = W₂ ReLU(W₁x + b₁) + b₂``, by Adam on squared errors.

layers, errors = train_autoencoder(x, y, x_held, y_held, AutoencoderTraining(hidden=600))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.errors.checks import check_range
from fgsteer.errors.limits import MAX_COUNT

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class AutoencoderTraining:
    """How the map is trained.

    Args:
        hidden: The width of the hidden layer; None takes ``⌊√(d_source·d_target)⌋``, as the paper does.
        epochs: Passes over the training tokens at most.
        patience: Passes without a better error on the held-out tokens, after which training ends.
        batch: Tokens in a step.
        lr: The learning rate of Adam.
        seed: The seed of the first weights and of the order of the tokens.

    Raises:
        DataError: A value is out of range.
    """

    hidden: int | None = None
    epochs: int = 60
    patience: int = 4
    batch: int = 256
    lr: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch", *(() if self.hidden is None else ("hidden",))):
            check_range(name, getattr(self, name), 1, MAX_COUNT, whole=True)
        check_range("lr", self.lr, 1e-9, 10)
        check_range("seed", self.seed, 0, MAX_SEED, whole=True)


class Layers(NamedTuple):
    """The weights of a map with a hidden layer: ``weight ReLU(hidden_weight x + hidden_bias) + bias``."""

    weight: Float[Tensor, "d_target hidden"]
    bias: Float[Tensor, " d_target"]
    hidden_weight: Float[Tensor, "hidden d_source"]
    hidden_bias: Float[Tensor, " hidden"]


def train_autoencoder(
    x: Float[Tensor, "tokens d_source"],
    y: Float[Tensor, "tokens d_target"],
    x_held: Float[Tensor, "held d_source"],
    y_held: Float[Tensor, "held d_target"],
    training: AutoencoderTraining,
    report: Callable[[int], None] | None = None,
) -> tuple[Layers, list[float]]:
    """Train a map, and keep the weights that do best on the held-out tokens.

    Every dimension of both sides is counted in its own standard deviations from its mean, so that the error is that of
    all dimensions and not of a few with massive values; the weights that come back undo this.

    Args:
        x: What is mapped.
        y: What it should become.
        x_held: The same, held out.
        y_held: What it should become.
        training: Size and schedule.
        report: Is told the number of passes that are done.

    Returns:
        The weights in float32, and the mean squared error on the held-out tokens after each pass, in variances.
    """
    (x_mean, x_unit), (y_mean, y_unit) = _units(x), _units(y)
    x, x_held = ((each - x_mean) / x_unit for each in (x, x_held))
    y, y_held = ((each - y_mean) / y_unit for each in (y, y_held))
    generator = torch.Generator().manual_seed(training.seed)
    hidden = math.isqrt(x.shape[1] * y.shape[1]) if training.hidden is None else training.hidden
    first = _linear(x.shape[1], hidden, generator).to(x.device)
    second = _linear(hidden, y.shape[1], generator).to(x.device)
    net = nn.Sequential(first, nn.ReLU(), second)
    optimizer = torch.optim.Adam(net.parameters(), lr=training.lr)
    errors: list[float] = []
    best: dict[str, Tensor] = {}
    for epoch in range(training.epochs):
        for chosen in torch.split(torch.randperm(len(x), generator=generator), training.batch):
            numbers = chosen.to(x.device)
            loss = nn.functional.mse_loss(net(x[numbers]), y[numbers])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            errors.append(float(nn.functional.mse_loss(net(x_held), y_held)))
        if errors[-1] <= min(errors):
            best = {name: value.detach().clone() for name, value in net.state_dict().items()}
        if report is not None:
            report(epoch + 1)
        if len(errors) - 1 - errors.index(min(errors)) >= training.patience:
            break
    w1, b1, w2, b2 = (best[name].double() for name in ("0.weight", "0.bias", "2.weight", "2.bias"))
    w1 = w1 / x_unit.double()
    b1 = b1 - w1 @ x_mean.double()
    w2 = w2 * y_unit.double()[:, None]
    b2 = b2 * y_unit.double() + y_mean.double()
    return Layers(*(each.float() for each in (w2, b2, w1, b1))), errors


def _units(rows: Float[Tensor, "tokens width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"]]:
    """Mean and standard deviation of each dimension; 1 for one that does not vary."""
    mean, unit = rows.double().mean(0), rows.double().std(0)
    return mean.float(), torch.where(unit > 0, unit, 1.0).float()


def _linear(d_in: int, d_out: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer with uniform weights and biases up to ``1/√d_in``, drawn from a generator."""
    layer = nn.Linear(d_in, d_out)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * d_in**-0.5)
    return layer
