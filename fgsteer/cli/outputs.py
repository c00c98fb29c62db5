"""The files and folders that commands write: none is an input too, and no two processes write one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import DataError
from fgsteer.storage.targets import make_folder

FILLED = {"bench": "bench.jsonl", "sweep": "sweep.json"}  # commands that fill a folder, and what they hold in it
OUTPUTS = ("out", "html", "work")  # the parameters that say where a command writes
SHIPPED_OR_FILES = (
    "contrast",
    "source",
    "concept",
    "held_out",
    "model",
    "sae",
    "rows_of",
    "effects",
)  # shipped, or files


def check_apart(paths: Mapping[str, tuple[str, Any]]) -> None:
    """Refuse an output that is an input too, by another name or link as well, or two that are one.

    ``paths`` is {option: (parameter, path or paths or None)} of those that may name files. Raises DataError.
    """
    outputs = {option: Path(value) for option, (name, value) in paths.items() if name in OUTPUTS and value is not None}
    for option, (name, value) in paths.items():
        for given in value if isinstance(value, list | tuple) else [value]:
            for other, output in outputs.items():
                if option == other or given is None or not _one(given, output, name in OUTPUTS):
                    continue
                if name not in SHIPPED_OR_FILES or not _is_shipped(str(given)):
                    raise DataError(
                        f"{option} {given} and {other} {output} are one file",
                        "another one to write: what is read stays as it is",
                    )


def _one(first: str | Path, second: Path, outputs: bool) -> bool:
    """Whether two paths are one file, which two outputs may be that are not there yet."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(first, second)
    return outputs and os.path.realpath(first) == os.path.realpath(second)


def _is_shipped(name: str) -> bool:
    from fgsteer.data.contrasts import shipped_contrasts
    from fgsteer.models.embedded import DEFAULT

    return name == DEFAULT or name in shipped_contrasts()


@contextlib.contextmanager
def written_alone(output: Path, file: str) -> Iterator[None]:
    """A block in which no other process writes an output, of a folder the file that tells whose it is."""
    from fgsteer.storage.locks import exclusive_lock

    new = bool(file) and not output.exists()
    if new:
        make_folder(output)
    try:
        with exclusive_lock(output / file):
            yield
    finally:
        if new:  # and nothing was written after all
            with contextlib.suppress(OSError):
                output.rmdir()
