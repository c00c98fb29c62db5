"""SAE methods against plain CAA on the embedded default: settings tuned on one half, measured on the other.

Each method's layer, then a small grid of its settings, is tried on the tuning half alone. The setting with the best
mean BCS over the concepts is kept, where every concept stands at its best strength. Then all methods run on both
halves. The reason for two halves: a method that is tuned on the texts that it is reported on beats anything.

    python benchmarks/quality.py            writes results/{tuning.json, *.gz, table.md, report.html, *.png, *.svg}
    python benchmarks/quality.py --tables   makes tables, page and pictures again, of the records that are there
    python benchmarks/quality.py --docs     puts the table into docs/benchmarks.md and the sentence into README.md
"""

from __future__ import annotations

import argparse
import re
import textwrap
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import fgsteer as fg
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.runs.plots import save_all
from fgsteer.evaluation.runs.records import Run
from fgsteer.evaluation.runs.report import markdown
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.evaluation.runs.tables import average_table, best_sae_method, compare
from fgsteer.methods import method_name, spec, specs
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.json_files import write_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
BENCH, NEARBY = RESULTS / "bench.jsonl.gz", RESULTS / "same_layer.jsonl.gz"
PAGE, README = HERE.parent / "docs" / "benchmarks.md", HERE.parent / "README.md"

WIDE = {"max_density": 1.0, "n_positive": 256, "n_negative": 128}  # no density filter, many features of both signs
MIXED = {"mu": 0.1, "bias_weight": 0.0, "unit_effects": True, "decoder_weight": 0.5}
# tried besides the defaults, which are those of the papers
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "sta": tuple({"p": p} for p in (0.01, 0.05, 0.7)),
    "sae_ts": (
        *({"bias_weight": weight} for weight in (0.0, 0.3)),
        *({"mu": mu, "bias_weight": 0.0} for mu in (0.1, 0.3, 1.0)),
        MIXED,
    ),
    "fgaa": (
        *({"n_positive": n} for n in (4, 8, 32, 64)),
        {"n_positive": 32, "n_negative": 32},
        WIDE,
        {**WIDE, "score": "welch_t"},
    ),
    "fgaa_effects": (
        *({"mu": mu} for mu in (0.1, 0.3, 1.0)),
        {"mu": 1.0, "bias_weight": 0.0},
        {**WIDE, **MIXED, "decoder_weight": 0.0},
        {**WIDE, **MIXED},
        {**WIDE, **MIXED, "score": "welch_t"},
        {**WIDE, **MIXED, "mu": 0.3},
        {**MIXED, "max_density": 1.0, "n_positive": 64, "n_negative": 32},
        {**MIXED, "n_positive": 64, "n_negative": 32},
    ),
}
CONTROLS = {"random": "caa", "minus_bias": "fgaa_effects"}  # measured at the layer of the method that they stand beside
CE_RISES = (0.25, 0.5, 1.0)  # of the tuning runs
TUNING_PROMPTS, PROMPTS = 8, 24  # with one seed each: intervals are over prompts
MATCHED = 0.5


@dataclass(frozen=True)
class Trial:
    """One setting of a method on the tuning half: mean BCS over concepts, each at its best strength."""

    layer: int
    settings: dict[str, Any]
    bcs: float


@dataclass(frozen=True)
class Tuning:
    """Runs methods on the tuning half of all concepts."""

    parts: Mapping[str, Any]
    concepts: tuple[str, ...]
    work: Path
    fresh: bool

    def layers(self, method: str) -> list[int]:
        """Where a method can run."""
        return sorted(self.parts["effects"] if spec(method).needs == "effects" else self.parts["saes"])

    def trial(self, method: str, layer: int, settings: dict[str, Any]) -> Trial:
        """Measure one setting."""
        plan = BenchPlan(
            self.concepts,
            methods=(method,),
            layers=(layer,),
            ce_rises=CE_RISES,
            matched=None,
            prompts=TUNING_PROMPTS,
            halves=("tune",),
            settings={method: settings},
        )
        name = "-".join([method, str(layer), *(f"{key}={value}" for key, value in settings.items())])
        path = self.work / f"{name}.jsonl"
        Bench(**self.parts, plan=plan).run(path, fresh=self.fresh)
        run = fg.load_run(path)
        chosen = [run.mean(setting, "tune") for setting in best_settings(run).values()]
        trial = Trial(layer, settings, sum(chosen) / len(chosen))
        print(f"{name:50} {trial.bcs:.4f}", flush=True)
        return trial

    def tune(self, method: str) -> list[Trial]:
        """Trials of a method, the best first: its defaults at each layer, then its settings at the best of them."""
        trials = [self.trial(method, layer, {}) for layer in self.layers(method)]
        layer = max(trials, key=lambda t: t.bcs).layer
        trials += [self.trial(method, layer, settings) for settings in SETTINGS.get(method, ())]
        return sorted(trials, key=lambda t: -t.bcs)


@cache
def bench_run() -> Run:
    """The run of the benchmark, loaded once."""
    return fg.load_run(BENCH)


def compared_runs() -> dict[str, Run]:
    """The run as it is, and with CAA at the layer of the best SAE method."""
    run, near = bench_run(), fg.load_run(NEARBY)
    (layer,) = near.header["plan"]["layers"]["caa"]
    records = [*(r for r in run.records if r.method != "caa"), *near.records]
    at = ", ".join(f"{method_name(method)} {layer}" for method, (layer,) in run.header["plan"]["layers"].items())
    return {f"Each at its own best layer ({at})": run, f"CAA at layer {layer} too": Run(run.header, records)}


def summary() -> str:
    """The table of docs/benchmarks.md, and the differences beside it in words."""
    (_, run), (title, near) = compared_runs().items()
    lines = [
        f"{what}: {method_name(one)} less {method_name(other)} "
        f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}].".replace("-0", "−0")
        for what, measured, one, other, matched in (
            (f"With {title.replace(' too', '')}", near, "fgaa_effects", "caa", None),
            (f"All at {MATCHED} nats", run, "fgaa_effects", "caa", MATCHED),
            ("At the best coefficient", run, "fgaa_effects", "fgaa", None),
        )
        for gain in [compare(measured, one, other, matched)]
    ]
    return f"{markdown(run)}\n{chr(10).join(lines)}\n"


def sentence() -> str:
    """What README says of the results: wins and losses, with intervals."""
    run = bench_run()
    scores = {row.method: row.bcs for row in average_table(run)}

    def shown(value: Interval) -> str:
        return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"

    gain = compare(run, "fgaa_effects", "caa")
    difference = f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]".replace("-", "−")
    concepts = len(run.header["plan"]["concepts"])
    return textwrap.fill(
        f"On the embedded model, over {concepts} concepts and on prompts and seeds that chose nothing, behavior × "
        f"coherence (0 to 1, with 95 % intervals) is {shown(scores['fgaa_effects'])} for FGAA through effects and "
        f"{shown(scores['caa'])} for CAA, each at its own best layer: the difference of {difference} shows no winner. "
        f"Plain FGAA has {shown(scores['fgaa'])}, and examples of the concept before the prompt, without any steering, "
        f"have {shown(scores['prompt'])}.",
        120,
    )


def published(path: Path, mark: str, text: str) -> str:
    """A page's text with ``text`` between the marks, as it should be."""
    page = path.read_text("utf-8")
    marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
    return marks.sub(lambda match: f"{match[1]}{text}{match[2]}", page)


def section(title: str, run: Run) -> str:
    """Both comparisons of a run, and what the approximator is worth, in Markdown."""
    parts = [f"## {title}\n"]
    for name, matched in (("best coefficient", None), (f"matched at {MATCHED} nats", MATCHED)):
        gain = compare(run, "fgaa_effects", "fgaa", matched)
        tail = f"FGAA + effects less FGAA: {gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]\n".replace("-", "−")
        parts += [f"### {name}\n", markdown(run, matched), tail]
    return "\n".join(parts)


def publish(model: Any, tokenizer: Any, sae: Any) -> None:
    """Write tables, page and pictures of the records."""
    run = fg.load_run(BENCH)
    with atomic_write(RESULTS / "table.md") as beside:
        beside.write_text("\n".join(section(title, measured) for title, measured in compared_runs().items()), "utf-8")
    fg.write_report(run, RESULTS / "report.html", features=partial(fg.seen_features, model, tokenizer, sae))
    save_all(run, RESULTS)


def main() -> None:
    """Tune, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "quality", help="folder of tuning runs")
    parser.add_argument("--tables", action="store_true", help="only make tables, page and pictures of the records")
    parser.add_argument("--fresh", action="store_true", help="start over what earlier versions or settings began")
    parser.add_argument(
        "--docs", action="store_true", help="only put the table and the sentence into docs and README.md"
    )
    arguments = parser.parse_args()
    if arguments.docs:
        PAGE.write_text(published(PAGE, "quality", summary()), "utf-8")
        README.write_text(published(README, "result", sentence() + "\n"), "utf-8")
        return
    began = time.monotonic()
    model, tokenizer = fg.load_model("default")
    saes = [fg.load_sae("default", f"layer_{layer}") for layer in (1, 2, 3)]
    effects = fg.load_effects("default")
    by_layer = {sae.hookpoint.layer: sae for sae in saes}
    if arguments.tables:
        publish(model, tokenizer, by_layer[effects.hookpoint.layer])
        return
    parts = {
        "model": model,
        "tokenizer": tokenizer,
        "saes": by_layer,
        "effects": {effects.hookpoint.layer: effects},
        "judge": fg.EmbeddingJudge(),
    }
    tuning = Tuning(parts, tuple(fg.shipped_contrasts()), arguments.work, arguments.fresh)
    steered = [method.name for method in specs("bench") if method.needs != "nothing" and method.name not in CONTROLS]
    tuned = {method: tuning.tune(method) for method in steered}
    write_json(RESULTS / "tuning.json", {method: [asdict(t) for t in trials] for method, trials in tuned.items()})
    best = {method: trials[0] for method, trials in tuned.items()}
    layers = {method: (trial.layer,) for method, trial in best.items()}
    layers |= {control: layers[method] for control, method in CONTROLS.items()}
    settings = {method: trial.settings for method, trial in best.items() if trial.settings}
    rises = (0.125, 0.25, 0.5, 1.0)
    plan = BenchPlan(tuning.concepts, layers=layers, settings=settings, ce_rises=rises, prompts=PROMPTS)
    command, fresh = "python benchmarks/quality.py", arguments.fresh
    Bench(**parts, plan=plan).run(BENCH, command, lambda done, of: print(done, of, flush=True), fresh=fresh)
    run = fg.load_run(BENCH)
    near = layers[best_sae_method(run) or "fgaa_effects"]
    other = replace(plan, methods=("caa",), layers={"caa": near})
    Bench(**parts, plan=other).run(NEARBY, command, fresh=fresh)
    publish(model, tokenizer, by_layer[effects.hookpoint.layer])
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
