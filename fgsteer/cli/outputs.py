"""The files and folders that commands write: none is an input too, and no two processes write the same one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import DataError
from fgsteer.storage.targets import make_folder

OUTPUTS = ("out", "html", "work")
"""The parameters that name what a command writes."""
NAMES_OR_FILES = ("contrast", "source", "concept", "held_out", "model", "sae", "rows_of", "effects")
"""The parameters that name either something that fgsteer ships or a file."""
MAIN_FILES = {"bench": "bench.jsonl", "sweep": "sweep.json"}
"""The commands that write a folder, and the file in it by which processes agree on who writes."""


def may_be_path(parameter: str, hint: str) -> bool:
    """Whether a command's parameter, with this type hint, can name a file or a folder."""
    return parameter in NAMES_OR_FILES or "Path" in hint


def check_apart(paths: Mapping[str, tuple[str, Any]]) -> None:
    """Check that no output is an input too, also under another name or behind a link, and no two outputs are one.

    ``paths`` is {option: (parameter, path or paths or None)} of the parameters that may name files. Raises DataError.
    """
    outputs = {option: Path(value) for option, (name, value) in paths.items() if name in OUTPUTS and value is not None}
    for option, (name, value) in paths.items():
        for path in value if isinstance(value, list | tuple) else [value]:
            for other, output in outputs.items():
                if option == other or path is None or not _are_one(path, output, name in OUTPUTS):
                    continue
                if name not in NAMES_OR_FILES or not _is_shipped(str(path)):
                    raise DataError(
                        f"{option} {path} and {other} {output} are one file.",
                        "another file to write",
                        f"a command never writes to what it reads: change {other}",
                    )


def _are_one(first: str | Path, second: Path, both_outputs: bool) -> bool:
    """Whether two paths are one file. Two outputs may also be one file that is not there yet."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(first, second)
    return both_outputs and os.path.realpath(first) == os.path.realpath(second)


def _is_shipped(name: str) -> bool:
    """Whether a name means something that fgsteer ships, whatever file has the same name."""
    from fgsteer.data.shipped import shipped_path
    from fgsteer.models.shipped import find_shipped

    return find_shipped(name) is not None or shipped_path(name) is not None


@contextlib.contextmanager
def lock_output(output: Path, command: str) -> Iterator[None]:
    """A block in which no other process writes the output of a command, a file or a folder. Raises BusyError."""
    from fgsteer.storage.locks import exclusive_lock

    main_file = MAIN_FILES.get(command, "")
    is_new_folder = bool(main_file) and not output.exists()
    if is_new_folder:
        make_folder(output)
    try:
        with exclusive_lock(output / main_file):
            yield
    finally:
        if is_new_folder:
            with contextlib.suppress(OSError):  # it stays unless nothing was written to it
                output.rmdir()
