"""What a server keeps of a vector or a feature clamp: rows of one layer's table.

Every intervention at a block's output is k rows that read and write, and two numbers
that a request chooses:

    h' = h + Σⱼ (const·targetⱼ + gain·actⱼ) · writeⱼ,   actⱼ = sⱼ where sⱼ = readⱼ·h + biasⱼ > thresholdⱼ, else 0

A vector is one row with read = write = v̂: add, ablate, clamp and affine differ in the
numbers only, so one loaded file serves them all.

    serve(SteeringVector.load("love.safetensors")).amounts("add", 2.0)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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

ROWS = ("read", "write", "bias", "threshold", "target")
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")


def check_name(name: object) -> str:
    """The name, if it can be one: 1 to 64 of ``A–Z a–z 0–9 _ - .``, the first no dot. Raises SteeringError."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = ascii(name[:64]) if isinstance(name, str) else a(type(name).__name__)
        raise SteeringError(
            f"the name {shown}", "1 to 64 letters, digits, underscores, hyphens and dots, the first of them no dot"
        )
    return name


@dataclass(frozen=True, eq=False)
class Served:
    """Table rows of one intervention: ``read``, ``write`` (k, d_model), ``bias``, ``threshold``, ``target`` (k,).

    ``norm`` is the vector's, ``offset`` its reference's projection r̂·r⁻, where it has
    one; a feature clamp has neither.
    """

    hookpoint: Hookpoint
    read: Float[Tensor, "k d_model"]
    write: Float[Tensor, "k d_model"]
    bias: Float[Tensor, " k"]
    threshold: Float[Tensor, " k"]
    target: Float[Tensor, " k"]
    norm: float | None = None
    offset: float | None = None

    @property
    def layer(self) -> int:
        """The block after which it acts. Raises HookpointError for a place within a block."""
        site, layer = self.hookpoint.site, self.hookpoint.layer
        if site == "resid_post" or (site == "resid_pre" and layer > 0):
            return layer if site == "resid_post" else layer - 1
        raise HookpointError(
            f"serving at {self.hookpoint}", "the output of a block", "vLLM fuses what is within blocks: use resid_post"
        )

    @cached_property
    def sha256(self) -> str:
        """Hash of what it does."""
        tensors = (getattr(self, name) for name in ROWS)
        return text_sha256([tensor_sha256(*tensors), self.layer, self.norm, self.offset])

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The rows by name, in float32; no two share storage, so that they can be written."""
        return {name: getattr(self, name).to(torch.float32, copy=True).contiguous() for name in ROWS}

    @cached_property
    def _reach(self) -> tuple[float, float]:
        """The most that an entry changes by const = 1, and by what all rows read of a stream of norm 1."""
        read, write, bias, target = (getattr(self, n).double() for n in ("read", "write", "bias", "target"))
        amounts = torch.stack([target.abs(), read.norm(dim=1) + bias.abs()])
        by_const, by_read = (amounts @ write.abs()).amax(1).tolist()
        return by_const, by_read

    def check(self, dtype: torch.dtype) -> None:
        """Raises SteeringError for rows, a norm or a reference beyond what activations of a dtype can take."""
        width, (by_const, by_read) = self.read.shape[1], self._reach
        entries = torch.cat([getattr(self, name).flatten().double() for name in ROWS if name != "threshold"])
        strength = 1.0 if self.norm is None else self.norm
        for what, amount in (
            ("a row", float(entries.abs().amax())),
            ("a row", by_read),
            ("a vector or a clamp at strength 1", strength * by_const),
            ("a reference", abs(self.offset or 0.0) * by_const),
        ):
            check_amount(amount, dtype, width, what)

    def check_const(self, const: float, dtype: torch.dtype) -> None:
        """Raises SteeringError for an amount of a request beyond what activations of a dtype can take."""
        within = abs(const) * max(1.0, float(self.target.abs().amax())) <= torch.finfo(torch.float32).max
        check_amount(abs(const) * self._reach[0] if within else math.inf, dtype, self.read.shape[1], "a request")

    def amounts(self, operation: str | None, scale: float) -> tuple[float, float]:
        """(const, gain) of an operation: add's coefficient, clamp's target or affine's alpha is ``scale``.

        A feature clamp has no operation, and ``scale`` multiplies its targets.
        Raises SteeringError for one that this cannot do.
        """
        if self.norm is None:
            if operation is not None:
                raise SteeringError(f"operation {operation!r} on a feature clamp", "none")
            return scale, -1.0
        if operation == "affine" and self.offset is None:
            raise SteeringError("affine with a vector without a reference", "one built by ace()", "or clamp")
        if operation == "ablate" and scale != 1.0:
            raise SteeringError(f"ablate with scale {scale}", "none: ablation has no strength")
        if operation in ("add", None):
            return scale * self.norm, 0.0
        known = {"ablate": 0.0, "clamp": scale, "affine": (self.offset or 0.0) + scale * self.norm}
        if operation not in known:
            raise SteeringError(f"operation {operation!r}", "add, ablate, clamp or affine")
        return known[operation], -1.0


def serve(item: SteeringVector | ClampFeature) -> Served:
    """The table rows of a vector or of a feature clamp, whose scope each request chooses anew.

    Raises HookpointError for a place within a block, SteeringError for a zero vector,
    PairingError for an SAE whose features no row can read (topk, normalised input).
    """
    if isinstance(item, SteeringVector):
        unit, norm = unit_and_norm(item.direction.detach())
        one = torch.ones(1)
        offset = None if item.reference is None else float(unit @ item.reference.detach())
        row = unit[None]
        served = Served(item.hookpoint, row, row, one * 0, one * -math.inf, one, float(norm), offset)
    else:
        served = _serve_clamp(item.detach())
    _ = served.layer
    return served


def _serve_clamp(clamp: ClampFeature) -> Served:
    sae = clamp.sae
    if sae.activation == "topk" or sae.input_norm != "none":
        what = "a topk SAE" if sae.activation == "topk" else f"an SAE with input_norm {sae.input_norm}"
        raise PairingError(
            f"serving a clamp of {what}", "relu, jumprelu or gated, on inputs as they are", "add its directions instead"
        )
    part = sae.restrict(list(clamp.targets))
    read, bias, zero = part.W_enc.T.float(), part.b_enc.float(), torch.zeros(len(clamp.targets))
    threshold = zero
    if part.threshold is not None and sae.activation == "jumprelu":
        threshold = part.threshold.float().clamp(min=0)
    if part.gate_bias is not None and part.gate_scale is not None:  # gate open: pre > −gate_bias, pre·scale + b is read
        scale = part.gate_scale.float()
        if not bool((scale > 0).all()):
            raise PairingError("a gated SAE with a gate_scale ≤ 0", "positive ones")
        read, threshold = read * scale[:, None], (bias - scale * part.gate_bias.float()).clamp(min=0)
    target = torch.tensor(list(clamp.targets.values()))
    return Served(clamp.hookpoint, read, part.W_dec.float(), bias, threshold, target)


def save_clamp(clamp: ClampFeature, path: str | Path) -> None:
    """Write a feature clamp as a file that a server loads beside vectors. Raises as ``serve`` does."""
    header = {
        "hookpoint": str(clamp.hookpoint),
        "targets": {str(j): float(t) for j, t in clamp.detach().targets.items()},
    }
    write_tensors(path, serve(clamp).tensors, kind="clamp", header=header)


def read_served(path: str | Path) -> Served:
    """Read a vector's file or a clamp's. Raises FormatError for another, and as ``serve`` does."""
    tensors, header = read_tensors(path, kind=None)
    if header["kind"] == "vector":
        return serve(SteeringVector.load(path))
    if header["kind"] != "clamp":
        raise FormatError(f"{path} holds {header['kind']}", "a vector or a clamp")
    with refuse_damaged(path, "a file written by save_clamp"):
        read, write, bias, threshold, target = (tensors[name].float() for name in ROWS)
        if (
            read.ndim != 2
            or not read.numel()
            or write.shape != read.shape
            or {bias.shape, threshold.shape, target.shape} != {read.shape[:1]}
        ):
            raise ValueError("shapes differ")
        if not all(bool(part.isfinite().all()) for part in (read, write, bias, threshold, target)):
            raise ValueError("it holds nan or inf")
        served = Served(Hookpoint.from_name(header["hookpoint"]), read, write, bias, threshold, target)
        _ = served.layer
    return served


Source = SteeringVector | ClampFeature | Served | str | Path


def served_from(source: Source) -> Served:
    """What to serve, of a vector, a clamp or a file. Raises as ``serve`` and ``read_served`` do."""
    if isinstance(source, Served):
        return source
    return read_served(source) if isinstance(source, str | Path) else serve(source)


def sources(vectors: Mapping[str, Source] | str | Path) -> dict[str, Served]:
    """What to serve by name: of a mapping, or of a folder's files ``NAME.safetensors``.

    Raises FormatError for a missing folder or another kind of file, and as ``check_name`` and ``serve`` do.
    """
    if isinstance(vectors, Mapping):
        return {check_name(name): served_from(item) for name, item in vectors.items()}
    folder = Path(vectors)
    if not folder.is_dir():
        raise FormatError(f"no folder {folder}", "a folder of NAME.safetensors files")
    return {check_name(path.stem): read_served(path) for path in sorted(folder.glob("*.safetensors"))}
