"""Whole processes: peak memory of collecting by the number of texts, and how long the command takes to start.

python -m timing.processes 1000 cpu     what is run to read its peak memory
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from functools import partial

import torch

import fgsteer as fg
from timing.bench import Bench
from timing.clock import Case, Contender, Row, child, measured_child, row
from timing.subjects import load, texts

COMMANDS = {
    "python": ("-c", "pass"),
    "import fgsteer": ("-c", "import fgsteer"),
    "fgsteer --help": ("-c", "from fgsteer.cli import main; main()", "--help"),
    "import torch, transformers": ("-c", "import torch, transformers"),
}
DEMO = ("-c", "from fgsteer.cli import main; main()", "demo", "--model", "default")


def memory(bench: Bench) -> Iterator[Row]:
    """Peak memory of a process that collects with features, once each; ratios are of the peaks."""
    least = 0.0
    for count in (20, 40) if bench.quick else (100, 1000, 10_000, 100_000):
        output, _, peak = measured_child(["-m", "timing.processes", str(count), str(bench.clock.device)])
        least = least or peak
        case = Case("memory", "default", "collect with features", count, "texts/s")
        yield row(case, f"{count} texts", [json.loads(output)["seconds"]], [peak / least], peak_mib=peak)


def start(bench: Bench) -> Iterator[Row]:
    """Time to import, to show help and to run the demo, with its peak memory."""
    contenders = [Contender(name, partial(child, given)) for name, given in COMMANDS.items()]
    yield from bench.clock.compare(Case("start", "", "a process"), contenders)
    arguments = (*DEMO, "love") if bench.quick else DEMO
    runs = [measured_child(arguments) for _ in range(1 if bench.quick else 3)]
    took = [seconds for _, seconds, _ in runs]
    yield row(Case("start", "default", "demo"), "fgsteer demo", took, [1.0], peak_mib=max(peak for *_, peak in runs))


def main(count: int, device: str) -> None:
    """Collect from so many texts; print the seconds that it took."""
    subject = load("default", torch.device(device), torch.float32)
    given = texts(count, sentences=1)
    data = fg.ContrastSet("texts", positives=given[::2], negatives=given[1::2])
    began = time.perf_counter()
    fg.collect(subject.model, subject.tokenizer, data, sae=subject.sae)
    print(json.dumps({"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
