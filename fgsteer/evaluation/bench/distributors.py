"""Who spreads a benchmark's work: one process, the processes of torchrun, or workers of Ray.

Torchrun().run(bench, "bench.jsonl")                        in every process that torchrun started
RayWorkers(make_bench, workers=2).run(bench, "bench.jsonl")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol, runtime_checkable

from fgsteer.display.progress import Progress, reporting
from fgsteer.errors import DataError
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.concept_runs import (
    check_concepts,
    concepts_folder,
    join_concepts,
    run_concept,
)
from fgsteer.evaluation.bench.run_files import plain_path
from fgsteer.storage.locks import exclusive_lock
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.shards import wait_for_file


@runtime_checkable
class Distributor(Protocol):
    """What runs a benchmark, in one process or several. Every distributor ends with the same file."""

    def run(
        self,
        bench: Bench,
        path: str | Path,
        command: str = "",
        progress: Progress = None,
        *,
        fresh: bool = False,
    ) -> bool:
        """Write all records of a benchmark to a file, after those of an earlier run of the same benchmark.

        Args:
            bench: The benchmark.
            path: The file of records.
            command: How the run was started, for its header.
            progress: Called with how many are done and how many there are.
            fresh: Start over.

        Returns:
            Whether this process holds the finished run, and so reports it.
        """


class OneProcess:
    """Runs the benchmark in this process."""

    def run(
        self,
        bench: Bench,
        path: str | Path,
        command: str = "",
        progress: Progress = None,
        *,
        fresh: bool = False,
    ) -> bool:
        """Run; see ``Distributor``. Raises as ``Bench.run`` does."""
        bench.run(path, command, progress, fresh=fresh)
        return True


class Torchrun:
    """Shares the concepts among the processes that torchrun, or whoever else sets RANK and WORLD_SIZE, started.

    The first process waits for the others and joins their concepts. A killed run goes on, also with another number
    of processes.
    """

    def run(
        self,
        bench: Bench,
        path: str | Path,
        command: str = "",
        progress: Progress = None,
        *,
        fresh: bool = False,
    ) -> bool:
        """Run this process's concepts; see ``Distributor``. Raises as ``Bench.run`` does."""
        ranks, folder = Ranks.from_env(), concepts_folder(path)
        own = [concept for number, concept in enumerate(bench.plan.concepts) if ranks.owns(number)]
        first = ranks.rank == 0
        with exclusive_lock(plain_path(Path(path))) if first else nullcontext():
            check_concepts(bench, path, own, fresh=fresh, first=first)
            for concept in own:
                run_concept(bench, concept, folder, command, progress)
            if first:
                for number, concept in enumerate(bench.plan.concepts):
                    wait_for_file(folder / f"{concept}.jsonl", number % ranks.world)
                join_concepts(bench, path, command)
        return first


class RayWorkers:
    """Runs concepts in processes of Ray, here or on its cluster.

    A worker takes a GPU where there is one for each, else its share of the cores.

    Args:
        make: Makes the benchmark again, in a worker. It must pickle.
        workers: Number of processes.
    """

    def __init__(self, make: Callable[[], Bench], workers: int) -> None:
        self.make, self.workers = make, workers

    def run(
        self,
        bench: Bench,
        path: str | Path,
        command: str = "",
        progress: Progress = None,
        *,
        fresh: bool = False,
    ) -> bool:
        """Run; see ``Distributor``. ``progress`` counts concepts.

        Raises:
            DataError: Ray is not installed, or its workers cannot start.

        Raises as ``Bench.run`` does besides.
        """
        check_concepts(bench, path, bench.plan.concepts, fresh=fresh)
        self._run_concepts(bench.plan.concepts, concepts_folder(path).absolute(), command, progress)
        join_concepts(bench, path, command)
        return True

    def _run_concepts(self, concepts: Iterable[str], folder: Path, command: str, progress: Progress) -> None:
        """Run the concepts in workers, each of which has a benchmark of its own."""
        try:
            import ray
            from ray.util import ActorPool
        except ImportError as error:
            raise DataError("Ray cannot be imported.", "", "install it with pip install 'fgsteer[ray]'") from error
        import torch

        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        resources = ray.cluster_resources()
        threads = max(1, int(resources.get("CPU", 1)) // self.workers)
        share = {"num_gpus": 1} if resources.get("GPU", 0) >= self.workers else {"num_cpus": threads}
        make = self.make

        class Worker:
            def __init__(self) -> None:
                torch.set_num_threads(threads)
                self.bench = make()

            def run(self, concept: str) -> str:
                run_concept(self.bench, concept, folder, command)
                return concept

        names = list(concepts)
        actors = [ray.remote(Worker).options(**share).remote() for _ in range(min(self.workers, len(names)))]
        finished = ActorPool(actors).map_unordered(lambda actor, concept: actor.run.remote(concept), names)
        with reporting(progress, "writing concepts", len(names)) as report:
            for number, _ in enumerate(finished, 1):
                report(number, len(names))
        for actor in actors:
            ray.kill(actor)
