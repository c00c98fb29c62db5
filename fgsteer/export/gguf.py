"""Control vectors in GGUF files, which llama.cpp, repeng and EasySteer read.

    write([vec.add(8.0, bos=True)], "love.gguf")         llama-cli --control-vector love.gguf …
    [vector] = read("love.gguf")

``direction.N`` is added to the output of block N, at every token. A file has no field for the strength: it is
multiplied into the directions, and the metadata say under ``fgsteer.header`` by how much.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fgsteer.errors import FgsteerError, FormatError, PairingWarning, SteeringError
from fgsteer.errors.checks import warn
from fgsteer.export.requirements import Interventions, block_output, every_token, kind_of, listed
from fgsteer.export.table import ExportInputs
from fgsteer.interventions import Add, Intervention
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.json_files import parse_json, text_sha256
from fgsteer.vector import SteeringVector

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
ARCHITECTURE = "controlvector"
MAX_HEADER_BYTES = 1 << 24  # metadata and tensor names: those of a control vector take some kilobytes
_UINT32, _INT32, _STRING, _ARRAY = 4, 5, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}


def write(interventions: Interventions, path: str | Path, *, model_type: str = "") -> None:
    """Write ``direction.ℓ = Σ c·v`` for the Adds at the output of each block ℓ ≥ 1, in float32.

    Args:
        interventions: Adds on every token, that at position 0 too, at outputs of blocks from block 1 on.
        path: The file to write.
        model_type: The Hugging Face model type ("llama"), a hint that engines show and do not check.

    Raises:
        SteeringError: llama.cpp cannot do it: another intervention than Add, a scope, leaving position 0 alone,
            block 0, another site than the residual stream.
        PairingError: The interventions are made for two models.
        FormatError: The file cannot be written.
    """
    items = listed(interventions)
    directions: dict[int, Tensor] = {}
    for item in items:
        if not isinstance(item, Add):
            raise SteeringError(
                kind_of(item),
                "an Add",
                "a control vector of llama.cpp can only be added: export to lm-eval or EasySteer, "
                "or steer with fgsteer.steer",
            )
        every_token(item, "llama.cpp")
        layer = block_output(item, "llama.cpp")
        if layer == 0:
            raise SteeringError(
                f"an Add at {item.hookpoint}",
                "an Add at the output of block 1 or later",
                "llama.cpp has no control vector for block 0: build the vector at a later block, "
                "or export to EasySteer",
            )
        scaled = item.coefficient * item.direction.double().cpu()
        directions[layer] = directions[layer] + scaled if layer in directions else scaled
    baked = [_record(item, float(item.coefficient)) for item in items if isinstance(item, Add)]
    write_directions(path, directions, model_type=model_type, model_name=items[0].model_name, baked=baked)


def export(interventions: Sequence[Intervention], path: Path, inputs: ExportInputs) -> list[Path]:
    """The exporter of the table of exports."""
    write(interventions, path, model_type=inputs.model_type)
    return [path]


def _record(item: Add, coefficient: float) -> dict[str, Any]:
    """What the metadata say of an Add whose coefficient was multiplied into its direction."""
    sha256 = tensor_sha256(item.direction)
    return {"hookpoint": str(item.hookpoint), "coefficient": coefficient, "direction_sha256": sha256}


def write_directions(
    path: str | Path,
    directions: Mapping[int, Tensor],
    *,
    model_type: str,
    model_name: str,
    baked: list[dict[str, Any]],
) -> None:
    """Write {block: direction (d_model,)} in float32, with what the metadata say of strengths (``baked``).

    Raises SteeringError for a direction that is not finite in float32.
    """
    rows = {layer: directions[layer].to("cpu", torch.float32) for layer in sorted(directions)}
    for layer, row in rows.items():
        if not bool(torch.isfinite(row).all()):
            raise SteeringError(
                f"a direction of block {layer} that overflows float32",
                "a direction whose entries float32 holds",
                "use a smaller coefficient",
            )
    header = json.dumps({"model": model_name, "baked": baked, "sha256": _sha256(rows)}, ensure_ascii=False)
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
    with atomic_write(path) as temporary:
        temporary.write_bytes(head + bytes(-len(head) % ALIGNMENT) + b"".join(parts))


def _sha256(rows: Mapping[int, Tensor]) -> str:
    """Hash of directions by block."""
    return text_sha256([[layer, tensor_sha256(rows[layer])] for layer in sorted(rows)])


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _kind(kind: int) -> bytes:
    return struct.pack("<I", kind)


def read(path: str | Path) -> list[SteeringVector]:
    """The vectors of a control-vector file, in the order of blocks.

    ``vector.add(1.0, bos=True)`` does what llama.cpp does with the file at the scale 1. Files by this module, repeng,
    EasySteer and llama.cpp's own generator are read, in float32, float16, bfloat16 and float64. Every size is
    compared with the file's length before it is used.

    Args:
        path: The GGUF file.

    Returns:
        One vector for each block.

    Raises:
        FormatError: The file is missing, truncated, or no control vector.

    Warns:
        PairingWarning: The file looks written by llama.cpp's generator, which counts blocks in another way.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            metadata, entries, start = _header(_Cursor(file.read(MAX_HEADER_BYTES), path))
            _check_room(entries, start, size, path)
            rows = {layer: _row(file, start, entry) for layer, entry in entries.items()}
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror}.") from error
    return _vectors(path, metadata, rows)


@dataclass(frozen=True)
class _Entry:
    """Where a direction is: its length, its dtype, and its offset from the start of the data."""

    length: int
    dtype: torch.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return self.length * self.dtype.itemsize


class _Cursor:
    """Little-endian values from a header's bytes. Raises FormatError where they end early."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data, self.path, self.offset = data, path, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.offset:
            truncated = len(self.data) < MAX_HEADER_BYTES
            raise FormatError(
                f"{self.path} ends inside its header."
                if truncated
                else f"The header of {self.path} takes more than 16 MiB.",
                "a complete control vector, whose header takes some kilobytes",
            )
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path} holds a string that is not UTF-8.") from error

    def value(self, kind: int) -> Any:
        """A value of the kind; None for an array, which is skipped."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise FormatError(f"{self.path} holds a value of the kind {kind}.", "a kind from 0 to 12")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(count * struct.calcsize(f"<{_SCALARS[inner]}"))
        elif inner == _STRING:
            for _ in range(count):  # ends with the header at the latest: each takes eight bytes
                self.take(self.number("Q"))
        else:
            raise FormatError(f"{self.path} holds an array of the kind {inner}.", "an array of numbers or strings")
        return None


def _header(cursor: _Cursor) -> tuple[dict[str, tuple[int, Any]], dict[int, _Entry], int]:
    """({key: (kind, value)}, {block: entry}, where the data starts)."""
    path = cursor.path
    if cursor.take(4) != MAGIC:
        raise FormatError(f"{path} is not a GGUF file.", "a control vector in the format GGUF")
    version = cursor.number("I")
    if version not in (2, 3):
        raise FormatError(f"{path} is a GGUF file of version {version}.", "version 2 or 3, little-endian")
    tensors, pairs = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, tuple[int, Any]] = {}
    for _ in range(pairs):
        key, kind = cursor.text(), cursor.number("I")
        if key in metadata:
            raise FormatError(f"{path} has the key {key!r:.60} twice in its metadata.")
        metadata[key] = (kind, cursor.value(kind))
        if key == "general.architecture" and metadata[key][1] != ARCHITECTURE:
            raise FormatError(
                f"{path} is of the architecture {metadata[key][1]!r:.60}.", f"the architecture {ARCHITECTURE!r}"
            )
    if "general.architecture" not in metadata:
        raise FormatError(f"{path} names no architecture.", f"the architecture {ARCHITECTURE!r}")
    entries: dict[int, _Entry] = {}
    for _ in range(tensors):
        name, entry = _entry(cursor)
        if not name.startswith("direction."):
            continue
        match = re.fullmatch(r"direction\.([0-9]{1,6})", name)
        if match is None or int(match[1]) in entries:
            raise FormatError(f"{path} holds a tensor named {name!r:.60}.", "one tensor direction.N for each block N")
        entries[int(match[1])] = entry
    if not entries or len({entry.length for entry in entries.values()}) > 1:
        widths = ", ".join(str(width) for width in sorted({entry.length for entry in entries.values()}))
        raise FormatError(
            f"{path} holds directions of the widths {widths}." if widths else f"{path} holds no direction.",
            "directions of one width",
        )
    kind, alignment = metadata.get("general.alignment", (_UINT32, ALIGNMENT))
    if kind != _UINT32 or alignment == 0 or alignment % 8:
        raise FormatError(f"{path} has the alignment {alignment!r:.60}.", "a multiple of 8")
    return metadata, entries, cursor.offset + -cursor.offset % alignment


def _entry(cursor: _Cursor) -> tuple[str, _Entry]:
    """The name of the next tensor, and where it is."""
    name, count = cursor.text(), cursor.number("I")
    if count > 4:
        raise FormatError(f"{cursor.path} holds a tensor {name!r:.60} of {count} dimensions.", "at most 4 dimensions")
    shape = [cursor.number("Q") for _ in range(count)]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if name.startswith("direction."):
        if not shape or shape[0] == 0 or any(length != 1 for length in shape[1:]):
            raise FormatError(f"{cursor.path} holds {name!r:.60} of the shape {tuple(shape)}.", "the shape (d_model,)")
        if kind not in _DTYPES:
            raise FormatError(
                f"{cursor.path} holds {name!r:.60} in the data type {kind}, which is quantised or unknown.",
                "float32, float16, bfloat16 or float64",
            )
    return name, _Entry(shape[0] if shape else 0, _DTYPES.get(kind, torch.float32), offset)


def _check_room(entries: Mapping[int, _Entry], start: int, size: int, path: Path) -> None:
    """Raises FormatError for directions that the file has no room for."""
    if any(start + entry.offset + entry.nbytes > size for entry in entries.values()):
        raise FormatError(f"{path} ends before its directions do.", "a complete control vector")
    if sum(entry.nbytes for entry in entries.values()) > size:
        raise FormatError(f"{path} has directions that share their bytes.", "bytes of its own for each direction")


def _row(file: BinaryIO, start: int, entry: _Entry) -> Tensor:
    """One direction, float32."""
    file.seek(start + entry.offset)
    return torch.frombuffer(bytearray(file.read(entry.nbytes)), dtype=entry.dtype).float()


def _vectors(path: Path, metadata: dict[str, tuple[int, Any]], rows: dict[int, Tensor]) -> list[SteeringVector]:
    """Vectors in the order of blocks, with what the metadata say of them."""
    if metadata.get("controlvector.layer_count", (_UINT32, 0))[0] == _INT32:
        warn(
            f"{path} looks as if llama.cpp's generator had written it, which names what it measures after block N "
            "direction.N+1. It is read as llama.cpp applies it, after block N+1.",
            PairingWarning,
        )
    try:
        header = parse_json(str(metadata.get("fgsteer.header", (_STRING, "{}"))[1]))
    except ValueError as error:
        raise FormatError(f"{path} has a damaged fgsteer.header in its metadata: {error}.") from error
    header = header if isinstance(header, dict) else {}
    if header.get("sha256") not in (None, _sha256(rows)):
        raise FormatError(
            f"{path} is damaged: its directions do not have the hash that its metadata name.",
            "the directions that were written",
            "write the file anew",
        )
    hint = metadata.get("controlvector.model_hint", (_STRING, ""))[1]
    name = header.get("model")
    model = {
        "name": name if isinstance(name, str) else "",
        "type": str(hint),
        "d_model": len(next(iter(rows.values()))),
    }
    about = {"method": "gguf", "file": path.name, "model": model, "baked": header.get("baked")}
    try:
        return [SteeringVector(rows[layer], Hookpoint(layer), provenance=about) for layer in sorted(rows)]
    except FgsteerError as error:
        raise FormatError(f"{path} holds a vector that cannot be used: {error}") from error
