"""Files of tensors: written in full or not at all, and read without trust.

They are safetensors with one JSON header under the key ``fgsteer``, which holds a hash of the tensors and of
itself. Nothing is unpickled.

    write_tensors(path, {"direction": v}, kind="vector", header={"method": "caa"})
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fgsteer.errors import DataError, FormatError
from fgsteer.errors.wording import a
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.json_files import parse_json, to_plain_number

_HASH = "sha256"  # the key in a header of safetensors; files by early versions have none


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, header: Mapping[str, Any]) -> None:
    """Write tensors, a JSON header and a hash of both, atomically, as safetensors of a kind such as "vector".

    Raises FormatError where the file cannot be written, DataError for a header that could not be read again.
    """
    owned = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    text = json.dumps({"kind": kind, **header}, ensure_ascii=False, default=to_plain_number)
    try:
        fields = parse_json(text.encode("utf-8", "replace"))
    except ValueError as error:
        raise DataError(
            f"The header of a {kind} file could not be read again: {error}.",
            "texts, numbers, lists and objects, each key once in an object",
        ) from error
    fields[_HASH] = _hash(fields, owned)
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"fgsteer": json.dumps(fields, ensure_ascii=False)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(owned, metadata))  # save_file leaves a file of its own when killed


def _hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash a header, but for the hash in it, and the names, dtypes, shapes and bytes of tensors."""
    fields = {key: value for key, value in header.items() if key != _HASH}
    digest = hashlib.sha256(json.dumps(fields, ensure_ascii=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_tensors(path: str | Path) -> bool:
    """Tell by its content whether a file is safetensors: the length of its header, then an object."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_tensors(path: str | Path, *, kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors and the JSON header of a file of the given kind, or of any kind.

    Raises FormatError for a file that is missing, damaged or of another kind. A file is damaged where its content
    does not have the hash that was written with it; files by the first versions have none.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("fgsteer", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_names(path)
        stored_hash = header.get(_HASH) if isinstance(header, dict) else None
        stored_kind = header.get("kind") if isinstance(header, dict) else None
        is_intact = stored_hash is None or stored_hash == _hash(header, tensors)
    except FileNotFoundError as error:
        raise FormatError(f"There is no file {path}.") from error
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(
            f"{path} is not a readable safetensors file: {str(error).removesuffix('.')}.",
            f"{a(kind or 'fgsteer')} file",
            "it may be another format, or cut off: get it again from where it came",
        ) from error
    if not stored_kind:
        raise FormatError(f"{path}, which has no fgsteer header", f"{a(kind or 'fgsteer')} file that fgsteer wrote")
    if kind not in (stored_kind, None):
        raise FormatError(f"{path}, {a(stored_kind)} file", f"{a(kind)} file", "pass the file to what it was made for")
    if not is_intact:
        raise damage_error(path, "its hash is not that of what it holds", "the content that was written")
    return tensors, {key: value for key, value in header.items() if key != _HASH}


GET_AGAIN = "get it again from where it came, or delete it and make it again"  # what to do about a damaged file


def damage_error(path: str | Path, reason: object, expected: str, change: str = GET_AGAIN) -> FormatError:
    """Make the error of a file whose content is not what it should be."""
    return FormatError(f"{path} is damaged: {str(reason).removesuffix('.')}.", expected, change)


@contextlib.contextmanager
def refuse_damaged(path: str | Path, expected: str, change: str = GET_AGAIN) -> Iterator[None]:
    """Raise FormatError, which says that the file is damaged, for errors of a block that interprets its content.

    Args:
        path: The file, for the message.
        expected: What the file should be, such as "a file written by SteeringVector.save".
        change: What to do about it.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise damage_error(path, reason, expected, change) from error


def check_names(path: str | Path) -> None:
    """Raise ValueError for a safetensors file whose header names something twice: one of the two would be lost."""
    with open(path, "rb") as file:
        parse_json(file.read(int.from_bytes(file.read(8), "little")))


def tensor_sha256(*tensors: Tensor | None) -> str:
    """Hash the shapes and float32 values of tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
