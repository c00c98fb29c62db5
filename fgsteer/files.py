"""Files that are written whole or not at all, and read without trust.

Tensors live in safetensors with one JSON header under the key ``fgsteer``, which holds a hash of them and of
itself; nothing is unpickled. A write goes beside its target, to disk, and is then renamed over it, so that a
kill, a full disk or a power cut leaves the old file or the new one.

    write_tensors(path, {"direction": v}, kind="vector", header={"method": "caa"})
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import stat
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fgsteer.errors import DataError, FgsteerError, FormatError
from fgsteer.targets import file_target, new_folder, unwritable

if sys.platform != "win32":
    import fcntl

DEEPEST = 64  # levels of JSON
_HASH = "sha256"  # the key in a header of safetensors; files by early versions have none
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_HERE = f"{zlib.crc32(platform.node().encode()):08x}"  # this machine, in names of what lies beside a target


@contextlib.contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; renamed over it on success, removed on failure.

    A link is followed, and what is replaced hands on its mode, and its owner where the system lets. What a killed
    writer of this machine left beside it, ``.name.*.part``, goes with the next success. Raises FormatError naming the
    file where it cannot be written, as on a full disk; the old one stays.
    """
    target = file_target(path)
    try:
        before = os.stat(target) if target.exists() else None
        with _beside(target, 0o666 if before is None else before.st_mode & 0o777 | stat.S_IWUSR) as file:
            beside = Path(file.name)
            yield beside
            _to_disk(beside)
            if before is not None:
                _hand_on(before, beside)
            if sys.platform == "win32":  # which renames no open file
                file.close()
            os.replace(beside, target)
    except OSError as error:
        raise unwritable(path, error.strerror or error) from error
    _remove_left(target)


@contextlib.contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill; renamed to it on success, removed on failure, as ``whole`` does with files.

    Raises FormatError where none can be made, as on a full disk, and unless ``path`` is free or an empty folder.
    """
    target = new_folder(path)
    try:
        before = os.stat(target) if target.exists() else None
        with _beside(target, 0o666) as file:
            beside = Path(file.name).with_suffix("")
            try:
                beside.mkdir(0o777 if before is None else before.st_mode & 0o777 | stat.S_IRWXU)
                yield beside
                for made in filter(Path.is_file, beside.rglob("*")):
                    made.chmod(stat.S_IMODE(os.fstat(file.fileno()).st_mode))  # safetensors': their owner's alone
                    _to_disk(made)
                if before is not None:
                    _hand_on(before, beside)
                    target.rmdir()  # refuses one that was filled meanwhile
                os.replace(beside, target)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except FgsteerError:
        raise
    except Exception as error:  # what libraries raise on a full disk: OSError, safetensors' own, tokenizers' bare one
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            raise unwritable(path, getattr(error, "strerror", None) or error) from error
        raise
    _remove_left(target)


@contextlib.contextmanager
def _beside(target: Path, mode: int) -> Iterator[IO[bytes]]:
    """A new file beside a target, of the mode that the umask leaves of ``mode``, for as long as the block lasts.

    It is locked, by which others know that its writer lives.
    """
    file = _open_beside(target, mode)
    try:
        yield file
    finally:
        if sys.platform == "win32":  # which removes no open file
            file.close()
        Path(file.name).unlink(missing_ok=True)
        file.close()


def _open_beside(target: Path, mode: int) -> IO[bytes]:
    while True:
        beside = target.with_name(f".{target.name}.{_HERE}.{secrets.token_hex(4)}.part")
        file = open(beside, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        with contextlib.suppress(OSError):  # where nothing can be locked, nothing that is left is removed
            _lock(file)
        if beside.exists():  # else it was taken for what is left, just before it was locked
            return file
        file.close()


def _lock(file: IO[bytes], wait: bool = True) -> None:
    """Lock a file until it is closed. Raises OSError where it cannot be, or is and ``wait`` is false."""
    if sys.platform != "win32":  # where no open file can be removed
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_left(target: Path) -> None:
    """Remove what writers of a target that were killed on this machine left beside it."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{_HERE}.*.part"):
        with contextlib.suppress(OSError), open(left, "rb+") as file:
            _lock(file, wait=False)
            if sys.platform == "win32":
                file.close()
            left.unlink()
            shutil.rmtree(left.with_suffix(""), ignore_errors=True)


def _hand_on(before: os.stat_result, path: Path) -> None:
    """Give a file or folder the mode of the one that it replaces; its owner and group where the system lets."""
    if sys.platform != "win32":
        for owner in (before.st_uid, -1):
            with contextlib.suppress(OSError):
                os.chown(path, owner, before.st_gid)
                break
    path.chmod(stat.S_IMODE(before.st_mode))


def _to_disk(path: Path) -> None:
    """Else a power cut may keep a rename and lose the data."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Give a whole file its name. Raises FormatError."""
    try:
        os.replace(source, target)
    except OSError as error:
        raise unwritable(target, error.strerror or error) from error


def append_bytes(path: str | Path, data: bytes) -> None:
    """Add to a file in one write, to disk; a kill may leave a part of it, a full disk does not. Raises FormatError."""
    target = file_target(path)
    end = 0
    try:
        end = target.stat().st_size if target.exists() else 0
        with open(target, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(target, end)
        raise unwritable(path, error.strerror or error) from error


def write_json(path: str | Path, value: object) -> None:
    """Write JSON whole."""
    text = json.dumps(value, indent=1, ensure_ascii=False, default=_number) + "\n"
    with whole(path) as beside:
        beside.write_bytes(text.encode("utf-8", "replace"))


def _number(value: Any) -> Any:
    """A number of numpy or torch as one of Python, for JSON. Raises DataError for anything else."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        raise DataError(f"a {type(value).__name__} to be kept as JSON", "texts, numbers, lists and objects") from None


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text that is not trusted.

    Raises ValueError, also for a key that an object has twice, and for what later fails to print or encode.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        value = json.loads(text, object_pairs_hook=_object)
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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object. Raises ValueError for a key that it has twice: one of the values would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r:.60} stands twice in one object")
    return found


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
    """Write tensors, a JSON header and a hash of both whole, as safetensors of the given kind.

    Raises FormatError where it cannot be written, DataError for a header that could not be read again.
    """
    owned = {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}
    text = json.dumps({"kind": kind, **header}, ensure_ascii=False, default=_number)
    try:
        about = parse_json(text.encode("utf-8", "replace"))
    except ValueError as error:
        raise DataError(f"a header that could not be read again: {error}", "texts, numbers, lists, objects") from error
    about[_HASH] = _hash(about, owned)
    # one key: safetensors writes several in an order that changes from run to run
    metadata = {"fgsteer": json.dumps(about, ensure_ascii=False)}
    with whole(path) as beside:
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
        raise FormatError(
            f"{path} is damaged: its hash is not that of what it holds",
            "what was written there",
            "get it again from where it came, or delete it and make it again",
        )
    return tensors, {key: value for key, value in header.items() if key != _HASH}


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


def text_sha256(value: object) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
