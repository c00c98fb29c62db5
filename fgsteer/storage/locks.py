"""One writer at a time: whoever writes a file, or goes on with a run, holds a lock on it for as long as that takes.

The lock is the operating system's, on ``.NAME.lock`` beside what is written: it ends with its process, however that
ends. The file goes when the work is done; one that a kill left behind means nothing. Processes that share a run take
a lock each, by their rank.

    with held("bench.jsonl"): ...
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
from fgsteer.storage.targets import write_error

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems that keep none
NOTE_BYTES = 4096  # that are read of who holds a lock
NOTE_SECONDS = 0.3  # that a holder may take to say who it is
_holders: dict[Path, tuple[int, int]] = {}  # process and thread, by what they hold


def lock_path(path: str | Path, share: str = "") -> Path:
    """Where the lock on a file is: beside what is written, also where ``path`` is a link to it; on a share, inside."""
    target = Path(os.path.realpath(path))
    inside = share or not target.name  # the root of a file system has no name, and nothing beside it
    return target / f".{share}.lock" if inside else target.with_name(f".{target.name}.lock")


@contextlib.contextmanager
def exclusive_lock(path: str | Path, share: str = "") -> Iterator[None]:
    """A block in which no other process, and no other thread, holds ``path``; within a block of its own it is held.

    ``share`` names what of a folder is held, where several processes have one each. Raises BusyError at once, saying
    who holds it, and FormatError where nothing can be written. Where the file system keeps no locks it warns
    FgsteerWarning and goes on without.
    """
    note, me = lock_path(path, share), (os.getpid(), threading.get_ident())
    if _holders.get(note) == me:
        yield
        return
    if not note.parent.is_dir():
        change = "make it first, or correct the name"
        raise write_error(path, f"there is no folder {note.parent}", "a folder that is there", change)
    lock = FileLock(note, thread_local=False, fallback_to_soft=False)
    if not _acquired(lock, note, path):
        yield
        return
    _holders[note] = me
    try:
        _sign(note)
        yield
    finally:
        _holders.pop(note, None)
        with contextlib.suppress(OSError):
            note.unlink()  # by its holder: whoever opened it meanwhile finds it gone, and takes a new one
        lock.release()


def _acquired(lock: FileLock, note: Path, path: str | Path) -> bool:
    """Whether the lock could be taken; False where there are none to be had. Raises BusyError, FormatError."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(
            f"{path} is being written by {_holder(note)}",
            "one writer at a time",
            "wait until it has ended, end it, or write elsewhere",
        ) from None
    except OSError as error:
        if isinstance(error, PermissionError) and note.exists():  # of another user, who alone may open it
            raise BusyError(
                f"{path} is being written, or was when that was killed, by {_holder(note)}",
                "one writer at a time",
                f"wait until it has ended, or delete {note} where it has",
            ) from error
        reason = error.strerror or error
        if error.errno not in NO_LOCKS:
            raise write_error(path, reason) from error
        from fgsteer.errors.checks import warn  # it loads torch, which a command's options do without

        warn(f"no lock on {path}: {reason}; see that nothing else writes there", FgsteerWarning)
        return False
    return True


def _sign(note: Path) -> None:
    """Say in the lock's file who holds it."""
    command = shlex.join(sys.argv)[:300]
    about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T"), "command": command}
    with contextlib.suppress(OSError):  # the lock holds without
        file = os.open(note, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0))
        try:
            os.write(file, json.dumps(about).encode())
        finally:
            os.close(file)


def _holder(note: Path) -> str:
    """Who holds a lock, as it says itself."""
    deadline = time.monotonic() + NOTE_SECONDS
    while True:
        try:
            with open(note, "rb") as file:
                about = json.loads(file.read(NOTE_BYTES))
            pid, host, since, command = (str(about[key])[:300] for key in ("pid", "host", "since", "command"))
            return escape_text(f"process {pid} on {host} since {since}: {command}", keep="")
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            if time.monotonic() > deadline:
                return "another process"
            time.sleep(NOTE_SECONDS / 10)
