"""Steering in a file: interventions with their scopes and gates, as tensors and JSON.

    save_steering("polite.safetensors", [vec.add(8.0, when=Feature(sae, 123) > 2.0), other.clamp(at_most=5.0)])
    steering = load_steering("polite.safetensors", saes=[sae])

SAEs are not in the file, which names them by their hash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import and_, or_
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from fgsteer.errors import PairingError, SteeringError
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import a
from fgsteer.interventions.adding import AdaptiveAdd, Add, AddByPrompt, AddKeepingNorm, AddRelative
from fgsteer.interventions.cached import CacheSteering, SteeringItem
from fgsteer.interventions.features import ClampFeature
from fgsteer.interventions.gates import Both, Condition, Either, Gate, Not, Reading
from fgsteer.interventions.projecting import Ablate, Affine, Clamp, ClampSubspace, SubtractProjection
from fgsteer.interventions.readings import Cosine, Feature, Preview, Probe, Projection, TanhCosine
from fgsteer.interventions.remapping import Remap
from fgsteer.interventions.rotating import Rotate
from fgsteer.interventions.scaling import Scale
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.fingerprints import sae_identity
from fgsteer.saes.sae import SAE
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors
from fgsteer.storage.json_files import text_sha256

FILE_KIND = "steering"
_KEEP = "only these can be loaded again; keep your own class in your code"
_ADDING = (Add, AddRelative, AddKeepingNorm, AdaptiveAdd, AddByPrompt)
_PROJECTING = (Ablate, Affine, Clamp, ClampSubspace, SubtractProjection)
_KINDS = (*_ADDING, *_PROJECTING, ClampFeature, Rotate, Remap, Scale, CacheSteering)
_READINGS = (Cosine, Feature, Preview, Probe, Projection, TanhCosine)
KINDS: dict[str, type[SteeringItem]] = {kind.__name__: kind for kind in _KINDS}
_HASHES: WeakKeyDictionary[SAE, str] = WeakKeyDictionary()
READINGS: dict[str, type[Reading]] = {kind.__name__: kind for kind in _READINGS}
# what a reading knows of what else it is made of
_DERIVED: dict[type[Reading], tuple[str, ...]] = {Feature: ("hookpoint",), Preview: ("hookpoint", "pooling")}


@dataclass
class _Writer:
    """Turns values into JSON, and collects the tensors that these name."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # by the id of a tensor, which several may share

    def value(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not value.ndim:
            return float(value.detach())
        if isinstance(value, Tensor):
            name = self.names.setdefault(id(value), f"tensor_{len(self.tensors)}")
            self.tensors[name] = value
            return {"tensor": name}
        if isinstance(value, Hookpoint):
            return str(value)
        if isinstance(value, SAE):
            return {"sae": steering_sae_sha256(value)}
        if isinstance(value, Gate):
            return self.gate(value)
        if isinstance(value, Reading):
            return self.reading(value)
        if isinstance(value, Mapping):
            return {str(key): self.value(entry) for key, entry in value.items()}
        if isinstance(value, tuple):
            return [self.value(entry) for entry in value]
        return value

    def fields_of(self, item: Any) -> dict[str, Any]:
        values = {f.name: getattr(item, f.name) for f in fields(item) if f.init}
        return {name: self.value(value) for name, value in values.items() if value is not None}

    def intervention(self, item: SteeringItem) -> dict[str, Any]:
        if KINDS.get(type(item).__name__) is not type(item):
            raise SteeringError(
                f"{a(type(item).__name__)}, an intervention of your own",
                f"one of {', '.join(KINDS)}",
                _KEEP,
            )
        return {"kind": type(item).__name__, **self.fields_of(item)}

    def gate(self, gate: Gate) -> dict[str, Any]:
        if isinstance(gate, Both | Either):
            kind = Both if isinstance(gate, Both) else Either
            return {"all" if kind is Both else "any": [self.gate(part) for part in _parts(gate, kind)]}
        if isinstance(gate, Not):
            return {"not": self.gate(gate.gate)}
        if not isinstance(gate, Condition):
            raise SteeringError(
                f"a gate of the class {type(gate).__name__}", "readings that are compared and combined", _KEEP
            )
        return {
            "reading": self.reading(gate.reading),
            "threshold": gate.threshold,
            "fires_above": gate.fires_above,
        }

    def reading(self, reading: Reading) -> dict[str, Any]:
        if READINGS.get(type(reading).__name__) is not type(reading):
            raise SteeringError(
                f"{a(type(reading).__name__)}, a reading of your own",
                f"one of {', '.join(READINGS)}",
                _KEEP,
            )
        return {"kind": type(reading).__name__, **self.fields_of(reading)}


@dataclass
class _Loader:
    """Turns JSON into values again, given the tensors of the file and the SAEs of the caller by hash."""

    tensors: Mapping[str, Tensor]
    saes: Mapping[str, SAE]

    def value(self, name: str, value: Any) -> Any:
        if name == "when":
            return self.gate(value)
        if isinstance(value, dict) and set(value) == {"tensor"}:
            return self.tensors[value["tensor"]]
        if isinstance(value, dict) and set(value) == {"sae"}:
            return self.saes[value["sae"]]
        if name == "reading":
            return self.reading(value)
        if name == "readings":
            return [self.reading(entry) for entry in value]
        if isinstance(value, dict):
            return {int(key): entry for key, entry in value.items()}
        return value

    def arguments(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        return {name: self.value(name, value) for name, value in entry.items() if name != "kind"}

    def intervention(self, entry: Mapping[str, Any]) -> SteeringItem:
        return KINDS[entry["kind"]](**self.arguments(entry))

    def gate(self, entry: Mapping[str, Any]) -> Gate:
        if "all" in entry or "any" in entry:
            join = and_ if "all" in entry else or_
            return reduce(join, [self.gate(part) for part in entry.get("all", entry.get("any"))])
        if "not" in entry:
            return ~self.gate(entry["not"])
        return Condition(self.reading(entry["reading"]), entry["threshold"], entry["fires_above"])

    def reading(self, entry: Mapping[str, Any]) -> Reading:
        kind, arguments = READINGS[entry["kind"]], self.arguments(entry)
        for name in _DERIVED.get(kind, ()):
            arguments.pop(name, None)
        return kind(**arguments)


def _parts(gate: Gate, kind: type[Both] | type[Either]) -> list[Gate]:
    """What one kind of gate combines, over any number of its own kind."""
    parts, rest = [], [gate]
    while rest:
        one = rest.pop()
        if isinstance(one, kind):
            rest += [one.second, one.first]
        else:
            parts.append(one)
    return parts


def _needed(value: Any) -> list[str]:
    """The hashes of the SAEs that some JSON names."""
    if isinstance(value, dict):
        own = [value["sae"]] if set(value) == {"sae"} and isinstance(value["sae"], str) else []
        return [*own, *(sha256 for entry in value.values() for sha256 in _needed(entry))]
    return [sha256 for entry in value for sha256 in _needed(entry)] if isinstance(value, list) else []


def steering_sae_sha256(sae: SAE) -> str:
    """The hash by which a file of steering names an SAE: of what it computes with, and where. It is made once."""
    if sae not in _HASHES:
        _HASHES[sae] = text_sha256(sae_identity(sae))
    return _HASHES[sae]


@checked
def save_steering(path: str | Path, steering: SteeringItem | Sequence[SteeringItem]) -> None:
    """Write interventions that compose, with their scopes and gates, to one file of tensors and JSON.

    Args:
        path: The file to write; one that is there is replaced, and never left half written.
        steering: An intervention or a CacheSteering, or a list of them in the order in which they act.

    Raises:
        SteeringError: There is none, or one is of a class that fgsteer does not have.
        FormatError: The file cannot be written.
    """
    items = [steering] if isinstance(steering, SteeringItem) else list(steering)
    if not items:
        raise SteeringError("an empty list", "at least one intervention", "pass what steers, such as vec.add(8.0)")
    writer = _Writer()
    entries = [writer.intervention(item) for item in items]
    write_tensors(path, writer.tensors, kind=FILE_KIND, header={"interventions": entries})


@checked
def load_steering(path: str | Path, saes: Sequence[SAE] = ()) -> list[SteeringItem]:
    """Load a file that ``save_steering`` wrote.

    Args:
        path: The file.
        saes: The SAEs whose features it reads or changes.

    Returns:
        The interventions, for ``steering=``.

    Raises:
        FormatError: The file is missing, damaged, or of another kind.
        PairingError: An SAE that it needs is not among ``saes``.
    """
    tensors, header = read_tensors(path, kind=FILE_KIND)
    by_hash = {steering_sae_sha256(sae): sae for sae in saes}
    if missing := [sha256 for sha256 in _needed(header.get("interventions")) if sha256 not in by_hash]:
        raise PairingError(
            f"SAEs with the hashes {', '.join(key[:12] for key in by_hash) or 'none'}",
            f"the SAE with the hash {missing[0][:12]}, whose features this steering reads or changes",
            "pass it with saes=[sae], in the command line with --sae and --sae-id",
        )
    loader = _Loader(tensors, by_hash)
    with refuse_damaged(path, "a file written by save_steering"):
        return [loader.intervention(entry) for entry in header["interventions"]]
