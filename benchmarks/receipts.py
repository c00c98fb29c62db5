"""Behavior against KL on own text, and receipts, of vectors for one concept on SmolLM2.

Strengths are set so that own texts cost the same, on the tuning half of the prompts; behavior, KL and the least that
the behavior could cost are those of the reported half. Receipts are of CAA, of FGAA with effects and of a random
direction, each of norm 1 at the strength of one of these costs.

    python benchmarks/receipts.py            writes results/smollm2/receipts.json, .md, .jsonl.gz and the picture
    python benchmarks/receipts.py --docs     puts the tables into docs/guides/receipts.md
"""

from __future__ import annotations

import argparse
import shlex
import time
from typing import Any

import torch
from subject import ROOT, load_subject, published, results_folder

import fgsteer as fg
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.drawing import save
from fgsteer.evaluation.runs.plots import own_text_curves
from fgsteer.evaluation.runs.report import markdown
from fgsteer.methods import method_name
from fgsteer.receipts.record import parse_receipt
from fgsteer.storage.json_files import read_json, write_json

PAGE = ROOT / "docs" / "guides" / "receipts.md"
MODEL, CONCEPT, LAYER = "smollm2", "food", 21
STEERING = ("random", "caa", "fgaa_effects")
KLS, MATCHED = (1.0, 4.0, 12.0), 4.0  # nats a text
PROMPTS, NEW_TOKENS, CONTEXT = 12, 16, 1024


def measure(folder: Any, content: dict[str, Any], keep: Any) -> None:
    """Run the benchmark, then each receipt that is not there yet."""
    subject = load_subject(MODEL)
    plan = BenchPlan(
        concepts=(CONCEPT,),
        methods=("unsteered", "prompt", *STEERING),
        layers=(LAYER,),
        kls=KLS,
        matched=MATCHED,
        prompts=PROMPTS,
        max_new_tokens=NEW_TOKENS,
        top_k=MAX_COUNT,
        top_p=1.0,
    )
    bench = Bench(subject.model, subject.tokenizer, subject.saes, subject.effects, fg.KeywordJudge(), plan)
    bench.run(folder / "receipts.jsonl.gz", content["command"])
    run = fg.load_run(folder / "receipts.jsonl.gz")
    content["tables"] = {"best": markdown(run), "matched": markdown(run, MATCHED)}
    save(own_text_curves(run), folder / "receipts-own-text.png")
    save(own_text_curves(run), folder / "receipts-own-text.svg")
    coefficients = {s.method: s.coefficient for s in run.settings if s.matched == MATCHED}
    content["coefficients"] = coefficients
    keep()
    prompts = fg.load_neutral()[1]
    for method in STEERING:
        if method in content.setdefault("receipts", {}):
            continue
        vector = bench.concept(CONCEPT).vector(method, LAYER).unit()  # strengths of the benchmark are of unit vectors
        began = time.monotonic()
        slip = fg.receipt(
            subject.model,
            subject.tokenizer,
            vector,
            coefficients[method],
            make=vector.add,
            contrast=CONCEPT,
            prompts=prompts,
            max_new_tokens=NEW_TOKENS,
            context=CONTEXT,
        )
        content["receipts"][method] = {**slip.as_dict(), "seconds": round(time.monotonic() - began)}
        print(method, slip, flush=True)
        keep()


def receipts_table(content: dict[str, Any]) -> str:
    """The receipts side by side, in Markdown."""
    slips = {method: parse_receipt(row) for method, row in content["receipts"].items()}
    facts = {method: slip.facts() for method, slip in slips.items()}
    names = [name for name in next(iter(facts.values())) if name != "steering"]
    lines = [f"| | {' | '.join(map(method_name, slips))} |", "|---|" + "---|" * len(slips)]
    lines += [f"| {name} | {' | '.join(found.get(name, '') for found in facts.values())} |" for name in names]
    return "\n".join(lines) + "\n"


def curve_table(content: dict[str, Any]) -> str:
    """What methods score at their best strength, and at one cost, in Markdown."""
    best, matched = content["tables"]["best"], content["tables"]["matched"]
    return f"Each method at its best cost:\n\n{best}\nAt {MATCHED:g} nats a text:\n\n{matched}"


TABLES = {"receipts curve": curve_table, "receipts": receipts_table}


def main() -> None:
    """Measure what is not there yet, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help="only put the tables into the guide")
    parser.add_argument("--fresh", action="store_true", help="measure the receipts anew")
    arguments = parser.parse_args()
    folder = results_folder(MODEL)
    file = folder / "receipts.json"
    content: dict[str, Any] = read_json(file) if file.exists() and not arguments.fresh else {}

    def keep() -> None:
        write_json(file, content)

    if not arguments.docs:
        torch.set_num_threads(1)
        began = time.monotonic()
        content["command"] = shlex.join(["python", "benchmarks/receipts.py"])
        measure(folder, content, keep)
        file.with_suffix(".md").write_text("\n".join(table(content) for table in TABLES.values()), "utf-8")
        print(f"{time.monotonic() - began:.0f} s")
    for mark, table in TABLES.items():
        if arguments.docs:
            PAGE.write_text(published(PAGE, mark, table(content)), "utf-8")
        print(table(content))


if __name__ == "__main__":
    main()
