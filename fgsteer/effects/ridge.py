"""Ridge regression in closed form, from sums that stream: nothing but (d, n) totals is held.

moments = LinearMoments.of(x, y) + LinearMoments.of(x2, y2)
weights, bias = moments.fit(ridge=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import DataError, PairingError

RIDGES = tuple(10 ** (step / 4) for step in range(-12, 29))  # tried as λ, in mean eigenvalues: 0.001 to 10 million


@dataclass(frozen=True, eq=False)
class LinearMoments:
    """Sums over rows of inputs x (d,) and outputs y (n,), in float64; two of them add up.

    Args:
        count: The number of rows.
        x: ``Σx``, (d,).
        y: ``Σy``, (n,).
        xx: ``Σxxᵀ``, (d, d).
        xy: ``Σxyᵀ``, (d, n).
        yy: ``Σ‖y‖²``.
    """

    count: int
    x: Float[Tensor, " d"]
    y: Float[Tensor, " n"]
    xx: Float[Tensor, "d d"]
    xy: Float[Tensor, "d n"]
    yy: float

    @classmethod
    def of(cls, x: Float[Tensor, "count d"], y: Float[Tensor, "count n"]) -> LinearMoments:
        """The sums over rows of x and y. Raises PairingError for unequal numbers of rows."""
        if len(x) != len(y):
            raise PairingError(
                f"{len(x)} inputs and {len(y)} outputs",
                "one output per input",
                "pass one row of effects for each vector",
            )
        x, y = x.double(), y.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, float(y.square().sum()))

    def __add__(self, other: LinearMoments) -> LinearMoments:
        if self.xy.shape != other.xy.shape:
            raise PairingError(
                f"moments of shapes {tuple(self.xy.shape)} and {tuple(other.xy.shape)}",
                "moments of one shape to add",
                "add moments of the same inputs and outputs",
            )
        return LinearMoments(
            self.count + other.count,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def about(self, x0: Float[Tensor, " d"], y0: Float[Tensor, " n"]) -> LinearMoments:
        """The moments of ``x − x0`` and ``y − y0``."""
        n = self.count
        cross = torch.outer(self.x, x0)
        return LinearMoments(
            n,
            self.x - n * x0,
            self.y - n * y0,
            self.xx - cross - cross.T + n * torch.outer(x0, x0),
            self.xy - torch.outer(self.x, y0) - torch.outer(x0, self.y) + n * torch.outer(x0, y0),
            self.yy - 2 * float(self.y @ y0) + n * float(y0 @ y0),
        )

    def centred(self) -> LinearMoments:
        """The moments about the means. Raises DataError for no row."""
        if not self.count:
            raise DataError("moments of no row", "moments of at least one row", "pass more vectors")
        return self.about(self.x / self.count, self.y / self.count)

    def fit(self, ridge: float) -> tuple[Float[Tensor, "d n"], Float[Tensor, " n"]]:
        """The fit ``M = (X_cᵀX_c + λI)⁻¹ X_cᵀY_c`` (d, n), ``b = ȳ − x̄M`` (n,), with λ = ``ridge`` on X_cᵀX_c's scale.

        Raises DataError for no row or a negative λ.
        """
        if not ridge >= 0:
            raise DataError(f"ridge = {ridge}", "a number that is at least 0", "leave it out to have λ chosen")
        centred = self.centred()
        gram = centred.xx + ridge * torch.eye(len(self.x), dtype=torch.float64, device=self.x.device)
        weights = torch.linalg.lstsq(gram, centred.xy).solution if ridge == 0 else torch.linalg.solve(gram, centred.xy)
        return weights, self.y / self.count - (self.x / self.count) @ weights

    def squared_error(self, weights: Float[Tensor, "d n"], bias: Float[Tensor, " n"]) -> float:
        """The squared error ``Σ‖y − xM − b‖²`` over the rows."""
        M, b = weights.double(), bias.double()
        fitted = (M * (self.xx @ M)).sum() + 2 * (self.x @ M) @ b + self.count * (b @ b)
        return self.yy + float(fitted - 2 * (self.xy * M).sum() - 2 * self.y @ b)

    def mean_eigenvalue(self) -> float:
        """The mean eigenvalue of X_cᵀX_c, the natural unit of λ."""
        return float(self.centred().xx.trace()) / len(self.x)


def ridge_path(train: LinearMoments, held_out: LinearMoments, ridges: Sequence[float]) -> list[float]:
    """The held-out R² of the fit on ``train`` for each λ, ``1 − Σ‖y − ŷ‖² / Σ‖y − ȳ_train‖²``.

    One eigendecomposition serves every λ: with ``X_cᵀX_c = U s Uᵀ`` and ``A = Uᵀ X_cᵀY_c``,
    ``M = U (s + λ)⁻¹ A``, and the held-out error needs only (d, d) products of A. Raises
    DataError where either has no row or the held-out outputs do not vary.
    """
    centred = train.centred()
    held_out_centred = held_out.about(train.x / train.count, train.y / train.count)
    if not held_out_centred.yy > 0:
        raise DataError(
            f"{held_out.count} held-out rows without variance",
            "held-out effects that vary",
            "measure more vectors",
        )
    values, basis = torch.linalg.eigh(centred.xx)
    rotated = basis.T @ centred.xy
    linear = (rotated * (basis.T @ held_out_centred.xy)).sum(1)
    quadratic = (basis.T @ held_out_centred.xx @ basis) * (rotated @ rotated.T)
    scores = []
    for ridge in ridges:
        shrink = 1 / (values.clamp(min=0) + ridge)
        error = held_out_centred.yy - 2 * float(shrink @ linear) + float(shrink @ quadratic @ shrink)
        scores.append(1 - error / held_out_centred.yy)
    return scores


def best_ridge(train: LinearMoments, held_out: LinearMoments) -> float:
    """The λ of RIDGES with the highest held-out R², in mean eigenvalues of the centred ``X_cᵀX_c``."""
    unit = train.mean_eigenvalue()
    scores = ridge_path(train, held_out, [unit * share for share in RIDGES])
    return RIDGES[max(range(len(RIDGES)), key=lambda i: scores[i])]
