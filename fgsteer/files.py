"""Files that are written whole or not at all, and read without trust.

Tensors live in safetensors with one JSON header under the key ``fgsteer``; nothing
is unpickled. A write goes beside its target, to disk, and is then renamed over it, so that a
kill, a full disk or a power cut leaves the old file or the new one.

    write_tensors(path, {"direction": v}, kind="vector", header={"method": "caa"})
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fgsteer.errors import DataError, FormatError

LEFT_AFTER = 3600  # seconds without a write after which a ".part" is what a killed writer left
DEEPEST = 64  # levels of JSON
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; renamed over it on success, removed on failure.

    What a killed writer left beside it, ``.name.*.part``, goes with the next success after an hour.
    Raises FormatError naming the file where it cannot be written, as on a full disk; the old one stays.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        beside = Path(name)
        try:
            os.close(handle)
            yield beside
            umask = os.umask(0)
            os.umask(umask)
            beside.chmod(0o666 & ~umask)
            _to_disk(beside)
            os.replace(beside, target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from error
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_AFTER:
                left.unlink()


def rename(source: Path, target: Path) -> None:
    """Give a whole file its name. Raises FormatError."""
    try:
        os.replace(source, target)
    except OSError as error:
        raise _unwritable(target, error) from error


def _to_disk(path: Path) -> None:
    """Else a power cut may keep a rename and lose the data."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def _unwritable(target: Path, error: OSError) -> FormatError:
    return FormatError(
        f"cannot write {target}: {error.strerror or error}",
        "a folder that can be written to, with space left",
        "nothing there was changed: make room, or write elsewhere",
    )


def append_bytes(path: str | Path, data: bytes) -> None:
    """Add to a file in one write, to disk; a kill may leave a part of it, a full disk does not. Raises FormatError."""
    target = Path(path)
    end = 0
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        end = target.stat().st_size if target.exists() else 0
        with open(target, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(target, end)
        raise _unwritable(target, error) from error


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
            if made.is_file():
                _to_disk(made)
        if target.exists():
            target.rmdir()  # refuses one that was filled meanwhile
        os.replace(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path: str | Path, value: object) -> None:
    """Write JSON whole."""
    with whole(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=_number) + "\n", encoding="utf-8")


def _number(value: Any) -> Any:
    """A number of numpy or torch as one of Python, for JSON. Raises DataError for anything else."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise DataError(f"a {type(value).__name__} to be kept as JSON", "texts, numbers, lists and objects") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that is not trusted. Raises ValueError, also for what later fails to print or encode."""
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    level = [value]
    for _ in range(DEEPEST):
        level = [child for node in level if isinstance(node, dict | list) for child in _children(node)]
        if not level:
            break
    else:
        raise ValueError(f"nested deeper than {DEEPEST}")
    if _SURROGATE.search(text):
        json.dumps(value, ensure_ascii=False).encode()  # refuses half a character
    return value


def _children(node: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return node.values() if isinstance(node, dict) else node


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises FormatError naming the file and the line."""
    try:
        return parse_json(Path(path).read_bytes())
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeError as error:
        raise FormatError(f"{path} is not UTF-8 JSON: {error}") from error
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}, line {error.lineno}: {error.msg}", "JSON") from error
    except ValueError as error:
        raise FormatError(f"{path}: {error}", "JSON") from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, kind: str, header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header whole, as safetensors of the given kind."""
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"fgsteer": json.dumps({"kind": kind, **header}, ensure_ascii=False, default=_number)}
    owned = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    with whole(path) as beside:
        beside.write_bytes(save(owned, metadata))  # save_file leaves a file of its own when killed


def is_tensors(path: str | Path) -> bool:
    """Whether a file is safetensors by its content: the length of its header, then an object."""
    try:
        with open(path, "rb") as file:
            head, size = file.read(9), os.fstat(file.fileno()).st_size
    except OSError:
        return False
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size - 8


def read_tensors(path: str | Path, *, kind: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON header of a file of the given kind, or of any. Raises FormatError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = parse_json((file.metadata() or {}).get("fgsteer", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FormatError(f"no file {path}") from error
    except (OSError, SafetensorError, ValueError) as error:
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
