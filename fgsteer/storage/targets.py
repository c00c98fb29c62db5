"""Where files and folders may be written: known before anything is measured, and asked again when they are.

A file may be new, in a folder that is there, or one that may be replaced; a link leads to the file that it names.
Only where a folder is what is asked for it may be made, in one that is there.

    file_target("love.safetensors")       refuses folders, devices, pipes, and folders that a typo names
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from fgsteer.errors import FormatError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


def file_target(path: str | Path) -> Path:
    """The file that is written for ``path``: itself, or what it links to.

    Raises FormatError for what is no regular file, for one that may not be written, and where its folder is missing.
    """
    with _refusals(path):
        target, found = _find(path)
        _check_folder(path, target.parent)
        if found is not None and not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "no regular file")
            raise write_error(path, f"it is {kind}", "a file, or a name that is free", "name another")
        if found is not None and not os.access(target, os.W_OK):
            raise write_error(path, "it is read-only", "a file that may be replaced", "name another, or chmod it")
        return target


def folder_target(path: str | Path) -> Path:
    """The folder that is filled for ``path``, which may be there or be made in one that is. Raises FormatError."""
    with _refusals(path):
        target, found = _find(path)
        _check_folder(path, target.parent if found is None else target)
        return target


def make_folder(path: str | Path) -> Path:
    """The path of a folder that is there, or is made now in one that is. Raises FormatError."""
    with _refusals(path):
        folder_target(path).mkdir(exist_ok=True)
    return Path(path)


def new_folder_target(path: str | Path) -> Path:
    """The folder that is written whole for ``path``: free, or empty. Raises FormatError where it is not."""
    with _refusals(path):
        target, found = _find(path)
        if found is not None and not (stat.S_ISDIR(found.st_mode) and not any(target.iterdir())):
            raise FormatError(f"{path} exists", "a new or an empty folder", "name another, or remove it first")
        _check_folder(path, target.parent)
        return target


def write_error(
    path: str | Path,
    why: object,
    expected: str = "a folder that can be written to, with space left",
    change: str = "nothing there was changed: make room, or write elsewhere",
) -> FormatError:
    """The error to raise of a file or folder that cannot be written."""
    return FormatError(f"cannot write {path}: {why}", expected, change)


@contextlib.contextmanager
def _refusals(path: str | Path) -> Iterator[None]:
    """What the system says of a path, as FormatError."""
    try:
        yield
    except FormatError:
        raise
    except OSError as error:
        raise write_error(path, error.strerror or error) from error
    except ValueError as error:  # a null character, half a character
        raise write_error(path, error, "a name that the file system can hold", "name another") from error


def _find(path: str | Path) -> tuple[Path, os.stat_result | None]:
    """Where a path leads, links followed, and what is there."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        found = None
    return Path(os.path.realpath(path)), found


def _check_folder(path: str | Path, folder: Path) -> None:
    """Raises FormatError unless files can be made in a folder, which is there."""
    missing = next((parent for parent in (*reversed(folder.parents), folder) if not parent.exists()), None)
    if missing is not None:
        change = "make it first, or correct the name"
        raise write_error(path, f"there is no folder {missing}", "a folder that is there", change)
    if not folder.is_dir():
        raise write_error(path, f"{folder} is no folder", "a folder", "name another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise write_error(path, f"{folder} is read-only", "a folder that can be written to", "write elsewhere")
