"""What is served under one name: a vector, an intervention, several that compose, or a file of any of them.

A name stands for stages, which act one after the other. A stage has rows at one layer or at several, which act on the
same tokens, so that a vector at every layer takes one slot of a request's plan.

    stages_by_name("vectors") has the files NAME.safetensors of a folder, by name
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgsteer.errors import FormatError, SteeringError
from fgsteer.errors.wording import a
from fgsteer.interventions import ClampFeature, Intervention
from fgsteer.interventions.cached import SteeringItem
from fgsteer.interventions.files import FILE_KIND, load_steering
from fgsteer.interventions.scopes import Scope, counted
from fgsteer.interventions.token_scopes import parse_scope
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.sae import SAE
from fgsteer.serving.converting import check_intervention, rows_of
from fgsteer.serving.rows import TENSORS, Amounts, TableRows, check_name
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors
from fgsteer.storage.json_files import text_sha256
from fgsteer.vector import SteeringVector

ADDED = {"lam": 1.0, "lo": -math.inf, "hi": math.inf}  # what rows have in files of earlier versions


@dataclass(frozen=True, eq=False)
class Stage:
    """Rows at different layers that act in one step, on the same tokens and by the same amounts.

    A request may choose another ``scope`` and ``bos``.
    """

    rows: tuple[TableRows, ...]
    scope: Scope = "all"
    bos: bool = False

    @property
    def layers(self) -> list[int]:
        """The layers at whose output it acts."""
        return [rows.layer for rows in self.rows]

    @property
    def is_late(self) -> bool:
        """Whether it acts after what else acts at its layers, at the input of the next block."""
        return self.rows[0].is_late

    @cached_property
    def sha256(self) -> str:
        """Hash of everything that its rows do."""
        return text_sha256([rows.sha256 for rows in self.rows])

    def amounts(self, operation: str | None, scale: float, dtype: torch.dtype) -> Amounts:
        """The numbers of an operation. Raises SteeringError as ``TableRows.amounts`` and ``check_amounts`` do."""
        amounts = self.rows[0].amounts(operation, scale)
        for rows in self.rows:
            rows.check_amounts(amounts, dtype)
        return amounts


Source = SteeringVector | Intervention | Sequence[SteeringItem] | Sequence[Stage] | TableRows | str | Path


MAX_RUNS = 4
"""How many runs of neighbouring tokens a scope may hold in an engine."""


def check_runs(scope: Scope, what: str) -> Scope:
    """The scope, if its tokens are few runs. Raises SteeringError for positions that are scattered."""
    counts = counted(scope)
    if counts is not None and counts[0] == "at" and len(runs := runs_of(counts[1])) > MAX_RUNS:
        raise SteeringError(
            f"{what} = {scope}, which is {len(runs)} runs of positions",
            f"at most {MAX_RUNS} runs of neighbouring positions",
            "steer scattered positions with fgsteer.steer",
        )
    return scope


def runs_of(positions: Iterable[int]) -> list[tuple[int, int]]:
    """The runs (first, end) of neighbouring positions, where the end is not one of them."""
    runs: list[tuple[int, int]] = []
    for position in sorted(set(positions)):
        if runs and runs[-1][1] == position:
            runs[-1] = runs[-1][0], position + 1
        else:
            runs.append((position, position + 1))
    return runs


def save_clamp(clamp: ClampFeature, path: str | Path) -> None:
    """Write a feature clamp as a file that a server loads without the clamp's SAE.

    A TopK SAE's features compete, so the server needs the SAE too (``--sae``, or ``saes=``). Other interventions are
    written by ``fgsteer.save_steering``.

    Args:
        clamp: The clamp, at the output of a block.
        path: The file to write, such as "wedding-clamp.safetensors".

    Raises:
        HookpointError: The hookpoint is within a block.
        PairingError: A server cannot clamp features of this SAE (normalised input).
        SteeringError: The clamp has a gate, or a scope of single positions.
        FormatError: The file cannot be written.
    """
    rows = rows_of(clamp)
    if rows.conditions:
        raise SteeringError("a clamp with a gate (when=…)", "a clamp that always acts", "use fgsteer.save_steering")
    header: dict[str, Any] = {"hookpoint": str(clamp.hookpoint), "scope": str(check_runs(clamp.scope, "scope"))}
    header["bos"] = clamp.bos
    header |= {name: {str(j): float(t) for j, t in given.items()} for name, given in clamp.detach().edits.items()}
    if rows.sae:
        header |= {"features": list(rows.features), "sae": rows.sae}
    write_tensors(path, rows.tensors, kind="clamp", header=header)


def load_stages(path: str | Path, saes: Sequence[SAE] = ()) -> tuple[Stage, ...]:
    """Load a file of a vector, of a clamp, or of ``fgsteer.save_steering``.

    Raises FormatError for another file, PairingError for the features of an SAE that is not among ``saes``, and as
    ``rows_of`` does.
    """
    tensors, header = read_tensors(path, kind=None)
    if header["kind"] == "vector":
        return (Stage((rows_of(SteeringVector.load(path)),)),)
    if header["kind"] == FILE_KIND:
        return stages_from(load_steering(path, saes))
    if header["kind"] != "clamp":
        raise FormatError(
            f"{path} holds {a(header['kind'])}.",
            "a steering vector, a feature clamp, or interventions",
            "build a vector with fgsteer build, or write interventions with fgsteer.save_steering",
        )
    with refuse_damaged(path, "a file written by save_clamp"):
        rows = TableRows(Hookpoint.from_name(header["hookpoint"]), **_parse_tensors(tensors), **_parse_topk(header))
        if rows.features and len(rows.features) != len(rows.bias):
            raise ValueError("it has other numbers of rows and features")
        _ = rows.layer
        scope, bos = check_runs(parse_scope(header.get("scope", "all")), "scope"), header.get("bos", False)
        if not isinstance(bos, bool):
            raise ValueError("bos is neither true nor false")
    return (Stage((rows,), scope, bos),)


def _parse_topk(header: Mapping[str, Any]) -> dict[str, Any]:
    """The features and the SAE of a clamp's file, where the SAE is TopK. Raises ValueError."""
    features, sae = header.get("features", []), header.get("sae", "")
    if not isinstance(sae, str) or not isinstance(features, list) or bool(sae) != bool(features):
        raise ValueError("its features are not those of an SAE")
    if not all(isinstance(j, int) and not isinstance(j, bool) and 0 <= j < 1 << 24 for j in features):
        raise ValueError("a feature is no whole number")
    return {"features": tuple(features), "sae": sae}


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


def _stages_of(items: Sequence[Intervention]) -> tuple[Stage, ...]:
    """Interventions as few stages: each joins the first stage that may be its own, after all that act at its layer."""
    stages: list[list[tuple[TableRows, Intervention]]] = []

    def kind(rows: TableRows, item: Intervention) -> tuple[Any, ...]:
        return rows.is_late, item.scope, item.bos, rows.scaled, rows.mode

    for rows, item in sorted(((rows_of(item), item) for item in items), key=lambda pair: pair[0].is_late):
        check_runs(item.scope, "scope")
        busy = [n for n, stage in enumerate(stages) if rows.layer in [other.layer for other, _ in stage]]
        later = range(max(busy, default=-1) + 1, len(stages))
        place = next((n for n in later if kind(*stages[n][0]) == kind(rows, item)), None)
        if place is None:
            stages.append([(rows, item)])
        else:
            stages[place].append((rows, item))
    return tuple(Stage(tuple(rows for rows, _ in stage), stage[0][1].scope, stage[0][1].bos) for stage in stages)


def stages_from(source: Source, saes: Sequence[SAE] = ()) -> tuple[Stage, ...]:
    """The stages of a vector, interventions or a file of them. Raises as ``rows_of`` and ``load_stages`` do."""
    if isinstance(source, str | Path):
        return load_stages(source, saes)
    if isinstance(source, TableRows | SteeringVector):
        return (Stage((source if isinstance(source, TableRows) else rows_of(source),)),)
    items = [source] if isinstance(source, Intervention) else list(source)
    if not items:
        raise SteeringError("an empty list", "at least one intervention", "pass what steers, such as vec.add(8.0)")
    stages = tuple(item for item in items if isinstance(item, Stage))
    for item in items:
        if not isinstance(item, Stage):
            check_intervention(item)
    interventions = [item for item in items if isinstance(item, Intervention)]
    if len(items) not in (len(stages), len(interventions)):
        kinds = ", ".join(sorted({type(item).__name__ for item in items}))
        raise SteeringError(f"a list of {kinds}", "a list of interventions", "pass [vec.add(8.0)] for [vec]")
    return stages or _stages_of(interventions)


def stages_by_name(
    vectors: Mapping[str, Source] | str | Path, saes: Sequence[SAE] = ()
) -> dict[str, tuple[Stage, ...]]:
    """{name: stages} of a mapping, or of the files ``NAME.safetensors`` in a folder.

    Raises FormatError for a missing folder or another kind of file, and as ``check_name`` and ``rows_of`` do.
    """
    if isinstance(vectors, Mapping):
        return {check_name(name): stages_from(item, saes) for name, item in vectors.items()}
    folder = Path(vectors)
    if not folder.is_dir():
        raise FormatError(
            f"There is no folder {folder}.",
            "a folder with files named NAME.safetensors",
            "correct the folder of vectors",
        )
    return {check_name(path.stem): load_stages(path, saes) for path in sorted(folder.glob("*.safetensors"))}
