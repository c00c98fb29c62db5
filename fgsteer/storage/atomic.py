"""Files and folders that are written in full or not at all.

A write goes to a temporary file beside its target, to disk, and is then renamed over the target, so that a kill,
a full disk or a power cut leaves the old file or the new one.

    with atomic_write("report.html") as temporary: temporary.write_text(page)
"""

from __future__ import annotations

import contextlib
import glob
import os
import platform
import secrets
import shutil
import stat
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from fgsteer.errors import FgsteerError
from fgsteer.storage.targets import file_target, new_folder_target, write_error

if sys.platform != "win32":
    import fcntl


_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"  # this machine, in the names of temporary files


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to, which is renamed over it on success, removed on failure.

    A link is followed. The new file gets the mode of the one that it replaces, and its owner where the system allows
    that. Temporary files ``.name.*.part`` of writers that were killed on this machine are removed after a success.
    Raises FormatError naming the file where it cannot be written, as on a full disk; the old file stays.
    """
    target = file_target(path)
    try:
        before = os.stat(target) if target.exists() else None
        with _temporary(target, 0o666 if before is None else before.st_mode & 0o777 | stat.S_IWUSR) as file:
            temporary = Path(file.name)
            yield temporary
            _flush_to_disk(temporary)
            if before is not None:
                _copy_mode_and_owner(before, temporary)
            if sys.platform == "win32":  # which renames no open file
                file.close()
            os.replace(temporary, target)
    except OSError as error:
        raise write_error(path, error.strerror or error) from error
    _remove_abandoned(target)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder beside ``path`` to fill, which is renamed to it on success, removed on failure.

    Raises FormatError where none can be made, as on a full disk, and unless ``path`` is free or an empty folder.
    """
    target = new_folder_target(path)
    try:
        before = os.stat(target) if target.exists() else None
        with _temporary(target, 0o666) as file:
            temporary = Path(file.name).with_suffix("")
            try:
                temporary.mkdir(0o777 if before is None else before.st_mode & 0o777 | stat.S_IRWXU)
                yield temporary
                for made in filter(Path.is_file, temporary.rglob("*")):
                    # safetensors makes files that only their owner may read
                    made.chmod(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
                    _flush_to_disk(made)
                if before is not None:
                    _copy_mode_and_owner(before, temporary)
                    target.rmdir()  # fails for a folder that was filled meanwhile
                os.replace(temporary, target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except FgsteerError:
        raise
    except Exception as error:  # on a full disk libraries raise OSError, safetensors its own, tokenizers a bare one
        if isinstance(error, OSError | SafetensorError) or type(error) is Exception:
            raise write_error(path, getattr(error, "strerror", None) or error) from error
        raise
    _remove_abandoned(target)


@contextlib.contextmanager
def _temporary(target: Path, mode: int) -> Iterator[IO[bytes]]:
    """Give a new file beside a target, of the mode that the umask leaves of ``mode``, for as long as the block lasts.

    It is locked, by which other processes know that its writer lives.
    """
    file = _open_temporary(target, mode)
    try:
        yield file
    finally:
        if sys.platform == "win32":  # which removes no open file
            file.close()
        Path(file.name).unlink(missing_ok=True)
        file.close()


def _open_temporary(target: Path, mode: int) -> IO[bytes]:
    """Open and lock a new file beside a target."""
    while True:
        temporary = target.with_name(f".{target.name}.{_MACHINE}.{secrets.token_hex(4)}.part")
        file = open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, mode))  # noqa: SIM115
        with contextlib.suppress(OSError):  # where nothing can be locked, no abandoned file is removed either
            _lock(file)
        if temporary.exists():  # else another process took it for an abandoned one, just before it was locked
            return file
        file.close()


def _lock(file: IO[bytes], wait: bool = True) -> None:
    """Lock a file until it is closed. Raises OSError where that fails, or without ``wait`` where it is locked."""
    if sys.platform != "win32":  # where no open file can be removed
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_abandoned(target: Path) -> None:
    """Remove the temporary files of a target whose writers were killed on this machine."""
    for abandoned in target.parent.glob(f".{glob.escape(target.name)}.{_MACHINE}.*.part"):
        with contextlib.suppress(OSError), open(abandoned, "rb+") as file:
            _lock(file, wait=False)
            if sys.platform == "win32":
                file.close()
            abandoned.unlink()
            shutil.rmtree(abandoned.with_suffix(""), ignore_errors=True)


def _copy_mode_and_owner(before: os.stat_result, path: Path) -> None:
    """Give a file or folder the mode of the one that it replaces, and its owner and group where that is allowed."""
    if sys.platform != "win32":
        for owner in (before.st_uid, -1):
            with contextlib.suppress(OSError):
                os.chown(path, owner, before.st_gid)
                break
    path.chmod(stat.S_IMODE(before.st_mode))


def _flush_to_disk(path: Path) -> None:
    """Wait until a file is on disk. Without this a power cut may keep a rename and lose the data."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def rename(source: Path, target: Path) -> None:
    """Give a finished file its name. Raises FormatError where that fails."""
    try:
        os.replace(source, target)
    except OSError as error:
        raise write_error(target, error.strerror or error) from error


def append_bytes(path: str | Path, data: bytes) -> None:
    """Append to a file, to disk. A kill may leave a part of the data, a full disk does not. Raises FormatError."""
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
        raise write_error(path, error.strerror or error) from error
