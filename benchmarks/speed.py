"""How fast fgsteer is, beside the least that the work takes and beside steering-vectors and repeng, in one run.

What: reading activations, encoding, memory, steered generation, measuring effects, training, starting up. Contenders
take turns; a ratio is a contender's time over the first one's in the same turn, given as median and quartiles. Results
that must be the same are compared, and the exit status is 1 where they are not.
Why: times of two runs, or of two machines, tell little; ratios within one run do.

    python benchmarks/speed.py              writes results/speed.json, about forty minutes on two cores
    python benchmarks/speed.py --only step  the same for one section, in place of what results/speed.json has of it
    .venv-vllm/bin/python benchmarks/speed.py --only serving    vLLM, which make test-vllm installs
    python benchmarks/speed.py --quick      tiny models, two turns, writes nothing
    python benchmarks/speed.py --docs       puts the tables of results/speed.json into docs/benchmarks.md
    sh benchmarks/peers.sh build/peers      makes an environment with the peers; build/peers/bin/python runs this in it

Parts, in timing/: clock.py (turns), subjects.py (models, texts), peers.py, reading.py, steering.py, training.py,
processes.py, serving.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from subject import command_of
from timing import peers, processes, reading, serving, steering, training
from timing.bench import Bench
from timing.clock import Clock, Row, facts
from timing.subjects import MODELS

from fgsteer.storage.json_files import read_json, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "speed.json"
PAGE = HERE.parent / "docs" / "benchmarks.md"
MARK = re.compile(r"(<!-- speed -->\n).*?(<!-- /speed -->)", re.S)

SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "collect": reading.collect,
    "encode": reading.encode,
    "memory": processes.memory,
    "step": steering.step,
    "generate": steering.generate,
    "effects": steering.effects,
    "train": training.train,
    "start": processes.start,
    "serving": serving.serving,
}
DEFAULT_SECTIONS = [name for name in SECTIONS if name != "serving" or serving.INSTALLED]  # vLLM has its own environment


def number(value: float) -> str:
    """A ratio or a time, to about three figures."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def line(row: Row) -> str:
    """One row of the printed table."""
    low, middle, high = row.ratio
    parts = [
        f"{row.section:9}{row.model:11}{row.case:29}{row.contender:40}",
        f"{number(row.seconds[1]):>7} s  x {number(middle):>5} [{number(low)} - {number(high)}]",
        f"  {number(row.rate)} {row.unit}" if row.rate else "",
        f"  {row.peak_mib:,.0f} MiB" if row.peak_mib else "",
        "" if row.agrees else f"  DIFFERS from {row.like} by {row.difference:.3g}",
    ]
    return "".join(parts)


def cell(row: dict[str, Any], first: bool) -> str:
    """A cell of a table: a case's first contender by its speed, others by ratio ± half the quartile range."""
    low, middle, high = row["ratio"]
    if row["peak_mib"]:
        return f"{number(row['seconds'][1])} s, {row['peak_mib']:,.0f} MiB"
    if not first:
        return f"{number(middle)} ± {number((high - low) / 2)}"
    return f"{number(row['rate'])} {row['unit']}" if row["rate"] else f"{number(row['seconds'][1])} s"


def all_rows(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of every run, in the order of sections."""
    found = [row for run in document["runs"] for row in run["rows"]]
    return sorted(found, key=lambda row: list(SECTIONS).index(row["section"]))


def added(document: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The document with a run, whose sections take the place of those that it had."""
    runs = []
    for old in document["runs"]:
        kept = [section for section in old["sections"] if section not in run["sections"]]
        if kept:
            runs.append({**old, "sections": kept, "rows": [row for row in old["rows"] if row["section"] in kept]})
    return {"runs": [*runs, run]}


def markdown(document: dict[str, Any]) -> str:
    """The page's tables, one a section: contenders down, cases across."""
    facts = [run["facts"] for run in document["runs"]]
    machines = (f["cpu"] if f["device"] == "cpu" else f["device"] for f in facts)
    told = zip(machines, facts, strict=True)
    tables = ["; ".join(dict.fromkeys(f"{name}, {f['threads']} threads, {f['dtype']}" for name, f in told)) + "."]
    for section in dict.fromkeys(row["section"] for row in all_rows(document)):
        rows = [row for row in all_rows(document) if row["section"] == section]
        cases = list(dict.fromkeys((row["model"], row["case"]) for row in rows))
        table = {(row["contender"], (row["model"], row["case"])): row for row in rows}
        leaders = {case: next(r["contender"] for r in rows if (r["model"], r["case"]) == case) for case in cases}
        lines = [
            f"| {section} | {' | '.join(f'{model} {case}'.strip() for model, case in cases)} |",
            "|---" * (len(cases) + 1) + "|",
        ]
        for name in dict.fromkeys(row["contender"] for row in rows):
            cells = [cell(table[name, c], leaders[c] == name) if (name, c) in table else "" for c in cases]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def digest(run: dict[str, Any]) -> dict[str, Any]:
    """Facts and median ratios of a run, short enough for one line."""
    ratios: dict[str, Any] = {}
    for row in run["rows"]:
        at = ratios.setdefault(row["section"], {}).setdefault(f"{row['model']} {row['case']}".strip(), {})
        at[row["contender"]] = float(f"{row['ratio'][1]:.3g}")
    agree = all(row["agrees"] for row in run["rows"])
    return {"facts": run["facts"], "missing": run["missing"], "agree": agree, "ratios": ratios}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, two turns, no file unless --out")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=DEFAULT_SECTIONS, help="sections")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="models, by default all")
    parser.add_argument("--repetitions", type=int, help="turns, 7 by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the models")
    parser.add_argument("--threads", type=int, help="CPU threads, by default what torch takes")
    parser.add_argument("--out", type=Path, help="by default results/speed.json")
    parser.add_argument("--docs", action="store_true", help="only put the tables into docs/benchmarks.md")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Time, print, write; 1 where results differ."""
    options = parse(argv)
    out = options.out or (None if options.quick else RESULTS)
    if options.docs:
        table = markdown(read_json(options.out or RESULTS))
        PAGE.write_text(MARK.sub(lambda m: m[1] + table + m[2], PAGE.read_text("utf-8")), "utf-8")
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    found, missing = peers.find()
    for name, why in missing.items():
        print(f"without {name}: {why}")
    turns = options.repetitions or (2 if options.quick else 7)
    clock = Clock(device, turns, at_least=0.0 if options.quick else 0.02)
    models = options.models or [name for name in MODELS if name != "smollm2" or not options.quick]
    bench = Bench(clock, models, dtype, options.quick, found)
    command = command_of("speed", argv)
    run: dict[str, Any] = {"command": command, "facts": facts(device, dtype), "missing": missing}
    run |= {"sections": options.only, "rows": []}
    for section in options.only:
        for row in SECTIONS[section](bench):
            print(line(row), flush=True)
            run["rows"].append(asdict(row))
    if out:
        write_json(out, added(read_json(out) if out.exists() else {"runs": []}, run))
    summary = digest(run)
    print(json.dumps(summary))
    return 0 if summary["agree"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
