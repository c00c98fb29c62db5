"""Concept cones: a few orthonormal directions, every mixture of which with positive weights does what each does.

cone = train_cone(model, tokenizer, refused, answered, found.vector, dimension=2)
cone.save("cone.safetensors"); cone.sample(8)[0].add(1.0); cone.ablation(model)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fgsteer.directions.removal import ablate_everywhere
from fgsteer.errors import PairingError, SelectionError
from fgsteer.errors.checks import check_range, checked, is_whole_number
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.errors.wording import count
from fgsteer.interventions import Ablate, ClampSubspace
from fgsteer.interventions.values import finite_matrix, finite_number
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.pairing import check_pairing
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors
from fgsteer.vector import SteeringVector
from fgsteer.vector.provenance import model_name, parse_provenance

ORTHONORMAL = 1e-4  # how far the products of rows may be from 0 and 1: float32 keeps seven digits
SMALLEST = 1e-6  # of a unit row: what must be left of it beside other directions


@dataclass(frozen=True, eq=False, repr=False)
class ConceptCone(OneLineRepr):
    """The mixtures ``Σ wᵢ bᵢ``, w ≥ 0, of orthonormal directions at a hookpoint (arXiv 2502.17420).

    Args:
        basis: The directions b, orthonormal rows, (k, d_model).
        hookpoint: Where a direction of the cone is added.
        norm: The norm α with which it is added, in units of the residual stream.
        losses: The loss of each step of training, unweighted; empty where nothing was trained.
        provenance: How it was made.

    Raises:
        PairingError: The basis is no floating-point matrix, or its rows are not orthonormal.
        SteeringError: A number is not finite.
    """

    basis: Float[Tensor, "k d_model"]
    hookpoint: Hookpoint
    norm: float
    losses: tuple[float, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        basis = finite_matrix("basis", self.basis)
        rows = basis.double()
        error = float((rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max())
        if error > ORTHONORMAL:
            raise PairingError(
                f"rows whose products are up to {error:.2g} from those of orthonormal ones",
                "orthonormal rows",
                "orthogonalise them first, as torch.linalg.qr(rows.T)[0].T does",
            )
        object.__setattr__(self, "basis", basis)
        object.__setattr__(self, "hookpoint", Hookpoint.parse(self.hookpoint))
        object.__setattr__(self, "norm", finite_number("norm", self.norm))

    @property
    def dimension(self) -> int:
        """The number k of directions."""
        return len(self.basis)

    @checked
    def vector(self, number: int = 0) -> SteeringVector:
        """A direction of the basis, with the cone's norm. Raises SelectionError for one that there is not."""
        if not is_whole_number(number) or not 0 <= number < self.dimension:
            raise SelectionError(f"direction {number}", f"a number from 0 to {self.dimension - 1}")
        return self._vector(self.basis[number])

    @checked
    def sample(self, n: int = 1, seed: int = 0) -> list[SteeringVector]:
        """Directions of the cone with its norm, drawn uniformly: ``w = |g|/‖g‖`` with g from a normal distribution.

        Args:
            n: How many.
            seed: The seed of the draw.

        Raises:
            DataError: The number is none.
        """
        check_range("n", n, 1, MAX_COUNT, whole=True)
        generator = torch.Generator().manual_seed(seed)
        return [self._vector(row) for row in orthant_weights(n, self.dimension, generator) @ self.basis.double()]

    @checked
    def ablation(self, model: nn.Module) -> list[Ablate] | list[ClampSubspace]:
        """The removal of the whole subspace of the cone from the stream of a model, as ``ablate_everywhere`` removes.

        Args:
            model: A Hugging Face causal language model, of a family whose sublayers' outputs are known.

        Raises:
            HookpointError: The blocks of the model add something else than their sublayers' outputs.
        """
        return ablate_everywhere(model, [self._vector(row) for row in self.basis])

    def _vector(self, row: Tensor) -> SteeringVector:
        return SteeringVector((row * self.norm).float(), self.hookpoint, provenance=self.provenance)

    def save(self, path: str | Path) -> None:
        """Write the cone to one file: the basis as safetensors, the rest as JSON in the header.

        Args:
            path: The file to write; one that is there is replaced, and never left half written.

        Raises:
            FormatError: The file cannot be written.
        """
        header = {
            "hookpoint": str(self.hookpoint),
            "norm": self.norm,
            "losses": list(self.losses),
            "provenance": dict(self.provenance),
        }
        write_tensors(path, {"basis": self.basis}, kind="cone", header=header)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> ConceptCone:
        """Load a file that ``save`` wrote.

        Args:
            path: The file.
            model: The model to be steered, which the cone is checked against.

        Raises:
            FormatError: The file is missing, damaged, or of another kind.
            PairingError: The cone does not fit the model.
        """
        tensors, header = read_tensors(path, kind="cone")
        with refuse_damaged(path, "a file written by ConceptCone.save"):
            cone = cls(
                tensors["basis"],
                Hookpoint.from_name(header["hookpoint"]),
                float(header["norm"]),
                tuple(map(float, header["losses"])),
                parse_provenance(header["provenance"]),
            )
        if model is not None:
            check_pairing(model, cone.hookpoint, cone.basis.shape[1], model_name(cone.provenance), "cone")
        return cone


def orthant_weights(n: int, dimension: int, generator: torch.Generator) -> Float[Tensor, "n dimension"]:
    """Weights that are uniform on the part of the unit sphere where all are positive, float64."""
    weights = torch.randn(n, dimension, generator=generator, dtype=torch.float64).abs()
    unit: Tensor = weights / weights.norm(dim=1, keepdim=True)
    return unit


def orthonormal(rows: Float[Tensor, "k d_model"], against: Float[Tensor, "m d_model"]) -> Float[Tensor, "k d_model"]:
    """Gram–Schmidt in float64: each row without its parts along ``against`` (orthonormal) and along earlier rows.

    Raises SelectionError for a row of which nothing is left.
    """
    done = against.double()
    for number, row in enumerate(rows.double()):
        rest = row / row.norm()
        for _ in range(2):  # twice is enough: rounding of the first is taken out by the second
            rest = rest - done.T @ (done @ rest)
        if not float(rest.norm()) > SMALLEST:
            raise SelectionError(
                f"direction {number}, which lies in the space of those that it is to be orthogonal to",
                "a direction with a part of its own",
                'pass start="random", or fewer vectors as orthogonal_to',
            )
        done = torch.cat([done, (rest / rest.norm())[None]])
    return done[len(against) :]


def tangent(rows: Float[Tensor, "k d_model"], gradient: Float[Tensor, "k d_model"]) -> Float[Tensor, "k d_model"]:
    """The gradient of each unit row without its part along the row, which would change the norm alone."""
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


def span(vectors: Sequence[SteeringVector], width: int) -> Float[Tensor, "m d_model"]:
    """An orthonormal basis, as rows, of the space that vectors span, float64.

    Raises PairingError for a vector of another width, SelectionError for vectors that depend on each other.
    """
    for vector in vectors:
        if vector.d_model != width:
            raise PairingError(f"a vector of width {vector.d_model}", f"{width}, the direction's width")
    nothing = torch.empty(0, width, dtype=torch.float64)
    if not vectors:
        return nothing
    rows = torch.stack([vector.direction.detach().double().cpu() for vector in vectors])
    if len(rows) >= width:
        raise SelectionError(f"{count(len(rows), 'vector')} to be orthogonal to", f"fewer than {width}, the width")
    return orthonormal(rows, nothing)
