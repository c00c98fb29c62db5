"""Files that are written whole or not at all, and read without trust.

Tensors live in safetensors with one JSON header under the key ``fgsteer``, which holds a hash of them and of
itself; nothing is unpickled. A write goes beside its target, to disk, and is then renamed over it, so that a
kill, a full disk or a power cut leaves the old file or the new one.

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
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.json_files import parse_json, to_plain_number

_HASH = "sha256"  # the key in a header of safetensors; files by early versions have none


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, header: Mapping[str, Any]) -> None:
    """Write tensors, a JSON header and a hash of both whole, as safetensors of the given kind.

    Raises FormatError where it cannot be written, DataError for a header that could not be read again.
    """
    owned = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    text = json.dumps({"kind": kind, **header}, ensure_ascii=False, default=to_plain_number)
    try:
        about = parse_json(text.encode("utf-8", "replace"))
    except ValueError as error:
        raise DataError(f"a header that could not be read again: {error}", "texts, numbers, lists, objects") from error
    about[_HASH] = _hash(about, owned)
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"fgsteer": json.dumps(about, ensure_ascii=False)}
    with atomic_write(path) as beside:
        beside.write_bytes(save(owned, metadata))  # save_file leaves a file of its own when killed


def _hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Hash of a header, but for the one in it, and of the names, dtypes, shapes and bytes of tensors."""
    about = {key: value for key, value in header.items() if key != _HASH}
    digest = hashlib.sha256(json.dumps(about, ensure_ascii=False).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def is_tensors(path: str | Path) -> bool:
    """Whether a file is safetensors by its content: the length of its header, then an object."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_tensors(path: str | Path, *, kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file of the given kind, or of any.

    Raises FormatError, also where they are not what was written, by the hash that all but the first versions kept.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("fgsteer", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        check_names(path)
        kept = header.get(_HASH) if isinstance(header, dict) else None
        found = header.get("kind") if isinstance(header, dict) else None
        intact = kept is None or kept == _hash(header, tensors)
    except FileNotFoundError as error:
        raise FormatError(f"no file {path}") from error
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from error
    if not found or kind not in (found, None):
        raise FormatError(f"{path} holds {found or 'no fgsteer header'}", f"an fgsteer {kind or 'kind of'} file")
    if not intact:
        raise damage_error(path, "its hash is not that of what it holds", "what was written there")
    return tensors, {key: value for key, value in header.items() if key != _HASH}


GET_AGAIN = "get it again from where it came, or delete it and make it again"  # what to do about a damaged file


def damage_error(path: str | Path, reason: object, expected: str, change: str = GET_AGAIN) -> FormatError:
    """The error to raise of a file whose content is not what it should be."""
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
    """Raises ValueError for a safetensors file whose header names something twice: one of the two would be lost."""
    with open(path, "rb") as file:
        parse_json(file.read(int.from_bytes(file.read(8), "little")))


def tensor_sha256(*tensors: Tensor | None) -> str:
    """Hash of the shapes and float32 values of the tensors, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none")
            continue
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()
