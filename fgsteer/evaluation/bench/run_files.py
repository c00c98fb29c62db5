"""What a benchmark writes while it runs: a file of records that only grows, and a file of strengths beside it.

A run's first line is a header that says what the run is made of; only the same benchmark goes on with it. A run whose
name ends with .gz is written without that ending, and compressed when it is done.

    check_run(path, bench.identity)
    done = resume(path, bench.header(""), counts)
    append(path, records)
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError
from fgsteer.storage.atomic import append_bytes
from fgsteer.storage.files import refuse_damaged
from fgsteer.storage.json_files import parse_json, read_json, write_json
from fgsteer.storage.lines import SUFFIX, as_line, compress, decompress, read_lines
from fgsteer.storage.plans import check_same_plan

BEGINNING = b'{"fgsteer": "bench"'  # by which a header that was cut off is known


@dataclass(frozen=True)
class Condition:
    """What a concept's texts are generated under: a method at a layer with a coefficient, or no steering.

    ``ce_rise`` is the cost in nats a token that the coefficient was calibrated to, ``kl`` that in nats an own text;
    None where it was calibrated to another, and where nothing steers.
    """

    concept: str
    method: str
    layer: int | None = None
    coefficient: float = 0.0
    ce_rise: float | None = None
    kl: float | None = None

    @property
    def cost(self) -> float | None:
        """The cost that the coefficient was calibrated to."""
        return self.ce_rise if self.kl is None else self.kl


def strengths_path(path: Path) -> Path:
    """Where the strengths of the run ``path`` are kept."""
    return plain_path(path).with_suffix(".strengths.json")


def plain_path(path: Path) -> Path:
    """Where the run ``path`` is written until it is done: a file that ends with .gz cannot be added to."""
    return path.with_suffix("") if path.suffix == SUFFIX else path


def unpack_run(path: Path) -> None:
    """Make the plain file of a run that was compressed, so that it can be added to. Raises FormatError."""
    if path.exists() and not plain_path(path).exists():
        decompress(path, plain_path(path))


def pack_run(path: Path) -> None:
    """Leave a run that is done compressed, where its name ends with .gz. Raises FormatError."""
    if plain_path(path) != path:
        compress(plain_path(path), path)
        plain_path(path).unlink()


def load_conditions(path: Path, identity: Mapping[str, Any]) -> dict[str, list[Condition]]:
    """Load every concept's conditions that this run kept at ``path``; none where there is no file.

    Raises:
        PairingError: The file is of another run.
        FormatError: The file is damaged.
    """
    if not path.is_file():
        return {}
    content = read_json(path)
    with refuse_damaged(path, "the strengths that fgsteer bench keeps", "delete the file: it is made again"):
        kept_identity = content.get("identity", {})
        conditions = {
            concept: [_parse_condition(entry) for entry in entries] for concept, entries in content["arms"].items()
        }
    check_same_plan(path, kept_identity, identity)
    return conditions


def _parse_condition(entry: Mapping[str, Any]) -> Condition:
    """A condition of its JSON object. Raises TypeError, ValueError."""
    condition = Condition(**entry)
    numbers = (condition.coefficient, condition.layer or 0, condition.cost or 0.0)
    texts = (condition.concept, condition.method)
    if not all(isinstance(text, str) for text in texts) or not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{condition} is not a condition")
    return condition


def save_conditions(path: Path, identity: Mapping[str, Any], conditions: Mapping[str, Sequence[Condition]]) -> None:
    """Write every concept's conditions, as ``load_conditions`` loads them. Raises FormatError."""
    entries = {concept: [asdict(condition) for condition in listed] for concept, listed in conditions.items()}
    write_json(path, {"identity": identity, "arms": entries})


def identity_of(header: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's header says that it was made of; less than ``Bench.identity`` of a run by an earlier version."""
    identity, plan = header.get("identity"), header.get("plan")
    if isinstance(plan, dict):
        plan = {key: value for key, value in plan.items() if key != "judge"}
    return {**(identity if isinstance(identity, dict) else {}), "plan": plan}


def check_run(path: str | Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
    """Check that the run at ``path``, if there is one, is the one to go on with.

    Args:
        path: The file of records.
        identity: What the run is made of (``Bench.identity``).
        fresh: Remove the run and its strengths instead.

    Raises:
        PairingError: The run is of something else.
        FormatError: The file is not a run.
    """
    path = Path(path)
    plain = plain_path(path)
    written = plain if plain.exists() else path
    header = _load_header(written)
    if fresh:
        for file in (plain, path, strengths_path(path)):
            file.unlink(missing_ok=True)
    elif header is not None:
        check_same_plan(written, identity_of(header), identity)


def _load_header(path: Path) -> dict[str, Any] | None:
    """The first line of a run; None where there is no file, or where a writer was killed in its first line.

    Raises FormatError for a file that is not a run.
    """
    if not path.exists():
        return None
    first = next(read_lines(path), b"")
    if not first.endswith(b"\n") and first[: len(BEGINNING)] == BEGINNING[: len(first)]:
        return None
    try:
        header = parse_json(first)
        if not isinstance(header, dict) or header.get("fgsteer") != "bench":
            raise ValueError("it is not an object that fgsteer bench wrote")
    except ValueError as error:
        raise FormatError(
            f"Line 1 of {path} is not the header of a run: {error}.",
            "a run of fgsteer bench",
            "write the run to another file",
        ) from error
    return header


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a file in one write, to disk. Raises FormatError."""
    append_bytes(path, b"".join(map(as_line, rows)))


def resume(path: Path, header: Mapping[str, Any], counts: Sequence[int]) -> int:
    """Count the whole batches in a run, cut off what follows them, and begin the run where there is none.

    A file with a header that was cut off belongs to a run that was killed while it began: it is begun again. A file
    that is refused is left as it is.

    Args:
        path: The file of records.
        header: The run's first line.
        counts: Records of each batch, in the order in which batches are written.

    Returns:
        How many batches the file holds.

    Raises:
        PairingError: The file is of another run.
        FormatError: The file is not a run.
    """
    kept_header = _load_header(path)
    if kept_header is None:
        path.unlink(missing_ok=True)
        append(path, [header])
        return 0
    check_same_plan(path, identity_of(kept_header), identity_of(header))
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
