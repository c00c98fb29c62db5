"""Runs of the same prompts and seeds by other methods, joined into one.

run = join_runs(load_run("bench.jsonl"), load_run("more.jsonl"))
write_run("bench.jsonl", run)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import DataError, PairingError
from fgsteer.evaluation.runs.records import Run
from fgsteer.methods import specs
from fgsteer.storage.lines import as_line, write_lines
from fgsteer.storage.plans import describe_differences

OF_METHODS = ("methods", "layers", "settings")  # what a plan says by method


def join_runs(run: Run, other: Run) -> Run:
    """One run of the methods of two, which measured the same concepts, prompts and seeds in the same way.

    Both must be finished. The header of the joined one names both commands.

    Args:
        run: A run.
        other: A run of other methods.

    Returns:
        The run with the records of both, those of ``run`` first.

    Raises:
        DataError: Both have a method.
        PairingError: They differ in more than their methods; the error says in what.
    """
    plans = [_by_method(one.header["plan"]) for one in (run, other)]
    if both := sorted({*plans[0]["methods"]} & {*plans[1]["methods"]}):
        raise DataError(
            f"two runs of {', '.join(both)}", "runs of different methods", "leave these out: other.only(methods=...)"
        )
    first, second = (_shared(one.header) for one in (run, other))
    if first != second:
        raise PairingError(
            f"The runs differ in more than their methods: {describe_differences(first, second)}.",
            "runs of the same model, SAEs, judge, concepts, prompts, costs and sampling",
            "measure the other methods again, in the way of the first run",
        )
    known = [row.name for row in specs("bench")]
    methods = [*plans[0]["methods"], *plans[1]["methods"]]
    methods.sort(key=lambda name: known.index(name) if name in known else len(known))
    joined = {key: plans[0][key] | plans[1][key] for key in ("layers", "settings")}
    header = {
        **run.header,
        "command": " && ".join(dict.fromkeys(one.header["command"] for one in (run, other))),
        "plan": {**run.header["plan"], "methods": methods, **joined},
    }
    return Run(header, [*run.records, *other.records])


def write_run(path: str | Path, run: Run) -> None:
    """Write a run as ``load_run`` loads it, whole or not at all, compressed where the name ends with .gz.

    Raises FormatError for a file that cannot be written.
    """
    rows = [run.header, *(record.as_row() for record in run.records)]
    write_lines(path, map(as_line, rows))


def _by_method(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What a plan says by method, each method's layers apart."""
    layers = plan["layers"]
    if not isinstance(layers, Mapping):
        layers = dict.fromkeys(plan["methods"], layers)
    return {"methods": plan["methods"], "layers": dict(layers), "settings": dict(plan["settings"])}


def _shared(header: Mapping[str, Any]) -> dict[str, Any]:
    """What two runs must have in common."""
    plan = {key: value for key, value in header["plan"].items() if key not in OF_METHODS}
    return {"plan": plan, **header.get("identity", {}), "sha256": header["sha256"]}
