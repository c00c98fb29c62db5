"""A benchmark whose concepts several processes share: each concept is a run of its own, joined to the same file.

run_shared(bench, "bench.jsonl")                                       under torchrun
with_ray(make_bench, ("love", "sea"), Path("bench.parts"), workers=2)  by Ray, then join(bench, ...)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError, FormatError, PairingError
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.records import HALVES
from fgsteer.evaluation.bench.run_files import check_run, line, strengths_path
from fgsteer.storage.atomic import atomic_write, rename
from fgsteer.storage.json_files import parse_json, read_json, write_json
from fgsteer.storage.locks import exclusive_lock
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.shards import wait_for_file
from fgsteer.storage.targets import make_folder


def parts_folder(path: str | Path) -> Path:
    """Where the concepts of the run ``path`` are kept until they are joined."""
    return Path(path).with_suffix(".parts")


def begun_design(path: str | Path) -> dict[str, int]:
    """Prompts and seeds a half of the run that is begun at ``path`` or in its parts folder; nothing where none is.

    A run that goes on keeps them, whatever the defaults are by now.
    """
    for file in (Path(path), *sorted(parts_folder(path).glob("*.jsonl"))):
        try:
            plan = parse_json(file.read_bytes().split(b"\n", 1)[0])["plan"]
            return {"prompts": len(plan["prompts"]) // len(HALVES), "seeds": int(plan["seeds"])}
        except (OSError, ValueError, KeyError, TypeError, OverflowError):  # none, or damaged: resuming says so
            continue
    return {}


def run_shared(
    bench: Bench,
    path: str | Path,
    command: str = "",
    progress: Progress = None,
    *,
    fresh: bool = False,
) -> bool:
    """Run this process's concepts; the first process waits for the others' and writes ``path`` as ``Bench.run`` does.

    Returns whether this is the first process. A killed run goes on, also with another number of processes; ``fresh``
    starts over. Raises as ``Bench.run`` does.
    """
    ranks, folder = Ranks.from_env(), parts_folder(path)
    mine = [concept for number, concept in enumerate(bench.plan.concepts) if ranks.owns(number)]
    with exclusive_lock(path) if ranks.rank == 0 else nullcontext():
        check_parts(bench, path, mine, fresh=fresh)
        for concept in mine:
            run_concept(bench, concept, folder, command, progress)
        if ranks.rank == 0:
            for number, concept in enumerate(bench.plan.concepts):
                wait_for_file(folder / f"{concept}.jsonl", number % ranks.world)
            join(bench, path, command)
    return ranks.rank == 0


def of_concept(bench: Bench, concept: str) -> Bench:
    """The benchmark of one concept, with what is hashed once for all of them."""
    _ = bench.identity
    alone = copy.copy(bench)
    alone.plan = replace(bench.plan, concepts=(concept,))
    return alone


def check_parts(bench: Bench, path: str | Path, mine: Iterable[str], *, fresh: bool) -> None:
    """See that the run, and its concepts that are there, are those to go on with; ``fresh`` removes them.

    Of the concepts it removes ``mine``, and those of another run, so that none of them is waited for: others of this
    run may just have been made. Raises PairingError, FormatError.
    """
    path, folder, own = Path(path), parts_folder(path), set(mine)
    if Ranks.from_env().rank == 0 or not fresh:
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
    _ = bench.coherence  # fitted once for all concepts
    make_folder(folder)
    of_concept(bench, concept).run(running, command, progress)
    rename(strengths_path(running), strengths_path(done))
    rename(running, done)


def join(bench: Bench, path: str | Path, command: str = "") -> None:
    """Write the run whose concepts are all in its folder, whole. Raises PairingError for those of another run."""
    path, folder, header = Path(path), parts_folder(path), bench.header(command)
    arms: dict[str, Any] = {}
    records = []
    for concept in bench.plan.concepts:
        part = folder / f"{concept}.jsonl"
        check_run(part, of_concept(bench, concept).identity)
        records.append(_records(part))
        arms |= read_json(strengths_path(part))["arms"]
    write_json(strengths_path(path), {"identity": bench.identity, "arms": arms})
    with atomic_write(path) as beside:
        beside.write_bytes(line(header) + b"".join(records))


def _records(path: Path) -> bytes:
    """The lines of a run after its header. Raises FormatError."""
    try:
        return path.read_bytes().partition(b"\n")[2]
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror}", "a run of fgsteer bench") from error


def with_ray(
    make: Callable[[], Bench],
    concepts: Iterable[str],
    folder: Path,
    *,
    workers: int,
    command: str = "",
    progress: Progress = None,
) -> None:
    """Run concepts in ``workers`` processes of Ray, here or on its cluster, each with a benchmark of its own.

    A worker takes a GPU where there are some, else its share of the cores. ``progress`` gets (concepts done,
    concepts in all). Raises DataError without Ray, or where the workers cannot start, and what a run raises.
    """
    try:
        import ray
        from ray.util import ActorPool
    except ImportError as error:
        raise DataError("--engine ray without Ray", "Ray", "pip install 'fgsteer[ray]'") from error
    import torch

    if not ray.is_initialized():
        ray.init(log_to_driver=False, include_dashboard=False)
    there = ray.cluster_resources()
    threads = max(1, int(there.get("CPU", 1)) // workers)
    share = {"num_gpus": 1} if there.get("GPU", 0) >= workers else {"num_cpus": threads}

    class Worker:
        def __init__(self) -> None:
            torch.set_num_threads(threads)
            self.bench = make()

        def run(self, concept: str) -> str:
            run_concept(self.bench, concept, folder.absolute(), command)
            return concept

    names = list(concepts)
    actors = [ray.remote(Worker).options(**share).remote() for _ in range(min(workers, len(names)))]
    done = ActorPool(actors).map_unordered(lambda actor, concept: actor.run.remote(concept), names)
    with reporting(progress, "writing concepts", len(names)) as report:
        for number, _ in enumerate(done, 1):
            report(number, len(names))
    for actor in actors:
        ray.kill(actor)
