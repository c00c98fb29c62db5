"""What a server keeps of a vector or a feature clamp: rows of a table, one table for each steered layer.

Every intervention at a block's output is k rows that read and write, and four numbers that a request chooses:

    h' = h + Σⱼ clip(const·targetⱼ + gain·lamⱼ·actⱼ, loⱼ, hiⱼ) · writeⱼ
    actⱼ = sⱼ where sⱼ = readⱼ·h + biasⱼ > thresholdⱼ, else 0

const, gain and a further lo and hi are the request's. A vector is one row with read = write = v̂: add, ablate, clamp,
its bounds and affine differ in the four numbers only, so one loaded file serves them all.

    rows_of(SteeringVector.load("love.safetensors")).amounts("add", 2.0)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from fgsteer.errors import FormatError, HookpointError, PairingError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.interventions import ClampFeature, unit_and_norm
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.steering.ranges import check_amount
from fgsteer.storage.files import read_tensors, refuse_damaged, tensor_sha256, write_tensors
from fgsteer.storage.json_files import text_sha256
from fgsteer.vector import SteeringVector

TENSORS = ("read", "write", "bias", "threshold", "target", "lam", "lo", "hi")
NO_AMOUNTS = ("threshold", "lo", "hi")  # these add nothing themselves, and may be infinite
ADDED = {"lam": 1.0, "lo": -math.inf, "hi": math.inf}  # what rows have in files of earlier versions
VECTOR_OPERATIONS = {  # (gain, lo, hi) of each operation on a vector
    "add": (0.0, -math.inf, math.inf),
    "ablate": (-1.0, -math.inf, math.inf),
    "clamp": (-1.0, -math.inf, math.inf),
    "at_least": (-1.0, 0.0, math.inf),
    "at_most": (-1.0, -math.inf, 0.0),
    "affine": (-1.0, -math.inf, math.inf),
}
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def check_name(name: object) -> str:
    """The name, if it has 1 to 64 of ``A–Z a–z 0–9 _ - .`` and does not begin with a dot. Raises SteeringError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = ascii(name[:64]) if isinstance(name, str) else a(type(name).__name__)
        raise SteeringError(
            f"the name {shown}",
            "a name of 1 to 64 letters, digits, underscores, hyphens and dots that does not begin with a dot",
            "choose another name",
        )
    return name


@dataclass(frozen=True, eq=False)
class TableRows:
    """Table rows of one intervention: ``read`` and ``write`` (k, d_model), the others (k,).

    ``norm`` is the norm of the vector, ``offset`` the projection r̂·r⁻ of its reference if it has one. A feature clamp
    has neither.
    """

    hookpoint: Hookpoint
    read: Float[Tensor, "k d_model"]
    write: Float[Tensor, "k d_model"]
    bias: Float[Tensor, " k"]
    threshold: Float[Tensor, " k"]
    target: Float[Tensor, " k"]
    lam: Float[Tensor, " k"]
    lo: Float[Tensor, " k"]
    hi: Float[Tensor, " k"]
    norm: float | None = None
    offset: float | None = None

    @property
    def layer(self) -> int:
        """The block at whose output it acts. Raises HookpointError for a hookpoint within a block."""
        site, layer = self.hookpoint.site, self.hookpoint.layer
        if site == "resid_post" or (site == "resid_pre" and layer > 0):
            return layer if site == "resid_post" else layer - 1
        raise HookpointError(
            f"the hookpoint {self.hookpoint}",
            "a hookpoint at the output of a block",
            "vLLM computes the inside of a block in fused steps, where nothing can be steered: use resid_post",
        )

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that decides what it does."""
        tensors = (getattr(self, name) for name in TENSORS)
        return text_sha256([tensor_sha256(*tensors), self.layer, self.norm, self.offset])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in float32. No two share storage, so that safetensors can write them."""
        return {name: getattr(self, name).to(torch.float32, copy=True).contiguous() for name in TENSORS}

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """The largest change of an entry for const = 1, and for what all rows read of a stream of norm 1."""
        read, write, bias, target, lam = (getattr(self, n).double() for n in ("read", "write", "bias", "target", "lam"))
        amounts = torch.stack([target.abs(), lam.abs() * (read.norm(dim=1) + bias.abs())])
        by_const, by_read = (amounts @ write.abs()).amax(1).tolist()
        return by_const, by_read

    def check(self, dtype: torch.dtype) -> None:
        """Raises SteeringError for rows, a norm or a reference that would overflow activations of a dtype."""
        width, (by_const, by_read) = self.read.shape[1], self._reach
        entries = torch.cat([getattr(self, name).flatten().double() for name in TENSORS if name not in NO_AMOUNTS])
        strength = 1.0 if self.norm is None else self.norm
        for what, amount in (
            ("a row", float(entries.abs().amax())),
            ("a row", by_read),
            ("a vector or a clamp at strength 1", strength * by_const),
            ("a reference", abs(self.offset or 0.0) * by_const),
        ):
            check_amount(amount, dtype, width, what)

    def check_const(self, const: float, dtype: torch.dtype) -> None:
        """Raises SteeringError for an amount of a request that would overflow activations of a dtype."""
        within = abs(const) * max(1.0, float(self.target.abs().amax())) <= torch.finfo(torch.float32).max
        check_amount(abs(const) * self._reach[0] if within else math.inf, dtype, self.read.shape[1], "a request")

    def amounts(self, operation: str | None, scale: float) -> tuple[float, float, float, float]:
        """The four numbers (const, gain, lo, hi) of an operation.

        Args:
            operation: "add" (also None), "ablate", "clamp", "at_least", "at_most" or "affine"; None for a feature
                clamp.
            scale: Add's coefficient, a clamp's target or bound, affine's alpha. A feature clamp's targets and bounds
                are multiplied by it.

        Raises:
            SteeringError: The operation is unknown, or not one of what is loaded.
        """
        if self.norm is None:
            if operation is not None:
                raise SteeringError(
                    f"the operation {operation!r} for a feature clamp",
                    "no operation",
                    "a feature clamp only sets its features to their targets: leave steer_op out",
                )
            return scale, -1.0, -math.inf, math.inf
        if operation == "affine" and self.offset is None:
            raise SteeringError(
                "the operation 'affine' for a vector without a reference",
                "a vector with a reference, such as fgsteer.ace builds",
                "use the operation clamp, or load a vector that ace built",
            )
        if operation == "ablate" and scale != 1.0:
            raise SteeringError(
                f"the scale {scale:g} for the operation 'ablate'",
                "no scale",
                "an ablation has no strength: leave steer_scale out",
            )
        if operation is not None and operation not in VECTOR_OPERATIONS:
            raise SteeringError(
                f"the operation {operation!r}",
                f"one of {', '.join(VECTOR_OPERATIONS)}",
                "correct steer_op; what vLLM cannot do, steer with fgsteer.steer",
            )
        const = {
            "add": scale * self.norm,
            "ablate": 0.0,
            "affine": (self.offset or 0.0) + scale * self.norm,
        }.get(operation or "add", scale)
        gain, lo, hi = VECTOR_OPERATIONS[operation or "add"]
        return const, gain, lo, hi


def rows_of(item: SteeringVector | ClampFeature) -> TableRows:
    """The table rows of a vector or of a feature clamp; each request chooses its own scope.

    Raises:
        HookpointError: The hookpoint is within a block.
        SteeringError: The vector is zero.
        PairingError: No row can read the features of the clamp's SAE (topk, normalised input).
    """
    if isinstance(item, SteeringVector):
        unit, norm = unit_and_norm(item.direction.detach())
        one = torch.ones(1)
        offset = None if item.reference is None else float(unit @ item.reference.detach())
        row = unit[None]
        inf = one * math.inf
        rows = TableRows(item.hookpoint, row, row, one * 0, -inf, one, one, -inf, inf, float(norm), offset)
    else:
        rows = _rows_of_clamp(item.detach())
    _ = rows.layer  # refuses a hookpoint within a block
    return rows


def _rows_of_clamp(clamp: ClampFeature) -> TableRows:
    sae = clamp.sae
    if sae.reads is not None:
        raise PairingError(
            f"a feature clamp of a transcoder, which reads at {sae.reads}",
            "a clamp of an SAE that reads where it steers",
            "vLLM computes the inside of a block in fused steps: steer with fgsteer.steer, or serve the features' "
            "directions as a vector (from_features)",
        )
    if sae.activation == "topk" or sae.input_norm != "none":
        kind = "a topk SAE" if sae.activation == "topk" else f"an SAE with input_norm={sae.input_norm!r}"
        raise PairingError(
            f"a feature clamp of {kind}",
            'a clamp of a relu, jumprelu or gated SAE with input_norm="none"',
            "rows of a table read single features of single tokens only: serve the features' directions as a vector "
            "instead (from_features)",
        )
    terms = clamp.terms()
    part = sae.restrict([feature for feature, *_ in terms])
    read, bias, threshold = part.W_enc.T.float(), part.b_enc.float(), torch.zeros(len(terms))
    if part.threshold is not None and sae.activation == "jumprelu":
        threshold = part.threshold.float().clamp(min=0)
    if part.gate_bias is not None and part.gate_scale is not None:  # open where pre > −gate_bias; reads pre·scale + b
        scale = part.gate_scale.float()
        if not bool((scale > 0).all()):
            raise PairingError(
                "a gated SAE with a gate_scale of 0 or less",
                "positive gate scales",
                "a threshold cannot express its gate: serve the features' directions as a vector (from_features)",
            )
        read, threshold = read * scale[:, None], (bias - scale * part.gate_bias.float()).clamp(min=0)
    target, lam, lo, hi = (torch.tensor([float(term[n]) for term in terms]) for n in (1, 2, 3, 4))
    return TableRows(clamp.hookpoint, read, part.W_dec.float(), bias, threshold, target, lam, lo, hi)


def save_clamp(clamp: ClampFeature, path: str | Path) -> None:
    """Write a feature clamp as a file that a server loads as it does vectors.

    Args:
        clamp: The clamp, at the output of a block.
        path: The file to write, such as "wedding-clamp.safetensors".

    Raises:
        HookpointError: The hookpoint is within a block.
        PairingError: A server cannot clamp features of this SAE (topk, normalised input).
        FormatError: The file cannot be written.
    """
    edits = {name: {str(j): float(t) for j, t in given.items()} for name, given in clamp.detach().edits.items()}
    header = {"hookpoint": str(clamp.hookpoint), **edits}
    write_tensors(path, rows_of(clamp).tensors, kind="clamp", header=header)


def load_rows(path: str | Path) -> TableRows:
    """Load the file of a vector or of a clamp. Raises FormatError for another file, and as ``rows_of`` does."""
    tensors, header = read_tensors(path, kind=None)
    if header["kind"] == "vector":
        return rows_of(SteeringVector.load(path))
    if header["kind"] != "clamp":
        raise FormatError(
            f"{path} holds {a(header['kind'])}.",
            "a steering vector, or a feature clamp",
            "build a vector with fgsteer build, or write a clamp with fgsteer.serving.save_clamp",
        )
    with refuse_damaged(path, "a file written by save_clamp"):
        rows = TableRows(Hookpoint.from_name(header["hookpoint"]), **_parse_tensors(tensors))
        _ = rows.layer
    return rows


def _parse_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The tensors of a clamp's file. Raises KeyError, ValueError."""
    added = {name: torch.full_like(tensors["target"], value) for name, value in ADDED.items() if name not in tensors}
    found = {name: {**tensors, **added}[name].float() for name in TENSORS}
    read, write, *columns = found.values()
    if read.ndim != 2 or not read.numel() or write.shape != read.shape:
        raise ValueError("shapes differ")
    if {column.shape for column in columns} != {read.shape[:1]}:
        raise ValueError("shapes differ")
    for name, part in found.items():
        if bool(part.isnan().any()) or (name not in ("lo", "hi") and not bool(part.isfinite().all())):
            raise ValueError("it holds nan or inf")
    if bool((found["lo"] > found["hi"]).any()):
        raise ValueError("a lower bound is above an upper one")
    return found


Source = SteeringVector | ClampFeature | TableRows | str | Path


def rows_from(source: Source) -> TableRows:
    """The rows of a vector, a clamp or a file of either. Raises as ``rows_of`` and ``load_rows`` do."""
    if isinstance(source, TableRows):
        return source
    return load_rows(source) if isinstance(source, str | Path) else rows_of(source)


def rows_by_name(vectors: Mapping[str, Source] | str | Path) -> dict[str, TableRows]:
    """{name: rows} of a mapping, or of the files ``NAME.safetensors`` in a folder.

    Raises FormatError for a missing folder or another kind of file, and as ``check_name`` and ``rows_of`` do.
    """
    if isinstance(vectors, Mapping):
        return {check_name(name): rows_from(item) for name, item in vectors.items()}
    folder = Path(vectors)
    if not folder.is_dir():
        raise FormatError(
            f"There is no folder {folder}.",
            "a folder with files named NAME.safetensors",
            "correct the folder of vectors",
        )
    return {check_name(path.stem): load_rows(path) for path in sorted(folder.glob("*.safetensors"))}
