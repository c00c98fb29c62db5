"""Files that are written whole or not at all, and read without trust.

Tensors live in safetensors with one JSON header under the key ``fgsteer``; nothing
is unpickled. A write goes beside its target and is then renamed over it.

    write_tensors(path, {"direction": v}, kind="vector", header={"method": "caa"})
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fgsteer.errors import FormatError


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; renamed over it on success, removed on failure.

    Raises FormatError where no file can be made.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise FormatError(f"cannot write {target}: {error.strerror}", "a folder that can be written to") from error
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        beside.chmod(0o666 & ~umask)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill; renamed to it on success, removed on failure.

    Raises FormatError where none can be made, and unless ``path`` is free or an empty folder.
    """
    target = Path(path).absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FormatError(f"{target} exists", "a new or an empty folder", "name another, or remove it first")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise FormatError(f"cannot write {target}: {error.strerror}", "a folder that can be written to") from error
    try:
        yield beside
        umask = os.umask(0)
        os.umask(umask)
        for made in (beside, *beside.rglob("*")):  # safetensors gives its files to their owner alone
            made.chmod((0o777 if made.is_dir() else 0o666) & ~umask)
        if target.exists():
            target.rmdir()  # refuses one that was filled meanwhile
        os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """Write JSON whole."""
    with whole(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises FormatError naming the file and the line."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not UTF-8 JSON: {error}") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}, line {error.lineno}: {error.msg}", "JSON") from error
    except ValueError as error:
        raise FormatError(f"{path}: {error}", "JSON") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header whole, as safetensors of the given kind."""
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"fgsteer": json.dumps({"kind": kind, **header}, ensure_ascii=False)}
    owned = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    with whole(path) as beside:
        save_file(owned, beside, metadata=metadata)


def read_tensors(path: str | Path, *, kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file of the given kind, or of any. Raises FormatError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("fgsteer", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FormatError(f"no file {path}") from error
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}") from error
    found = header.get("kind") if isinstance(header, dict) else None
    if not found or kind not in (found, None):
        raise FormatError(f"{path} holds {found or 'no fgsteer header'}", f"an fgsteer {kind or 'kind of'} file")
    return tensors, header


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


def text_sha256(value: object) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
