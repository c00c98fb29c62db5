"""Files and folders that are written in full or not at all.

A write goes beside its target, to disk, and is then renamed over it, so that a kill, a full disk or a power cut
leaves the old file or the new one.

    with whole("report.html") as beside: beside.write_text(page)
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


_HERE = f"{zlib.crc32(platform.node().encode()):08x}"  # this machine, in names of what lies beside a target


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
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
        raise write_error(path, error.strerror or error) from error
    _remove_left(target)


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder beside ``path`` to fill; renamed to it on success, removed on failure, as by ``atomic_write``.

    Raises FormatError where none can be made, as on a full disk, and unless ``path`` is free or an empty folder.
    """
    target = new_folder_target(path)
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
            raise write_error(path, getattr(error, "strerror", None) or error) from error
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
        raise write_error(target, error.strerror or error) from error


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
        raise write_error(path, error.strerror or error) from error
