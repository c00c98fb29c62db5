"""A check of the benchmark's scores against a blind reading: a hundred texts, shuffled, without their condition.

    python benchmarks/blind.py draw results/smollm2/bench.jsonl -o results/smollm2/blind.json
    python benchmarks/blind.py score results/smollm2/blind.json --reader "who or what read"

The first command writes the texts, each with the behavior that was looked for and its prompt, and two empty scores: 0
to 2 for the behavior (not at all, a little, clearly) and for fluency (broken, odd, fluent). What steered a text, and
what the judge said of it, stands in a file beside it, blind.key.json, which the reader leaves closed. The second
command correlates the reader's ranks with the judge's and with coherence, and writes the result into blind.result.json.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

import fgsteer as fg
from fgsteer.errors import DataError
from fgsteer.evaluation.runs.records import EvalRecord, Run
from fgsteer.storage.json_files import read_json, write_json

TEXTS = 100
RESAMPLES = 1000
HIGHEST = 2  # of a reader's scores
ASKED = {"behavior": "behavior", "fluency": "coherence"}  # what the reader scores, and what it is compared with


def draw(run: Run, number: int, seed: int) -> list[EvalRecord]:
    """Records of the half "report" in random order, as many of each method as can be, and of each concept of it."""
    rng = random.Random(seed)
    by_method: dict[str, list[EvalRecord]] = {}
    for record in run.records:
        if record.half == "report" and record.matched is None:
            by_method.setdefault(record.method, []).append(record)
    for records in by_method.values():
        rng.shuffle(records)
    chosen: list[EvalRecord] = []
    taken: dict[tuple[str, str], int] = {}
    while len(chosen) < number and any(by_method.values()):
        for method in rng.sample(sorted(by_method), len(by_method)):
            if len(chosen) < number and (left := by_method[method]):
                record = min(left, key=lambda r: taken.get((r.method, r.concept), 0))
                left.remove(record)
                taken[method, record.concept] = taken.get((method, record.concept), 0) + 1
                chosen.append(record)
    rng.shuffle(chosen)
    return chosen


def shown(number: int, record: EvalRecord, prompts: Sequence[Any]) -> dict[str, Any]:
    """What the reader sees of a record."""
    prompt = prompts[record.prompt]
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    behavior = fg.load_contrast(record.concept).description
    return {"id": number, "sought": behavior, "prompt": asked, "text": record.text, "behavior": None, "fluency": None}


def correlate(
    read: Sequence[Mapping[str, Any]], key: Sequence[Mapping[str, Any]], what: str, seed: int = 0
) -> dict[str, Any]:
    """Spearman's rank correlation of a reader's scores with the benchmark's, with a 95 % interval over prompts.

    The interval is that of a percentile bootstrap of whole prompts, as texts of one prompt resemble each other.
    """
    ours = np.array([entry[ASKED[what]] for entry in key])
    theirs = np.array([entry[what] for entry in read], dtype=float)
    clusters: dict[int, list[int]] = {}
    for place, entry in enumerate(key):
        clusters.setdefault(entry["prompt"], []).append(place)
    names, rng = sorted(clusters), np.random.default_rng(seed)
    draws = []
    while len(draws) < RESAMPLES:
        places = [place for name in rng.choice(names, len(names)) for place in clusters[name]]
        if np.ptp(ours[places]) > 0 and np.ptp(theirs[places]) > 0:  # ranks of equal scores have no correlation
            draws.append(spearmanr(ours[places], theirs[places]).statistic)
    low, high = np.quantile(draws, [0.025, 0.975])
    rho = float(spearmanr(ours, theirs).statistic)
    return {"rho": rho, "low": float(low), "high": float(high), "texts": len(ours), "prompts": len(names)}


def check(read: Sequence[Mapping[str, Any]], key: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Raise DataError for a text that is not scored, or answers of another drawing."""
    if [entry["id"] for entry in read] != [entry["id"] for entry in key]:
        raise DataError(f"{path} with other texts than its key", "the file that was drawn, with scores filled in")
    for entry in read:
        for what in ASKED:
            if entry[what] not in range(HIGHEST + 1):
                raise DataError(
                    f"{what} {entry[what]!r} of text {entry['id']} in {path}",
                    f"a whole number from 0 to {HIGHEST}",
                    "read the text and score it",
                )
    for what in ASKED:
        if len({entry[what] for entry in read}) == 1:
            raise DataError(f"one score of {what} for all texts of {path}", "scores that differ")


def beside(path: Path, part: str) -> Path:
    """blind.json -> blind.key.json."""
    return path.with_name(f"{path.stem}.{part}.json")


def main() -> None:
    """Draw texts, or correlate what was read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="write texts to read")
    drawing.add_argument("run", type=Path, help="records of a benchmark")
    drawing.add_argument("-o", "--out", type=Path, required=True)
    drawing.add_argument("--texts", type=int, default=TEXTS)
    drawing.add_argument("--seed", type=int, default=0)
    scoring = commands.add_parser("score", help="correlate what was read with the scores")
    scoring.add_argument("read", type=Path)
    scoring.add_argument("--reader", required=True, help="who or what read the texts")
    arguments = parser.parse_args()
    command = shlex.join(["python", "benchmarks/blind.py", *sys.argv[1:]])
    if arguments.command == "draw":
        run = fg.load_run(arguments.run)
        records = draw(run, arguments.texts, arguments.seed)
        prompts = run.header["plan"]["prompts"]
        write_json(arguments.out, {"texts": [shown(n, record, prompts) for n, record in enumerate(records)]})
        key = [{"id": number, **record.as_row()} for number, record in enumerate(records)]
        write_json(beside(arguments.out, "key"), {"command": command, "records": key})
        return
    read, key = read_json(arguments.read)["texts"], read_json(beside(arguments.read, "key"))["records"]
    check(read, key, arguments.read)
    result = {what: correlate(read, key, what) for what in ASKED}
    write_json(beside(arguments.read, "result"), {"command": command, "reader": arguments.reader, **result})
    for what, found in result.items():
        print(f"{what} with {ASKED[what]}: rho {found['rho']:.2f} [{found['low']:.2f}, {found['high']:.2f}]")


if __name__ == "__main__":
    main()
