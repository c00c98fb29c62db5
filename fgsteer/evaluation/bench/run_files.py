"""What a benchmark writes while it runs: records that only grow, and the strengths beside them.

A run begins with a header that says what it is made of; only the same run goes on with it.

    check_run(path, bench.identity)
    done = resume(path, bench.header(""), counts)
    append(path, records)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError
from fgsteer.storage.atomic import append_bytes
from fgsteer.storage.files import refuse_damaged
from fgsteer.storage.json_files import parse_json, read_json
from fgsteer.storage.plans import check_same_plan

BEGINNING = b'{"fgsteer": "bench"'  # by which a header that was cut off is known


@dataclass(frozen=True)
class Arm:
    """One way in which a concept's texts are made."""

    concept: str
    method: str
    layer: int | None = None
    coefficient: float = 0.0
    ce_rise: float | None = None


def strengths_path(path: Path) -> Path:
    """Where the strengths of the run ``path`` are kept."""
    return path.with_suffix(".strengths.json")


def read_arms(path: Path, identity: Mapping[str, Any]) -> dict[str, list[Arm]]:
    """Every concept's arms that this run kept; none without a file. Raises PairingError, FormatError."""
    if not path.is_file():
        return {}
    kept = read_json(path)
    with refuse_damaged(path, "the strengths that fgsteer bench keeps", "delete it"):
        noted = kept.get("identity", {})
        arms = {concept: [Arm(**entry) for entry in entries] for concept, entries in kept["arms"].items()}
        for arm in (arm for entries in arms.values() for arm in entries):
            texts, numbers = (arm.concept, arm.method), (arm.coefficient, arm.layer or 0, arm.ce_rise or 0.0)
            if not all(isinstance(text, str) for text in texts) or not all(math.isfinite(n) for n in numbers):
                raise ValueError(f"no arm: {arm}")
    check_same_plan(path, noted, identity)
    return arms


def identity_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's header says that it was made of; less than ``Bench.identity`` of one by an earlier version."""
    identity, plan = header.get("identity"), header.get("plan")
    if isinstance(plan, dict):
        plan = {key: value for key, value in plan.items() if key != "judge"}
    return {**(identity if isinstance(identity, dict) else {}), "plan": plan}


def check_run(path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
    """See that the run at ``path``, if any, is the one to go on with; ``fresh`` removes it, with its strengths.

    Raises PairingError for a run of something else, FormatError for a file that is no run.
    """
    header = _header(path)
    if fresh:
        for file in (path, strengths_path(path)):
            file.unlink(missing_ok=True)
    elif header is not None:
        check_same_plan(path, identity_of(header), identity)


def _header(path: Path) -> dict[str, Any] | None:
    """The first line of a run; None where there is no file, or one that was killed while it was begun.

    Raises FormatError for a file that is no run.
    """
    if not path.exists():
        return None
    with open(path, "rb") as file:
        first = file.readline()
    if not first.endswith(b"\n") and first[: len(BEGINNING)] == BEGINNING[: len(first)]:
        return None
    try:
        found = parse_json(first)
        if not isinstance(found, dict) or found.get("fgsteer") != "bench":
            raise ValueError("no object of fgsteer bench")
    except ValueError as error:
        raise FormatError(f"{path}, line 1 is no header: {error}", "a run of fgsteer bench") from error
    return found


def line(row: Mapping[str, Any]) -> bytes:
    """A row as a line of a run."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a file in one write, to disk. Raises FormatError."""
    append_bytes(path, b"".join(map(line, rows)))


def resume(path: Path, header: Mapping[str, Any], counts: Sequence[int]) -> int:
    """How many batches of ``counts`` records a file holds; what follows them is cut off, a missing file is begun.

    A file with a header that was cut off was killed while it was begun. Raises PairingError for a
    file of another run, FormatError for one that is no run: both are left as they are.
    """
    found = _header(path)
    if found is None:
        path.unlink(missing_ok=True)
        append(path, [header])
        return 0
    check_same_plan(path, identity_of(found), identity_of(header))
    with open(path, "rb") as file:
        file.readline()
        done, end = 0, file.tell()
        for count in counts:
            lines = list(islice(file, count))
            if len(lines) < count or not lines[-1].endswith(b"\n"):
                break
            done, end = done + 1, file.tell()
    os.truncate(path, end)
    return done
