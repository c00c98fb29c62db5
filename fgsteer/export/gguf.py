"""Control vectors in GGUF: what llama.cpp, repeng and EasySteer read.

    write([vec.add(8.0, bos=True)], "love.gguf")         llama-cli --control-vector love.gguf …
    [vector] = read("love.gguf")

``direction.N`` is added to the output of block N, at every token. A file keeps no strength: it is
baked into the directions, and what was baked stands in the metadata under ``fgsteer.header``.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fgsteer.errors import FgsteerError, FormatError, PairingWarning, SteeringError
from fgsteer.errors.checks import warn
from fgsteer.export.places import Interventions, block_output, called, checked, every_token
from fgsteer.interventions import Add
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.json_files import parse_json, text_sha256
from fgsteer.vector import SteeringVector

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
ARCHITECTURE = "controlvector"
HEADER_BYTES = 1 << 24  # of metadata and tensor names: a control vector has some kilobytes
_UINT32, _INT32, _STRING, _ARRAY = 4, 5, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def write(interventions: Interventions, path: str | Path, *, model_type: str = "") -> None:
    """Write ``direction.ℓ = Σ c·v`` for the Adds at the output of each block ℓ ≥ 1, in float32.

    ``model_type`` is the Hugging Face one ("llama"), a hint that engines show and do not check.
    Raises SteeringError for what llama.cpp cannot say: another intervention than Add, a scope, a
    spared position 0, block 0, another site than the residual stream; PairingError for two models.
    """
    items = checked(interventions)
    directions: dict[int, Tensor] = {}
    for item in items:
        if not isinstance(item, Add):
            raise SteeringError(
                called(item),
                "an Add: llama.cpp does nothing else to a control vector",
                "export to lm-eval or EasySteer, or steer here: fgsteer.steer",
            )
        every_token(item, "llama.cpp")
        layer = block_output(item, "llama.cpp")
        if layer == 0:
            raise SteeringError(
                f"an Add at {item.hookpoint}",
                "one at the output of block 1 or later: llama.cpp has no control vector for block 0",
                "build the vector at a later block, or export to EasySteer",
            )
        baked = item.coefficient * item.direction.double().cpu()
        directions[layer] = directions[layer] + baked if layer in directions else baked
    applied = [_record(item, float(item.coefficient)) for item in items if isinstance(item, Add)]
    write_directions(path, directions, model_type=model_type, model_name=items[0].model_name, applied=applied)


def _record(item: Add, coefficient: float) -> dict[str, Any]:
    """What the file remembers of an Add whose coefficient was baked in."""
    sha256 = tensor_sha256(item.direction)
    return {"hookpoint": str(item.hookpoint), "coefficient": coefficient, "direction_sha256": sha256}


def write_directions(
    path: str | Path,
    directions: Mapping[int, Tensor],
    *,
    model_type: str,
    model_name: str,
    applied: list[dict[str, Any]],
) -> None:
    """Write {block: direction (d_model,)} as they are. Raises SteeringError for one that is not finite in float32."""
    rows = {layer: directions[layer].to("cpu", torch.float32) for layer in sorted(directions)}
    for layer, row in rows.items():
        if not bool(torch.isfinite(row).all()):
            raise SteeringError(f"a direction of block {layer} that overflows float32", "a smaller coefficient")
    header = json.dumps({"model": model_name, "baked": applied, "sha256": _sha256(rows)}, ensure_ascii=False)
    metadata = (
        _text("general.architecture") + _kind(_STRING) + _text(ARCHITECTURE),
        _text("controlvector.model_hint") + _kind(_STRING) + _text(model_type),
        _text("controlvector.layer_count") + _kind(_UINT32) + struct.pack("<I", len(rows)),
        _text("fgsteer.header") + _kind(_STRING) + _text(header),
    )
    infos, parts, offset = b"", [], 0
    for layer, row in rows.items():
        infos += _text(f"direction.{layer}") + struct.pack("<IQIQ", 1, len(row), 0, offset)
        data = row.contiguous().numpy().astype("<f4").tobytes()
        parts.append(data + bytes(-len(data) % ALIGNMENT))
        offset += len(parts[-1])
    head = MAGIC + struct.pack("<IQQ", VERSION, len(rows), len(metadata)) + b"".join(metadata) + infos
    with atomic_write(path) as beside:
        beside.write_bytes(head + bytes(-len(head) % ALIGNMENT) + b"".join(parts))


def _sha256(rows: Mapping[int, Tensor]) -> str:
    """Hash of directions by block."""
    return text_sha256([[layer, tensor_sha256(rows[layer])] for layer in sorted(rows)])


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(kind: int) -> bytes:
    return struct.pack("<I", kind)


def read(path: str | Path) -> list[SteeringVector]:
    """The vectors of a control-vector file, by block: ``vector.add(1.0, bos=True)`` is what llama.cpp does at scale 1.

    Reads what this module, repeng, EasySteer and llama.cpp's own generator write, in float32, float16,
    bfloat16 or float64. Every size is held against the file's length before it is used. Raises FormatError
    for anything else; warns PairingWarning of a file that looks like llama.cpp's generator's.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            metadata, entries, start = _header(_Cursor(file.read(HEADER_BYTES), path))
            _check_room(entries, start, size, path)
            rows = {layer: _row(file, start, entry) for layer, entry in entries.items()}
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    return _vectors(path, metadata, rows)


@dataclass(frozen=True)
class _Entry:
    """Where a direction lies: its length, dtype and offset from the start of the data."""

    length: int
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


class _Cursor:
    """Little-endian values from a header's bytes. Raises FormatError where they end early."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            cut = len(self.data) < HEADER_BYTES
            raise FormatError(
                f"{self.path} ends inside its header" if cut else f"the header of {self.path} is over 16 MiB",
                "a whole control vector",
            )
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path} holds a string that is not UTF-8") from error

    def value(self, kind: int) -> Any:
        """A value of the kind; None for an array, which is passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise FormatError(f"{self.path} holds a value of kind {kind}", "0 to 12")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            for _ in range(count):  # ends with the header at the latest: each takes eight bytes
                self.take(self.number("Q"))
        else:
            raise FormatError(f"{self.path} holds an array of kind {inner}", "numbers or strings")
        return None


def _header(cursor: _Cursor) -> tuple[dict[str, tuple[int, Any]], dict[int, _Entry], int]:
    """({key: (kind, value)}, {block: entry}, where the data starts)."""
    path = cursor.path
    if cursor.take(4) != MAGIC:
        raise FormatError(f"{path} is no GGUF file", "a control vector in GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise FormatError(f"{path} is GGUF of version {version}", "2 or 3, little-endian")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, tuple[int, Any]] = {}
    for _ in range(pairs):
        key, kind = cursor.text(), cursor.number("I")
        if key in metadata:
            raise FormatError(f"{path} says {key} twice")
        metadata[key] = (kind, cursor.value(kind))
        if key == "general.architecture" and metadata[key][1] != ARCHITECTURE:
            raise FormatError(f"{path} is of architecture {metadata[key][1]!r:.60}", f"{ARCHITECTURE!r}")
    if "general.architecture" not in metadata:
        raise FormatError(f"{path} names no architecture", f"{ARCHITECTURE!r}")
    entries: dict[int, _Entry] = {}
    for _ in range(tensors):
        name, entry = _entry(cursor)
        if not name.startswith("direction."):
            continue
        match = re.fullmatch(r"direction\.([0-9]{1,6})", name)
        if match is None or int(match[1]) in entries:
            raise FormatError(f"{path} holds a tensor {name!r:.60}", "one direction.N for each block N")
        entries[int(match[1])] = entry
    if not entries or len({entry.length for entry in entries.values()}) > 1:
        lengths = sorted({entry.length for entry in entries.values()})
        raise FormatError(f"{path} holds directions of widths {lengths or 'none'}", "directions of one width")
    kind, alignment = metadata.get("general.alignment", (_UINT32, ALIGNMENT))
    if kind != _UINT32 or alignment == 0 or alignment % 8:
        raise FormatError(f"{path} has an alignment of {alignment!r:.60}", "a multiple of 8")
    return metadata, entries, cursor.at + -cursor.at % alignment


def _entry(cursor: _Cursor) -> tuple[str, _Entry]:
    """The name and the place of the next tensor."""
    name, count = cursor.text(), cursor.number("I")
    if count > 4:
        raise FormatError(f"{cursor.path}: tensor {name!r:.60} of {count} dimensions", "at most 4")
    shape = [cursor.number("Q") for _ in range(count)]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if name.startswith("direction."):
        if not shape or shape[0] == 0 or any(length != 1 for length in shape[1:]):
            raise FormatError(f"{cursor.path}: {name!r:.60} of shape {shape}", "(d_model,)")
        if kind not in _DTYPES:
            raise FormatError(f"{cursor.path}: {name!r:.60} of kind {kind}", "float32, float16, bfloat16 or float64")
    return name, _Entry(shape[0] if shape else 0, _DTYPES.get(kind, torch.float32), offset)


def _check_room(entries: Mapping[int, _Entry], start: int, size: int, path: Path) -> None:
    """Raises FormatError for directions that the file has no room for."""
    if any(start + entry.offset + entry.nbytes > size for entry in entries.values()):
        raise FormatError(f"{path} ends before its directions do", "a whole control vector")
    if sum(entry.nbytes for entry in entries.values()) > size:
        raise FormatError(f"{path} has directions that share their bytes", "bytes for each")


def _row(file: BinaryIO, start: int, entry: _Entry) -> Tensor:
    """One direction, float32."""
    file.seek(start + entry.offset)
    return torch.frombuffer(bytearray(file.read(entry.nbytes)), dtype=entry.dtype).float()


def _vectors(path: Path, metadata: dict[str, tuple[int, Any]], rows: dict[int, Tensor]) -> list[SteeringVector]:
    """Vectors by block, with what the metadata tells of them."""
    if metadata.get("controlvector.layer_count", (_UINT32, 0))[0] == _INT32:
        warn(
            f"{path} looks written by llama.cpp's generator, which writes what it measures after block N as "
            "direction.N+1; it is read as llama.cpp applies it",
            PairingWarning,
        )
    try:
        told = parse_json(str(metadata.get("fgsteer.header", (_STRING, "{}"))[1]))
    except ValueError as error:
        raise FormatError(f"{path} has a damaged fgsteer.header: {error}") from error
    told = told if isinstance(told, dict) else {}
    if told.get("sha256") not in (None, _sha256(rows)):
        raise FormatError(f"{path} is damaged: its hash is not that of its directions", "those that were written")
    hint = metadata.get("controlvector.model_hint", (_STRING, ""))[1]
    name = told.get("model")
    model = {
        "name": name if isinstance(name, str) else "",
        "type": str(hint),
        "d_model": len(next(iter(rows.values()))),
    }
    about = {"method": "gguf", "file": path.name, "model": model, "baked": told.get("baked")}
    try:
        return [SteeringVector(rows[layer], Hookpoint(layer), provenance=about) for layer in sorted(rows)]
    except FgsteerError as error:
        raise FormatError(f"{path}: {error}") from error
