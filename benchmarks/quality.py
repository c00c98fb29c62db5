"""SAE methods against plain CAA on the embedded default: settings tuned on one half, measured on the other.

What: every setting of a small grid runs on the tuning half alone; each method keeps the setting with the best mean
BCS over the concepts, every concept at its best strength. Then all methods run on both halves.
Why: a method tuned on the texts that it is reported on beats anything.

    python benchmarks/quality.py            writes results/{tuning.json, bench.jsonl, report.html, table.md, *.png}
    python benchmarks/quality.py --readme   puts the table into README.md
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import fgsteer as fg
from fgsteer.evaluation.bench import Bench, BenchPlan
from fgsteer.evaluation.plots import save_all
from fgsteer.evaluation.records import best_settings
from fgsteer.evaluation.report import markdown
from fgsteer.files import whole, write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE.parent / "README.md"
MARK = re.compile(r"(<!-- quality -->\n).*?(<!-- /quality -->)", re.S)

PROJECTION = {"mu": (0.1, 0.3, 1.0), "bias_weight": (0.0, 0.5, 1.0)}
GRID: dict[str, dict[str, tuple[Any, ...]]] = {
    "sta": {"p": (0.002, 0.01, 0.05, 0.35)},
    "fgaa": {"n_positive": (4, 8, 16, 32), "n_negative": (0, 8)},
    "fgaa_effects": {"n_positive": (4, 16), **PROJECTION},
    "sae_ts": PROJECTION,
}


def variants(method: str) -> list[dict[str, Any]]:
    """Every setting of a method's grid."""
    grid = GRID[method]
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def tune(parts: Mapping[str, Any], concepts: tuple[str, ...], layer: int, work: Path) -> dict[str, Any]:
    """{method: {"settings", "rows"}}: the best setting, and the mean BCS of every one on the tuning half."""
    found: dict[str, Any] = {}
    for method in GRID:
        rows = []
        for number, settings in enumerate(variants(method)):
            plan = BenchPlan(
                concepts,
                methods=(method,),
                layers=(layer,),
                matched=None,
                seeds=1,
                halves=("tune",),
                settings={method: settings},
            )
            path = work / f"{method}-{number}.jsonl"
            Bench(**parts, plan=plan).run(path)
            run = fg.load_run(path)
            chosen = [run.mean(setting, "tune") for setting in best_settings(run).values()]
            rows.append({"settings": settings, "bcs": sum(chosen) / len(chosen)})
            print(method, rows[-1], flush=True)
        best = max(rows, key=lambda row: row["bcs"])
        found[method] = {"settings": best["settings"], "rows": rows}
    return found


def main() -> None:
    """Tune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "quality", help="folder of tuning runs")
    parser.add_argument("--readme", action="store_true", help="only put the table into README.md")
    arguments = parser.parse_args()
    path = RESULTS / "bench.jsonl"
    if arguments.readme:
        table = markdown(fg.load_run(path))
        README.write_text(MARK.sub(lambda m: m[1] + table + m[2], README.read_text("utf-8")), "utf-8")
        return
    began = time.monotonic()
    model, tokenizer = fg.load_model("default")
    sae, effects = fg.load_sae("default"), fg.load_effects("default")
    layer = sae.hookpoint.layer
    parts = {
        "model": model,
        "tokenizer": tokenizer,
        "saes": {layer: sae},
        "effects": {layer: effects},
        "judge": fg.EmbeddingJudge(),
    }
    concepts = tuple(fg.shipped_contrasts())
    tuned = tune(parts, concepts, layer, arguments.work)
    write_json(RESULTS / "tuning.json", tuned)
    settings = {method: entry["settings"] for method, entry in tuned.items()}
    plan = BenchPlan(concepts, layers=(layer,), settings=settings)
    Bench(**parts, plan=plan).run(path, "python benchmarks/quality.py", lambda done, of: print(done, of, flush=True))
    run = fg.load_run(path)
    with whole(RESULTS / "table.md") as beside:
        beside.write_text(markdown(run) + "\nAt matched cost:\n\n" + markdown(run, plan.matched), "utf-8")
    fg.write_report(run, RESULTS / "report.html")
    save_all(run, RESULTS)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
