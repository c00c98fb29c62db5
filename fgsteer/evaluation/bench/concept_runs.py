"""A run by concepts: each concept is a run of its own in a folder beside the file, joined to the same file.

So several processes, on one machine or many, can share a benchmark, and what is finished of a killed one is kept.

    for concept in bench.plan.concepts: run_concept(bench, concept, concepts_folder(path))
    join_concepts(bench, path)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fgsteer.display.progress import Progress
from fgsteer.errors import FormatError, PairingError
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.run_files import check_run, pack_run, plain_path, strengths_path
from fgsteer.evaluation.runs.records import HALVES
from fgsteer.storage.atomic import atomic_write, rename
from fgsteer.storage.json_files import parse_json, read_json, write_json
from fgsteer.storage.lines import as_line, read_lines
from fgsteer.storage.targets import make_folder


def concepts_folder(path: str | Path) -> Path:
    """Where the concepts of the run ``path`` are kept until they are joined."""
    return plain_path(Path(path)).with_suffix(".parts")


def begun_design(path: str | Path) -> dict[str, int]:
    """{"prompts", "seeds"} a half of the run that is begun at ``path`` or by concepts; empty where none is.

    A run that goes on keeps them, whatever the defaults are by now. A damaged file is passed over here: resuming
    says what is wrong with it.
    """
    for file in (plain_path(Path(path)), Path(path), *sorted(concepts_folder(path).glob("*.jsonl"))):
        try:
            plan = parse_json(next(read_lines(file), b""))["plan"]
            return {"prompts": len(plan["prompts"]) // len(HALVES), "seeds": int(plan["seeds"])}
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            continue
    return {}


def of_concept(bench: Bench, concept: str) -> Bench:
    """The benchmark of one concept, with what is hashed once for all of them."""
    _ = bench.identity
    alone = copy.copy(bench)
    alone.plan = replace(bench.plan, concepts=(concept,))
    return alone


def check_concepts(bench: Bench, path: str | Path, own: Iterable[str], *, fresh: bool, first: bool = True) -> None:
    """Check that the run, and its concepts that are there, are those to go on with.

    Args:
        bench: The benchmark.
        path: The file of the whole run.
        own: The concepts that this process runs.
        fresh: Remove the run and this process's concepts, and those of another run, so that none of them is waited
            for. Others of this run may just have been made: they stay.
        first: Whether this process writes the whole run, and so may remove it.

    Raises:
        PairingError: One of them is of another run.
        FormatError: One of them is damaged.
    """
    path, folder, own = Path(path), concepts_folder(path), set(own)
    if first or not fresh:
        check_run(path, bench.identity, fresh=fresh)
    for concept in bench.plan.concepts:
        identity = of_concept(bench, concept).identity
        for file in (folder / f"{concept}.jsonl", folder / f"{concept}.running.jsonl"):
            try:
                check_run(file, identity, fresh=fresh and concept in own)
            except PairingError:
                if not fresh:
                    raise
                check_run(file, identity, fresh=True)


def run_concept(bench: Bench, concept: str, folder: Path, command: str = "", progress: Progress = None) -> None:
    """Write ``folder/CONCEPT.jsonl``, the run of one concept, unless it is there. Raises as ``Bench.run`` does."""
    done, running = folder / f"{concept}.jsonl", folder / f"{concept}.running.jsonl"
    if done.exists():
        return
    if bench.coherence is None:
        _ = bench.fitted_coherence  # once for all concepts
    make_folder(folder)
    of_concept(bench, concept).run(running, command, progress)
    rename(strengths_path(running), strengths_path(done))
    rename(running, done)


def join_concepts(bench: Bench, path: str | Path, command: str = "") -> None:
    """Write the run whose concepts are all in its folder, all of it or nothing.

    Raises:
        PairingError: A concept is of another run.
        FormatError: A concept's file cannot be read, or the run cannot be written.
    """
    path, folder, header = Path(path), concepts_folder(path), bench.header(command)
    conditions: dict[str, Any] = {}
    records = []
    for concept in bench.plan.concepts:
        file = folder / f"{concept}.jsonl"
        check_run(file, of_concept(bench, concept).identity)
        records.append(_record_lines(file))
        conditions |= read_json(strengths_path(file))["arms"]
    write_json(strengths_path(path), {"identity": bench.identity, "arms": conditions})
    with atomic_write(plain_path(path)) as temporary:
        temporary.write_bytes(as_line(header) + b"".join(records))
    pack_run(path)


def _record_lines(path: Path) -> bytes:
    """The lines of a run after its header. Raises FormatError."""
    try:
        return path.read_bytes().partition(b"\n")[2]
    except OSError as error:
        raise FormatError(f"Cannot read {path}: {error.strerror}.", "the finished run of a concept") from error
