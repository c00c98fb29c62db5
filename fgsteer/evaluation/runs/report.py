"""A run as one HTML page that stands alone, and as a Markdown table.

The page has no script and needs no network; it reads in light or dark, on a phone, a desktop or paper. Every text is
escaped: generated texts, names and the header are not trusted.

    write_report(load_run("bench.jsonl"), "bench.html")
    print(markdown(load_run("bench.jsonl")))
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fgsteer.display.pages import LIGHT, standalone_page, visible
from fgsteer.errors import DataError
from fgsteer.errors.wording import count
from fgsteer.evaluation.drawing import Picture, rendered
from fgsteer.evaluation.judges.table import recorded_spec
from fgsteer.evaluation.metrics.intervals import Interval
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

_STYLE = """
.wide{grid-column:1/-1}article>h2{margin-bottom:.5rem}article>h3{font-size:.95rem;margin:.75rem 0 .25rem}
.scroll{overflow-x:auto;overflow-wrap:normal;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .45rem;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
th{font-weight:600}thead th{white-space:normal;border-top:0;color:var(--quiet);font-weight:400;vertical-align:bottom}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);
 white-space:normal;min-width:6.5rem;max-width:12rem;overflow-wrap:anywhere}
figure{margin:0}figure svg{display:block;width:100%;height:auto;max-width:30rem}
figcaption{font-size:.9rem;color:var(--quiet)}
pre{white-space:pre-wrap;background:var(--page);border-radius:.3rem;padding:.5rem;margin:.25rem 0;font-size:.85rem}
blockquote{margin:.1rem 0 .6rem;padding-left:.6rem;border-left:.2rem solid var(--line);
 white-space:pre-wrap;unicode-bidi:isolate}
.seen{display:flex;flex-wrap:wrap;gap:.3rem;list-style:none;margin:-.3rem 0 .8rem;padding:0;font-size:.8rem}
.seen li{display:block;background:var(--page);border:0;border-radius:.3rem;padding:.1rem .4rem;unicode-bidi:isolate}
.legend{font-size:.85rem;margin:.25rem 0 .5rem}
summary{cursor:pointer;color:var(--link)}dl{grid-template-columns:fit-content(8rem) 1fr}
@media print{article{break-inside:auto}figure,tr{break-inside:avoid}}
"""

CHIPS = (
    "In grey under each text: the SAE's features with the largest activations on it, each as number and label, "
    "activation, and the token where that is largest."
)

Features = Callable[..., Sequence[object]]

_THEMED = {color: f"var(--{name})" for name, color in LIGHT.items() if name in ("text", "quiet", "line", "card")}


def write_report(run: Run, path: str | Path, features: Features | None = None) -> None:
    """Write the report of a run as one HTML page.

    Args:
        run: The run.
        path: The file, such as report.html.
        features: What lists features beside each sample, such as ``partial(seen_features, model, tokenizer, sae)``: it
            is called with a text and ``prompt=``.

    Raises:
        DataError: The run has no records, or a method lacks a concept.
        FormatError: The file cannot be written.
    """
    page = html_report(run, features=features)
    with atomic_write(path) as temporary:
        temporary.write_bytes(page.encode("utf-8", "replace"))


def html_report(run: Run, samples: int = 2, features: Features | None = None) -> str:
    """A whole HTML page: how it was measured, tables with intervals, pictures, samples, command, versions, hashes.

    Args:
        run: The run.
        samples: How many prompts are shown for each concept: the first ones of the report half.
        features: As in ``write_report``.

    Raises:
        DataError: The run has no records, or a method lacks a concept.
        PairingError: Two methods were measured on other prompts or seeds.
    """
    if not run.records:
        raise DataError("a run without records", "a run with records", "wait for its first batch, or start it")
    tables = {matched: average_table(run, matched) for matched in (None, *run.targets)}
    sections = [_card("How it was measured", _measured(run), wide=False), _card("Judge", _judge(run), wide=False)]
    for matched, rows in tables.items():
        sections.append(_card(f"Average over concepts, {_at(matched)}", _average(run, rows, matched)))
    for matched in tables:
        each = concept_table(run, matched)
        sections.append(_card(f"BCS by concept, {_at(matched)}", _matrix(run, each) + _details(each)))
    for number, picture in enumerate(pictures(run)):
        sections.append(_card("", _figure(picture, f"p{number}-"), wide=False))
    sections += [_card(f"Samples: {c}", _samples(run, c, samples, features), wide=False) for c in run.concepts]
    sections.append(_card("How to repeat it", _provenance(run)))
    heading = f"Steering measured: {count(len(run.methods), 'method')} on {count(len(run.concepts), 'concept')}"
    return standalone_page(heading, _headline(run, tables[None]), "\n".join(filter(None, sections)), _STYLE)


def markdown(run: Run, matched: float | None = None) -> str:
    """The average table in Markdown, best method first (arguments and errors as in ``average_table``)."""
    lines = [
        f"| method | BCS [95 %] | difference to {method_name(BASELINE)} [95 %] | n_eff | won, lost (clearly) "
        "| behavior | coherence |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = sorted(average_table(run, matched), key=lambda row: -row.bcs.mean)
    for row in rows:
        scores = f"{_interval(row.bcs)} | {_interval(row.difference, sign=True)} | {_worth(row)} | {_won(row)}"
        lines.append(f"| {method_name(row.method)} | {scores} | {row.behavior.mean:.3f} | {row.coherence.mean:.3f} |")
    return "\n".join([*lines, "", _design(rows)]) + "\n"


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
    return f"<p>{_text(text)}</p>"


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
        facts["matched"] = f"the coefficient at which neutral texts cost {targets} nats a token more"
    facts["intervals"] = (
        "95 %, Student's t over prompts: the texts of a prompt resemble each other and move every concept together, so "
        "prompts are what is counted; concepts stay as they are. Differences are paired by prompt and seed. n_eff is "
        "how many independent texts would tell as much. Each interval stands alone, without correction for their "
        "number."
    )
    return _list(facts)


def _coherence(run: Run) -> str:
    """What coherence is in this run: the judge's row, or its name where it is in no row."""
    name = run.header["plan"].get("coherence", "unsteered")
    row = recorded_spec(str(name), "coherence")
    return f"how coherent a text is, in [0, 1]. {row.summary}" if row else f"how coherent a text is, judged by {name}"


def _judge(run: Run) -> str:
    """The judge of behavior, and how well it separates labelled text: the mean over concepts, and each concept."""
    judge = run.header["plan"].get("judge")
    if not isinstance(judge, Mapping):
        return "" if judge is None else _list({"judge": judge})
    auc = judge.get("auc")
    row = recorded_spec(str(judge.get("name", "")))
    facts = {key: value for key, value in judge.items() if key != "auc"}
    shown = _list({**facts, "what it does": row.summary} if row else facts)
    if not isinstance(auc, Mapping):
        return shown + ("" if auc is None else _list({"validation AUC": auc}))
    note = "AUC: how often the judge scores a text with the behavior above one without it. 1 is always, 0.5 is chance."
    shown += f'<p class="quiet legend">{_text(note)}</p>'
    numbers = [value for value in auc.values() if isinstance(value, int | float)]
    average = [["mean", f"{mean(numbers):.3f}"]] if numbers else []
    rows = [[name, f"{value:.3f}" if isinstance(value, int | float) else value] for name, value in auc.items()]
    return shown + _table("Validation of the judge", ("concept", "AUC on labelled text"), [*average, *rows])


def _average(run: Run, rows: Sequence[AverageRow], matched: float | None) -> str:
    base = method_name(BASELINE)
    difference = f"difference to {base} [95 %]"
    heads = ("method", "BCS [95 %]", difference, "n_eff", "won, lost (clearly)", "behavior", "coherence")
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
        for row in sorted(rows, key=lambda row: -row.bcs.mean)
    ]
    note = f"{_design(rows)} Won and lost: concepts above and below {base}; clearly: those whose interval excludes 0."
    pair = ("fgaa_effects", "fgaa")
    if {*pair} <= {row.method for row in rows}:
        names = " less ".join(map(method_name, pair))
        note += f" {names}: {_interval(compare(run, *pair, matched), sign=True)}."
    return _table("Average over concepts", heads, cells) + f'<p class="quiet">{_text(note)}</p>'


def _matrix(run: Run, rows: Sequence[ConceptRow]) -> str:
    """Concepts down, methods across; a mark for clear wins and losses."""
    by_place = {row.setting[:2]: row for row in rows}
    methods = [m for m in run.methods if any(m == method for _, method in by_place)]
    cells = [[c, *(_marked(by_place[c, m]) if (c, m) in by_place else "" for m in methods)] for c in run.concepts]
    note = f"▲ clearly above {method_name(BASELINE)}, ▼ clearly below it: the interval of the difference excludes 0."
    return (
        _table("BCS by concept", ("concept", *map(method_name, methods)), cells) + f'<p class="quiet">{_text(note)}</p>'
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
    table = _table("Settings and scores by concept", heads, cells)
    return f"<details><summary>Layers, coefficients, behavior, coherence and intervals</summary>{table}</details>"


def _samples(run: Run, concept: str, number: int, features: Features | None) -> str:
    """Texts of one prompt and seed side by side: unsteered, the baseline, the best SAE method."""
    best = best_settings(run)
    methods = [m for m in ("unsteered", BASELINE, best_sae_method(run)) if m is not None and (concept, m) in best]
    cells = [run.cells[best[concept, m], "report"] for m in methods]
    shared = set.intersection(*map(set, cells)) if cells else set()
    prompts = run.header["plan"].get("prompts")
    parts = [f'<p class="quiet legend">{_text(CHIPS)}</p>'] if features and shared else []
    for unit in sorted(shared, key=lambda unit: (unit.seed, unit.prompt))[:number]:
        known = isinstance(prompts, Sequence) and 0 <= unit.prompt < len(prompts)
        prompt = prompts[unit.prompt] if known else ""
        title = f"{prompt} …" if known else f"prompt {unit.prompt}"
        parts.append(f'<h3>{_text(title)} <span class="quiet">seed {unit.seed}</span></h3>')
        parts += [_sample(cell[unit], features(cell[unit].text, prompt=prompt) if features else ()) for cell in cells]
    return "".join(parts)


def _sample(record: EvalRecord, features: Sequence[object]) -> str:
    at = f" at {record.coefficient:.4g}" if record.coefficient else ""
    scores = f"behavior {record.behavior:.2f}, coherence {record.coherence:.2f}"
    label = f'{_text(method_name(record.method) + at)} <span class="quiet">{scores}</span>'
    listed = "".join(f"<li>{_text(feature)}</li>" for feature in features)
    seen = f'<ul class="seen" aria-label="features of the largest activation">{listed}</ul>' if listed else ""
    return f"<p>{label}</p><blockquote>{_text(record.text.strip())}</blockquote>{seen}"


def _provenance(run: Run) -> str:
    header = run.header
    facts = {f"version of {name}": value for name, value in header["versions"].items()}
    facts |= {f"sha256 of {name}": value for name, value in header["sha256"].items()}
    plan = json.dumps(header["plan"], indent=1, ensure_ascii=False)
    return (
        f"<pre>{_text(header['command'], lines=True)}</pre>{_list({'fgsteer': header['version'], **facts})}"
        f"<details><summary>The whole plan</summary><pre>{_text(plan, lines=True)}</pre></details>"
    )


def _figure(picture: Picture, prefix: str) -> str:
    """The picture inline, with ids of its own, and with the page's colors for text and background."""
    svg = rendered(picture.figure, "svg").decode()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}", svg)
    for color, themed in _THEMED.items():
        svg = svg.replace(color, themed)
    caption = _text(picture.caption)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _card(heading: str, content: str, wide: bool = True) -> str:
    title = f"<h2>{_text(heading)}</h2>" if heading else ""
    opened = '<article class="wide">' if wide else "<article>"
    return f"{opened}{title}{content}</article>" if content else ""


def _table(label: str, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    top = "".join(f'<th scope="col">{_text(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in others)}</tr>'
        for first, *others in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{_text(label)}">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _list(facts: Mapping[str, Any]) -> str:
    texts = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in facts.items()}
    return f"<dl>{''.join(f'<dt>{_text(key)}</dt><dd>{_text(text)}</dd>' for key, text in texts.items())}</dl>"


def _text(value: object, lines: bool = False) -> str:
    """Escaped text without characters that move or hide what stands beside it; line breaks are kept or made visible."""
    parts = str(value).split("\n") if lines else [str(value)]
    return "\n".join(escape(visible(part)) for part in parts)


def _at(matched: float | None) -> str:
    return "best coefficient" if matched is None else f"matched at {matched:g} nats of CE rise"


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
    """A note on what intervals are over, and what n_eff is."""
    prompts = " to ".join(map(str, sorted({min(r.bcs.clusters for r in rows), max(r.bcs.clusters for r in rows)})))
    return (
        f"Intervals are t intervals over {prompts} prompts; n_eff is how many independent texts would tell as much "
        "of the difference (without one, of the BCS) as these do."
    )


def _interval(value: Interval | None, sign: bool = False) -> str:
    """A mean and its interval, with a true minus and, where asked for, a plus in front."""
    if value is None:
        return ""
    middle, low, high = (f"{number:{'+' if sign else ''}.3f}".replace("-", "−") for number in value)
    return f"{middle} [{low}, {high}]"
