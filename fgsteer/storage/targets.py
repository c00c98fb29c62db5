"""Where files and folders may be written: checked before anything is measured, and again when they are written.

A file may be new, in a folder that exists, or one that may be replaced; a link leads to the file that it names.
A folder is made only where a folder is asked for, inside one that exists.

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
    """Return the file that is written for ``path``: itself, or what it links to.

    Raises FormatError for what is no regular file, for one that may not be written, and where its folder is missing.
    """
    with _as_format_errors(path):
        target, status = _find(path)
        _check_folder(path, target.parent)
        if status is not None and not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            raise write_error(path, f"it is {kind}", "a file, or a name that is free", "name another file")
        if status is not None and not os.access(target, os.W_OK):
            raise write_error(
                path, "it is read-only", "a file that may be replaced", "name another file, or make it writable"
            )
        return target


def folder_target(path: str | Path) -> Path:
    """Return the folder that is filled for ``path``: it exists, or can be made in one that does. Raises FormatError."""
    with _as_format_errors(path):
        target, status = _find(path)
        _check_folder(path, target.parent if status is None else target)
        return target


def make_folder(path: str | Path) -> Path:
    """Return the path of a folder that exists, or is made now in one that does. Raises FormatError."""
    with _as_format_errors(path):
        folder_target(path).mkdir(exist_ok=True)
    return Path(path)


def new_folder_target(path: str | Path) -> Path:
    """Return the folder that is written in full for ``path``. Raises FormatError unless it is new or empty."""
    with _as_format_errors(path):
        target, status = _find(path)
        if status is not None and not (stat.S_ISDIR(status.st_mode) and not any(target.iterdir())):
            raise FormatError(f"{path} exists.", "a new or an empty folder", "name another, or remove it first")
        _check_folder(path, target.parent)
        return target


def write_error(
    path: str | Path,
    why: object,
    expected: str = "a folder that can be written to, with space left",
    change: str = "make room, or write elsewhere; nothing there was changed",
) -> FormatError:
    """Make the error of a file or folder that cannot be written."""
    return FormatError(f"Cannot write {path}: {str(why).removesuffix('.')}.", expected, change)


def missing_folder(path: str | Path, folder: Path) -> FormatError:
    """Make the error of a path whose folder does not exist."""
    return write_error(path, f"there is no folder {folder}", "a folder that exists", "make it, or correct the name")


@contextlib.contextmanager
def _as_format_errors(path: str | Path) -> Iterator[None]:
    """Raise FormatError for what the operating system says of a path."""
    try:
        yield
    except FormatError:
        raise
    except OSError as error:
        raise write_error(path, error.strerror or error) from error
    except ValueError as error:  # a null character, half a character
        raise write_error(path, error, "a name that the file system can hold", "choose another name") from error


def _find(path: str | Path) -> tuple[Path, os.stat_result | None]:
    """Return where a path leads, links followed, and the status of what is there."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        status = None
    return Path(os.path.realpath(path)), status


def _check_folder(path: str | Path, folder: Path) -> None:
    """Raise FormatError unless a folder exists and files can be made in it."""
    missing = next((parent for parent in (*reversed(folder.parents), folder) if not parent.exists()), None)
    if missing is not None:
        raise missing_folder(path, missing)
    if not folder.is_dir():
        raise write_error(path, f"{folder} is no folder", "a path inside a folder", "name another folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise write_error(path, f"{folder} is read-only", "a folder that can be written to", "write elsewhere")
