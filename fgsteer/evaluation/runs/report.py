"""A run as one HTML page that stands alone, and as a Markdown table.

The page has no script and needs no network; it reads in light or dark, on a phone, a desktop or paper. Every text is
escaped: generated texts, names and the header are not trusted.

    write_report(load_run("bench.jsonl"), "bench.html")
    print(markdown(load_run("bench.jsonl")))
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from fgsteer.display.pages import standalone_page
from fgsteer.errors import DataError
from fgsteer.errors.wording import count
from fgsteer.evaluation.judges.learning import plain_text
from fgsteer.evaluation.judges.table import recorded_spec
from fgsteer.evaluation.metrics.intervals import Interval
from fgsteer.evaluation.page_parts import STYLE, card_markup, escaped, facts_markup, figure_markup, table_markup
from fgsteer.evaluation.runs.plots import pictures
from fgsteer.evaluation.runs.records import (
    EvalRecord,
    Run,
    Unit,
    mean,
)
from fgsteer.evaluation.runs.settings import best_settings
from fgsteer.evaluation.runs.tables import (
    BASELINE,
    AverageRow,
    ConceptRow,
    average_table,
    best_sae_method,
    compare,
    concept_table,
)
from fgsteer.methods import method_name
from fgsteer.storage.atomic import atomic_write

CHIPS = (
    "In grey under each text: the SAE's features with the largest activations on it, each as number and label, "
    "activation, and the token where that is largest."
)

OWN_TEXT = (
    "own-text KL: KL from the unsteered model along a text that the steered one wrote, in nats a text, at temperature "
    "1 with nothing cut off. Least: no steering shows so much of the behavior for less, by the means of unsteered and "
    "steered texts, each of them an estimate. Distinct: the share of different 3-grams, of which loops have few."
)

Features = Callable[..., Sequence[object]]


@runtime_checkable  # where annotations are checked at run time
class Facts(Protocol):
    """What names facts in words, such as a ``Receipt``."""

    def facts(self) -> Mapping[str, str]:
        """The facts by name."""


def write_report(
    run: Run, path: str | Path, features: Features | None = None, receipts: Mapping[str, Facts] | None = None
) -> None:
    """Write the report of a run as one HTML page.

    Args:
        run: The run.
        path: The file, such as report.html.
        features: What lists features beside each sample, such as ``partial(seen_features, model, tokenizer, sae)``: it
            is called with a text and ``prompt=``.
        receipts: Receipts of the run's vectors, each under the name that stands above it.

    Raises:
        DataError: The run has no records, or a method lacks a concept.
        FormatError: The file cannot be written.
    """
    page = html_report(run, features=features, receipts=receipts)
    with atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def html_report(
    run: Run, samples: int = 2, features: Features | None = None, receipts: Mapping[str, Facts] | None = None
) -> str:
    """A whole HTML page: how it was measured, tables with intervals, pictures, samples, command, versions, hashes.

    Args:
        run: The run.
        samples: How many prompts are shown for each concept: the first ones of the report half.
        features: As in ``write_report``.
        receipts: As in ``write_report``.

    Raises:
        DataError: The run has no records, or a method lacks a concept.
        PairingError: Two methods were measured on other prompts or seeds.
    """
    if not run.records:
        raise DataError("a run without records", "a run with records", "wait for its first batch, or start it")
    tables = {matched: average_table(run, matched) for matched in (None, *run.targets)}
    sections = [
        card_markup("How it was measured", _measured(run), wide=False),
        card_markup("Judge", _judge(run), wide=False),
    ]
    for matched, rows in tables.items():
        sections.append(card_markup(f"Average over concepts, {_at(run, matched)}", _average(run, rows, matched)))
    for matched in tables:
        each = concept_table(run, matched)
        sections.append(card_markup(f"BCS by concept, {_at(run, matched)}", _matrix(run, each) + _details(each)))
    for number, picture in enumerate(pictures(run)):
        sections.append(card_markup("", figure_markup(picture, f"p{number}-"), wide=False))
    sections += [card_markup(f"Receipt: {name}", facts_markup(r.facts())) for name, r in (receipts or {}).items()]
    sections += [card_markup(f"Samples: {c}", _samples(run, c, samples, features), wide=False) for c in run.concepts]
    sections.append(card_markup("How to repeat it", _provenance(run)))
    heading = f"Steering measured: {count(len(run.methods), 'method')} on {count(len(run.concepts), 'concept')}"
    return standalone_page(heading, _headline(run, tables[None]), "\n".join(filter(None, sections)), STYLE)


def markdown(run: Run, matched: float | None = None) -> str:
    """The average table in Markdown, best method first (arguments and errors as in ``average_table``)."""
    rows = sorted(average_table(run, matched), key=lambda row: -row.bcs.mean)
    heads, cells = _average_cells(rows)
    lines = [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *cells)]
    lines[1] = lines[1].replace(" ", "")
    return "\n".join([*lines, "", _design(rows)]) + "\n"


def _average_cells(rows: Sequence[AverageRow]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table of averages, with what own texts cost where that was measured."""
    difference = f"difference to {method_name(BASELINE)} [95 %]"
    heads = ["method", "BCS [95 %]", difference, "n_eff", "won, lost (clearly)", "behavior", "coherence"]
    cells = [
        [
            method_name(row.method),
            _interval(row.bcs),
            _interval(row.difference, sign=True),
            _worth(row),
            _won(row),
            f"{row.behavior.mean:.3f}",
            f"{row.coherence.mean:.3f}",
        ]
        for row in rows
    ]
    if all(row.own_text is not None for row in rows):
        heads += ["own-text KL [95 %]", "least", "distinct"]
        for cell, own in zip(cells, (row.own_text for row in rows if row.own_text), strict=True):
            least = "" if own.least is None else f"{own.least:.3f}"
            cell += [_interval(own.kl), least, f"{own.distinct.mean:.3f}"]
    return heads, cells


def _headline(run: Run, rows: Sequence[AverageRow]) -> str:
    """The result in two sentences, where the run has an SAE method and the baseline."""
    best = best_sae_method(run)
    by_method = {row.method: row for row in rows}
    if best is None or by_method[best].difference is None:
        return ""
    row, base = by_method[best], method_name(BASELINE)
    text = (
        f"{method_name(best)} is the best SAE method on the tuning half. On the report half its BCS is "
        f"{_interval(row.bcs)}, that of {base} is {_interval(by_method[BASELINE].bcs)}, and the difference is "
        f"{_interval(row.difference, sign=True)} ({row.bcs.clusters} prompts, n_eff {_worth(row)}). "
        f"Of {count(len(run.concepts), 'concept')} it wins {row.won} ({row.clearly_won} clearly) and loses {row.lost} "
        f"({row.clearly_lost} clearly)."
    )
    return f"<p>{escaped(text)}</p>"


def _measured(run: Run) -> str:
    units = {half: {r.unit for r in run.records if r.half == half} for half in ("tune", "report")}
    facts = {
        "texts": f"{len(run.records):,}",
        "concepts": ", ".join(run.concepts),
        "methods": ", ".join(map(method_name, run.methods)),
        "layers": ", ".join(map(str, run.layers())) or "one",
        "tuning half": f"{_units(units['tune'])}, on which the coefficient and the layer are chosen",
        "report half": f"{_units(units['report'])}, from which every figure on this page comes",
        "behavior": "how much a text shows the concept, in [0, 1]",
        "coherence": _coherence(run),
        "BCS": "behavior × coherence of a text; averages are over texts, then over concepts",
        "best": "highest mean BCS on the tuning half, per concept and method; of equals the smaller coefficient",
        "samples": "the first prompts of the report half, not picked",
    }
    if run.targets:
        targets = ", ".join(f"{t:g}" for t in run.targets)
        neutral = f"the coefficient at which neutral texts cost {targets} nats a token more"
        own = f"the coefficient at which own texts cost {targets} nats each, by other samples than these"
        facts["matched"] = own if run.has_kl else neutral
    facts["intervals"] = (
        "95 %, Student's t over prompts: the texts of a prompt resemble each other and move every concept together, so "
        "prompts are what is counted; concepts stay as they are. Differences are paired by prompt and seed. n_eff is "
        "how many independent texts would tell as much. Each interval stands alone, without correction for their "
        "number."
    )
    return facts_markup(facts)


def _coherence(run: Run) -> str:
    """What coherence is in this run: the judge's row, or its name where it is in no row."""
    name = run.header["plan"].get("coherence", "unsteered")
    row = recorded_spec(str(name), "coherence")
    return f"how coherent a text is, in [0, 1]. {row.summary}" if row else f"how coherent a text is, judged by {name}"


def _judge(run: Run) -> str:
    """The judge of behavior, and how well it separates labelled text: the mean over concepts, and each concept."""
    judge = run.header["plan"].get("judge")
    if not isinstance(judge, Mapping):
        return "" if judge is None else facts_markup({"judge": judge})
    auc = judge.get("auc")
    row = recorded_spec(str(judge.get("name", "")))
    facts = {key: value for key, value in judge.items() if key != "auc"}
    shown = facts_markup({**facts, "what it does": row.summary} if row else facts)
    if not isinstance(auc, Mapping):
        return shown + ("" if auc is None else facts_markup({"validation AUC": auc}))
    note = "AUC: how often the judge scores a text with the behavior above one without it. 1 is always, 0.5 is chance."
    shown += f'<p class="quiet legend">{escaped(note)}</p>'
    numbers = [value for value in auc.values() if isinstance(value, int | float)]
    average = [["mean", f"{mean(numbers):.3f}"]] if numbers else []
    rows = [[name, f"{value:.3f}" if isinstance(value, int | float) else value] for name, value in auc.items()]
    return shown + table_markup("Validation of the judge", ("concept", "AUC on labelled text"), [*average, *rows])


def _average(run: Run, rows: Sequence[AverageRow], matched: float | None) -> str:
    base = method_name(BASELINE)
    heads, cells = _average_cells(sorted(rows, key=lambda row: -row.bcs.mean))
    note = f"{_design(rows)} Won and lost: concepts above and below {base}; clearly: those whose interval excludes 0."
    pair = ("fgaa_effects", "fgaa")
    if {*pair} <= {row.method for row in rows}:
        names = " less ".join(map(method_name, pair))
        note += f" {names}: {_interval(compare(run, *pair, matched), sign=True)}."
    return table_markup("Average over concepts", heads, cells) + f'<p class="quiet">{escaped(note)}</p>'


def _matrix(run: Run, rows: Sequence[ConceptRow]) -> str:
    """Concepts down, methods across; a mark for clear wins and losses."""
    by_place = {row.setting[:2]: row for row in rows}
    methods = [m for m in run.methods if any(m == method for _, method in by_place)]
    cells = [[c, *(_marked(by_place[c, m]) if (c, m) in by_place else "" for m in methods)] for c in run.concepts]
    note = f"▲ clearly above {method_name(BASELINE)}, ▼ clearly below it: the interval of the difference excludes 0."
    return (
        table_markup("BCS by concept", ("concept", *map(method_name, methods)), cells)
        + f'<p class="quiet">{escaped(note)}</p>'
    )


def _marked(row: ConceptRow) -> str:
    gain = row.difference
    return f"{row.bcs.mean:.3f} {'▲' if gain and gain.low > 0 else '▼' if gain and gain.high < 0 else ' '}"


def _details(rows: Sequence[ConceptRow]) -> str:
    heads = ["concept", "method", "layer", "coefficient", "behavior", "coherence"]
    heads += ["BCS [95 %]", "difference [95 %]", "n_eff"]
    cells = [
        [
            row.setting.concept,
            method_name(row.setting.method),
            "" if row.setting.layer is None else str(row.setting.layer),
            f"{row.setting.coefficient:.4g}",
            f"{row.behavior.mean:.3f}",
            f"{row.coherence.mean:.3f}",
            _interval(row.bcs),
            _interval(row.difference, sign=True),
            _worth(row),
        ]
        for row in rows
    ]
    table = table_markup("Settings and scores by concept", heads, cells)
    return f"<details><summary>Layers, coefficients, behavior, coherence and intervals</summary>{table}</details>"


def _samples(run: Run, concept: str, number: int, features: Features | None) -> str:
    """Texts of one prompt and seed side by side: unsteered, the baseline, the best SAE method."""
    best = best_settings(run)
    methods = [m for m in ("unsteered", BASELINE, best_sae_method(run)) if m is not None and (concept, m) in best]
    cells = [run.cells[best[concept, m], "report"] for m in methods]
    shared = set.intersection(*map(set, cells)) if cells else set()
    prompts = run.header["plan"].get("prompts")
    parts = [f'<p class="quiet legend">{escaped(CHIPS)}</p>'] if features and shared else []
    for unit in sorted(shared, key=lambda unit: (unit.seed, unit.prompt))[:number]:
        known = isinstance(prompts, Sequence) and 0 <= unit.prompt < len(prompts)
        prompt = prompts[unit.prompt] if known else ""
        shown = f"{prompt} …" if isinstance(prompt, str) else plain_text(prompt)
        title = shown if known else f"prompt {unit.prompt}"
        parts.append(f'<h3>{escaped(title)} <span class="quiet">seed {unit.seed}</span></h3>')
        parts += [_sample(cell[unit], features(cell[unit].text, prompt=prompt) if features else ()) for cell in cells]
    return "".join(parts)


def _sample(record: EvalRecord, features: Sequence[object]) -> str:
    at = f" at {record.coefficient:.4g}" if record.coefficient else ""
    scores = f"behavior {record.behavior:.2f}, coherence {record.coherence:.2f}"
    label = f'{escaped(method_name(record.method) + at)} <span class="quiet">{scores}</span>'
    listed = "".join(f"<li>{escaped(feature)}</li>" for feature in features)
    seen = f'<ul class="seen" aria-label="features of the largest activation">{listed}</ul>' if listed else ""
    return f"<p>{label}</p><blockquote>{escaped(record.text.strip())}</blockquote>{seen}"


def _provenance(run: Run) -> str:
    header = run.header
    facts = {f"version of {name}": value for name, value in header["versions"].items()}
    facts |= {f"sha256 of {name}": value for name, value in header["sha256"].items()}
    plan = json.dumps(header["plan"], indent=1, ensure_ascii=False)
    return (
        f"<pre>{escaped(header['command'], lines=True)}</pre>{facts_markup({'fgsteer': header['version'], **facts})}"
        f"<details><summary>The whole plan</summary><pre>{escaped(plan, lines=True)}</pre></details>"
    )


def _at(run: Run, matched: float | None) -> str:
    return "best coefficient" if matched is None else f"matched at {matched:g} {run.cost_unit}"


def _won(row: AverageRow) -> str:
    if row.difference is None:
        return ""
    return f"{row.won} ({row.clearly_won}), {row.lost} ({row.clearly_lost})"


def _units(units: Collection[Unit]) -> str:
    prompts, seeds = len({unit.prompt for unit in units}), len({unit.seed for unit in units})
    return f"{count(prompts, 'prompt')} × {count(seeds, 'seed')}"


def _worth(row: AverageRow | ConceptRow) -> str:
    """The effective number of texts: that of the difference, where there is one."""
    interval = row.difference or row.bcs
    return f"{interval.effective:.0f} of {interval.units}"


def _design(rows: Sequence[AverageRow]) -> str:
    """A note on what intervals are over, what n_eff is, and what own texts cost."""
    prompts = " to ".join(map(str, sorted({min(r.bcs.clusters for r in rows), max(r.bcs.clusters for r in rows)})))
    return (
        f"Intervals are t intervals over {prompts} prompts; n_eff is how many independent texts would tell as much "
        "of the difference (without one, of the BCS) as these do."
    ) + (f" {OWN_TEXT[0].upper()}{OWN_TEXT[1:]}" if all(row.own_text for row in rows) else "")


def _interval(value: Interval | None, sign: bool = False) -> str:
    """A mean and its interval, with a true minus and, where asked for, a plus in front."""
    if value is None:
        return ""
    middle, low, high = (f"{number:{'+' if sign else ''}.3f}".replace("-", "−") for number in value)
    return f"{middle} [{low}, {high}]"
