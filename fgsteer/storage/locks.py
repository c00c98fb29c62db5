"""One writer at a time: a process that writes a file, or goes on with a run, holds a lock on it until it is done.

The lock is the operating system's, on ``.NAME.lock`` beside what is written. It ends with its process, however that
ends. The lock file is removed when the work is done; one that a kill left behind means nothing. Processes that share
a run take a lock each, by their rank.

    with exclusive_lock("bench.jsonl"): ...
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from fgsteer.errors import BusyError, FgsteerWarning
from fgsteer.errors.escaping import escape_text
from fgsteer.storage.targets import missing_folder, write_error

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # from file systems that keep no locks
NOTE_BYTES = 4096  # read at most, of a lock file that says who holds it
NOTE_SECONDS = 0.3  # that a holder may take to say who it is
_holders: dict[Path, tuple[int, int]] = {}  # process and thread that hold each lock file


def lock_path(path: str | Path, share: str = "") -> Path:
    """Return the lock file of a path: beside what is written, links followed; of a share of a folder, inside it."""
    target = Path(os.path.realpath(path))
    inside = share or not target.name  # the root of a file system has no name, and nothing beside it
    return target / f".{share}.lock" if inside else target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def exclusive_lock(path: str | Path, share: str = "", *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock on ``path`` for a block, in which no other process and no other thread can.

    Inside a block of the same thread the lock is held already. ``share`` names what of a folder is locked, where
    several processes have one share each. Raises BusyError, saying who holds the lock, at once or where it is still
    held after ``wait_seconds``, and FormatError where nothing can be written. Where the file system keeps no locks it
    warns FgsteerWarning and goes on without.
    """
    lock_file, holder = lock_path(path, share), (os.getpid(), threading.get_ident())
    if _holders.get(lock_file) == holder:
        yield
        return
    if not lock_file.parent.is_dir():
        raise missing_folder(path, lock_file.parent)
    lock = FileLock(lock_file, thread_local=False, fallback_to_soft=False)
    if not _acquire(lock, lock_file, path, wait_seconds):
        yield
        return
    _holders[lock_file] = holder
    try:
        _note_holder(lock_file)
        yield
    finally:
        _holders.pop(lock_file, None)
        with contextlib.suppress(OSError):
            lock_file.unlink()  # by its holder: whoever opened it meanwhile finds it gone, and takes a new one
        lock.release()


def _acquire(lock: FileLock, lock_file: Path, path: str | Path, wait_seconds: float) -> bool:
    """Take the lock; False where the file system keeps none. Raises BusyError where it is held, FormatError."""
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise BusyError(
            f"{path} is being written by {_describe_holder(lock_file)}.",
            "one writer at a time",
            "wait until it has ended, end it, or write elsewhere",
        ) from None
    except OSError as error:
        if isinstance(error, PermissionError) and lock_file.exists():  # another user's, who alone may open it
            raise BusyError(
                f"{path} is being written by {_describe_holder(lock_file)}, or was when that process was killed.",
                "one writer at a time",
                f"wait until it has ended; where it was killed, delete {lock_file}",
            ) from error
        reason = error.strerror or error
        if error.errno not in NO_LOCKS:
            raise write_error(path, reason) from error
        from fgsteer.errors.checks import warn  # it loads torch, which a command's options do without

        warn(f"{path} cannot be locked: {reason}. Make sure that nothing else writes there.", FgsteerWarning)
        return False
    return True


def _note_holder(lock_file: Path) -> None:
    """Write into the lock file who holds it."""
    command = shlex.join(sys.argv)[:300]
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T"), "command": command}
    with contextlib.suppress(OSError):  # the lock holds without
        file = os.open(lock_file, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.write(file, json.dumps(holder).encode())
        finally:
            os.close(file)


def _describe_holder(lock_file: Path) -> str:
    """Describe who holds a lock, from what it wrote into the lock file."""
    deadline = time.monotonic() + NOTE_SECONDS
    while True:
        try:
            with open(lock_file, "rb") as file:
                holder = json.loads(file.read(NOTE_BYTES))
            pid, host, since, command = (str(holder[key])[:300] for key in ("pid", "host", "since", "command"))
            return escape_text(f"process {pid} on {host} since {since}: {command}", keep="")
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            if time.monotonic() > deadline:
                return "another process"
            time.sleep(NOTE_SECONDS / 10)
