"""A bench run read, tabled, drawn and told: against loops, against damage, against hostile texts."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from fgsteer.display import pages
from fgsteer.errors import DataError, FormatError, PairingError
from fgsteer.evaluation import drawing
from fgsteer.evaluation.runs import plots, report
from fgsteer.evaluation.runs.joining import join_runs, write_run
from fgsteer.evaluation.runs.records import Run, Unit, load_run
from fgsteer.evaluation.runs.settings import best_coefficients, best_settings
from fgsteer.evaluation.runs.tables import (
    average_table,
    best_sae_method,
    compare,
    concept_table,
    curve,
    over_prompts,
)
from fgsteer.storage import lines
from fgsteer.storage.lines import MAX_LINE_BYTES, compress, decompress
from tests.helpers import runs
from tests.helpers.pages import Checker, luminance
from tests.reference import tables as naive

SMALL: dict[str, Any] = {
    "concepts": ("anger", "love", "wedding"),
    "methods": {m: runs.METHODS[m] for m in ("random", "prompt", "caa", "fgaa", "fgaa_effects")},
    "coefficients": (4.0, 8.0, 32.0),
    "prompts": 4,
    "seeds": 4,
}


@pytest.fixture(scope="module")
def made():
    """Header and records of a small run, as dictionaries."""
    return list(runs.rows(**SMALL))


def loaded(tmp_path, made):
    return load_run(runs.write(tmp_path / "run.jsonl", made))


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    return loaded(tmp_path_factory.mktemp("run"), made)


def part_of(run, methods, **changes):
    """The run of some methods, as if it had been run by itself."""
    plan = {**run.header["plan"], "methods": list(methods), "settings": {m: {"n": 1} for m in methods}, **changes}
    return Run({**run.header, "plan": plan, "command": f"bench {' '.join(methods)}"}, run.only(methods=methods).records)


@pytest.mark.parametrize("name", ["joined.jsonl", "joined.jsonl.gz"])
def test_runs_of_other_methods_are_joined_as_if_run_together(run, tmp_path, name):
    one, other = ["unsteered", "prompt", "fgaa"], ["random", "caa", "fgaa_effects"]
    write_run(tmp_path / name, join_runs(part_of(run, one), part_of(run, other)))
    joined = load_run(tmp_path / name)
    assert average_table(joined) == average_table(run)
    assert concept_table(joined) == concept_table(run)
    assert len(joined.records) == len(run.records)
    plan = joined.header["plan"]
    assert plan["methods"] == ["unsteered", "random", "prompt", "caa", "fgaa", "fgaa_effects"]
    assert plan["layers"] == {method: [1, 2] for method in plan["methods"]}
    assert plan["settings"].keys() == set(plan["methods"])
    assert joined.header["command"] == "bench unsteered prompt fgaa && bench random caa fgaa_effects"


def test_runs_that_measured_otherwise_are_not_joined(run):
    first = part_of(run, ["caa"])
    with pytest.raises(DataError, match="two runs of caa"):
        join_runs(first, part_of(run, ["caa", "fgaa"]))
    with pytest.raises(PairingError, match=r"plan\.max_new_tokens was 32 and is 8"):
        join_runs(first, part_of(run, ["fgaa"], max_new_tokens=8))
    other = part_of(run, ["fgaa"])
    with pytest.raises(PairingError, match=r"sha256\.sae was a7"):
        join_runs(first, Run({**other.header, "sha256": {"model": "3f" * 32, "sae": "b7" * 32}}, other.records))


def test_run_holds_what_was_written(run, made):
    assert run.header == made[0]
    fields = list(made[1])
    assert [{name: getattr(r, name) for name in fields} for r in run.records] == made[1:]
    assert run.concepts == list(SMALL["concepts"])
    assert run.methods == ["unsteered", *SMALL["methods"]]
    assert run.swept == ["random", "caa", "fgaa", "fgaa_effects"]
    assert (run.layers(), run.layers("caa"), run.targets) == ([1, 2], [1, 2], [0.5])
    assert run.layers("unsteered") == []
    assert run.only(concepts=["love"], methods=["caa"]).settings == [
        s for s in run.settings if s[:2] == ("love", "caa")
    ]


def test_a_killed_writer_costs_its_last_line_only(made, tmp_path):
    rows = [made[0], made[1], {**made[2], "text": "é\u2028日\n"}]
    whole = runs.write(tmp_path / "run.jsonl", rows).read_bytes()
    before = len(whole[:-1]) - whole[:-1].rindex(b"\n") - 1  # bytes of the last line
    for cut in range(before + 2):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(whole[: len(whole) - cut])
        assert len(load_run(path).records) == (2 if cut < 2 else 1)
    assert load_run(tmp_path / "run.jsonl").records[1].text == rows[2]["text"]


def test_a_compressed_run_is_loaded_within_bounds(made, tmp_path, monkeypatch):
    plain = runs.write(tmp_path / "run.jsonl", made)
    path = tmp_path / "run.jsonl.gz"
    compress(plain, path)
    assert load_run(path).records == load_run(plain).records
    assert load_run(path).header == made[0]
    decompress(path, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_bytes() == plain.read_bytes()
    packed = path.read_bytes()
    for damaged in (packed[:-20], packed[:200], b"text", packed[:500] + b"????" + packed[504:]):
        path.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"run\.jsonl\.gz"):
            load_run(path)
    path.write_bytes(gzip.compress(b" " * (MAX_LINE_BYTES + 1)))
    with pytest.raises(FormatError, match="line 1 is longer than"):
        load_run(path)
    monkeypatch.setattr(lines, "MAX_SMALL_BYTES", 1000)
    path.write_bytes(gzip.compress(b"\n" * 10**6))
    with pytest.raises(FormatError, match="far more than its size suggests"):
        list(lines.read_lines(path))


def changed(**fields):
    return lambda lines: lines.__setitem__(2, json.dumps({**json.loads(lines[2]), **fields}))


def without(number, name):
    def edit(lines):
        lines[number] = json.dumps({k: v for k, v in json.loads(lines[number]).items() if k != name})

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda lines: lines.__setitem__(2, lines[2][:-9]), "Line 3 of "),
        (lambda lines: lines.__setitem__(2, ""), "Line 3 of "),
        (lambda lines: lines.__setitem__(2, "[" * 100_000), "Line 3 of "),
        (lambda lines: lines.__setitem__(2, "[1]"), "Line 3 of .*Expected an object, got a list"),
        (lambda lines: lines.pop(0), "Line 1 of .*'fgsteer' is missing"),
        (lambda lines: lines.insert(3, lines[2]), "Line 4 of .* as line 3"),
        (without(2, "behavior"), "Line 3 of .*'behavior' is missing"),
        (without(0, "plan"), "Line 1 of .*'plan' is missing"),
        (changed(behavior=1.5), "Line 3 of .*from 0 to 1, got behavior 1.5"),
        (changed(coherence=float("nan")), "Line 3 of .*a finite number, got coherence nan"),
        (changed(coherence=-0.1), "Line 3 of .*coherence -0.1"),
        (changed(ce=10**400), "Line 3 of "),
        (changed(half="both"), "Line 3 of .*'tune' or 'report', got half 'both'"),
        (changed(prompt=True), "Line 3 of .*a whole number, got prompt True"),
        (changed(prompt=1.0), "Line 3 of .*a whole number, got prompt 1.0"),
        (changed(coefficient="8"), "Line 3 of .*a finite number, got coefficient '8'"),
        (changed(text=None), "Line 3 of .*a text, got text None"),
        (changed(coefficient=99.0, prompt=0, seed=0, half="tune"), "Line 3 of .* in the other half"),
        (lambda lines: lines.clear(), "no whole line"),
    ],
)
def test_damage_is_refused_with_its_line(made, tmp_path, edit, message):
    lines = [json.dumps(row) for row in made[:6]]
    edit(lines)
    path = tmp_path / "run.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    with pytest.raises(FormatError, match=message):
        load_run(path)
    with pytest.raises(FormatError, match="Cannot read"):
        load_run(tmp_path / "none.jsonl")


@pytest.mark.parametrize("matched", [None, 0.5])
def test_settings_are_the_best_of_the_tuning_half(run, made, matched):
    found = best_settings(run, matched)
    assert len(found) == 3 * (6 if matched is None else 4)  # prompt and unsteered are not matched
    for (concept, method), setting in found.items():
        assert (setting.layer, setting.coefficient) == naive.best(made[1:], concept, method, matched)
    for (concept, method, layer), setting in best_coefficients(run, matched).items():
        assert (layer, setting.coefficient) == naive.best(made[1:], concept, method, matched, layer)


def test_the_report_half_chooses_nothing(run, made, tmp_path):
    flipped = [{**r, "behavior": 1 - r["behavior"]} if r["half"] == "report" else r for r in made[1:]]
    other = loaded(tmp_path, [made[0], *flipped])
    assert best_settings(other) == best_settings(run)
    assert best_sae_method(other) == best_sae_method(run)
    assert average_table(other) != average_table(run)


def test_ties_go_to_the_lower_layer_and_the_smaller_coefficient(made, tmp_path):
    row = {**made[1], "method": "caa", "half": "tune"}
    settings = [(2, 4.0), (2, -4.0), (1, 8.0), (1, -8.0), (1, 16.0)]
    rows = [{**row, "layer": layer, "coefficient": c} for layer, c in settings]
    run = loaded(tmp_path, [made[0], *rows])
    assert [s[2:4] for s in best_coefficients(run).values()] == [(2, 4.0), (1, 8.0)]
    assert [s[2:4] for s in best_settings(run).values()] == [(1, 8.0)]


def test_incomplete_runs_are_refused_by_name(run, made):
    def lacking(lost):
        return Run(run.header, [r for r in run.records if not lost(r)])

    best = best_settings(run)["love", "fgaa"]
    with pytest.raises(DataError, match="fgaa without love"):
        average_table(lacking(lambda r: (r.concept, r.method) == ("love", "fgaa")))
    with pytest.raises(DataError, match=r"no record of love: FGAA.*'report'"):
        average_table(lacking(lambda r: r.setting == best and r.half == "report"))
    with pytest.raises(PairingError, match=r"love: FGAA.*1 of 8"):
        concept_table(lacking(lambda r: r.setting == best and r.half == "report" and r.unit == (1, 1)))
    with pytest.raises(PairingError, match="tuning"):
        best_settings(lacking(lambda r: r.setting == best and r.half == "tune" and r.unit == (1, 0)))
    partial = lacking(lambda r: (r.concept, r.method) == ("love", "fgaa"))
    assert len(average_table(partial.only(concepts=["anger", "wedding"]))) == 6


# sums in another order: a few ulps of float64; the reference's t quantile steps by a hundred-thousandth
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
ENDS: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-12}


@pytest.mark.parametrize("matched", [None, 0.5])
def test_tables_agree_with_loops(run, made, matched):
    rows = {row.method: row for row in average_table(run, matched)}
    each = {row.setting[:2]: row for row in concept_table(run, matched)}
    assert set(rows) == {method for _, method in each}
    assert ("unsteered" in rows) == (matched is None)

    def bcs(concept, method):
        layer, coefficient = naive.best(made[1:], concept, method, matched)
        wanted = {"concept": concept, "method": method, "layer": layer, "coefficient": coefficient, "matched": matched}
        return naive.scores(made[1:], "report", **wanted)

    for method, row in rows.items():
        scores = [bcs(c, method) for c in SMALL["concepts"]]
        gains = [{u: s[u] - bcs(c, "caa")[u] for u in s} for c, s in zip(SMALL["concepts"], scores, strict=True)]
        np.testing.assert_allclose(row.bcs.mean, naive.mean(naive.mean(s.values()) for s in scores), **EXACT)
        shown = row.bcs if method == "caa" else row.difference
        expected = naive.interval(scores if method == "caa" else gains, lambda unit: unit[0])
        np.testing.assert_allclose([*shown], expected, **ENDS)
        assert (shown.clusters, shown.units) == (4, 8)
        if method == "caa":
            assert row.difference is None
            continue
        assert row.difference == compare(run, method, matched=matched)
        alone = [over_prompts([{Unit(*u): x for u, x in g.items()}]) for g in gains]
        assert [each[c, method].difference for c in SMALL["concepts"]] == alone
        assert (row.won, row.lost) == (sum(g.mean > 0 for g in alone), sum(g.mean < 0 for g in alone))
        clear = [g for g in alone if g.clear]
        assert (row.clearly_won, row.clearly_lost) == (sum(g.mean > 0 for g in clear), sum(g.mean < 0 for g in clear))
    assert rows["fgaa_effects"].difference.low > 0  # what the made-up strengths say
    assert rows["random"].difference.high < 0
    assert best_sae_method(run) == "fgaa_effects"


def test_curves_are_means_over_concepts(run, made):
    points = curve(run, "caa", layer=2)
    assert [p.coefficient for p in points] == [4.0, 8.0, 32.0]
    for point in points:
        wanted = {"method": "caa", "layer": 2, "coefficient": point.coefficient, "matched": None}
        scores = [naive.scores(made[1:], "report", concept=c, **wanted) for c in SMALL["concepts"]]
        np.testing.assert_allclose(point.bcs, naive.mean(naive.mean(s.values()) for s in scores), **EXACT)
    with pytest.raises(DataError, match="caa"):
        curve(run, "caa", layer=9)
    shorter = Run(run.header, [r for r in run.records if r.setting[:4] != ("love", "caa", 2, 32.0)])
    with pytest.raises(DataError, match="as many coefficients for every concept, got caa with 2 and 3"):
        curve(shorter, "caa", layer=2)


def test_pictures_are_small_legible_and_leave_no_trace(run):
    import matplotlib
    from matplotlib._pylab_helpers import Gcf
    from matplotlib.text import Text

    before = dict(matplotlib.rcParams)
    found = plots.pictures(run)
    names = ["methods", "concepts", "methods-matched-0.5", "concepts-matched-0.5"]
    names += ["frontier", "coefficients", "layers-fgaa_effects", "layers-caa"]
    assert [p.name for p in found] == names
    for picture in found:
        assert picture.figure.get_figwidth() == drawing.WIDTH_INCHES
        assert picture.caption
        texts = [t for t in picture.figure.findobj(Text) if isinstance(t, Text) and t.get_text()]
        assert texts
        assert min(float(t.get_fontsize()) for t in texts) >= 8
    assert dict(matplotlib.rcParams) == before
    assert not Gcf.figs  # pyplot's
    for color in (drawing.BLUE, drawing.ORANGE, drawing.GREEN):
        for ground in (pages.LIGHT["card"], pages.DARK["card"]):  # WCAG for graphics: 3 to 1
            low, high = sorted((luminance(color), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3, (color, ground)


def test_pictures_show_the_tables(run):
    rows = {row.method: row for row in average_table(run)}
    figure = plots.method_bars(run)
    drawn = {round(float(np.asarray(line.get_xdata())[0]), 12) for line in figure.axes[0].lines}
    assert {round(row.bcs.mean, 12) for row in rows.values()} <= drawn
    figure = plots.concept_bars(run, "fgaa")
    widths = sorted(bar.get_width() for bar in figure.axes[0].patches if isinstance(bar, Rectangle))
    gains = [row.difference for row in concept_table(run) if row.setting.method == "fgaa"] + [rows["fgaa"].difference]
    np.testing.assert_allclose(widths, sorted(g.mean for g in gains), **EXACT)
    figure = plots.layer_map(run, "caa")
    values = figure.axes[0].collections[0].get_array()
    np.testing.assert_allclose(values, [[p.bcs for p in curve(run, "caa", layer)] for layer in (1, 2)], **EXACT)
    (box,) = figure.axes[0].patches
    assert isinstance(box, Rectangle)
    frame = box.get_xy()
    tuned = [[p.bcs for p in curve(run, "caa", layer, half="tune")] for layer in (1, 2)]
    assert tuned[int(frame[1])][int(frame[0])] == max(map(max, tuned))
    with pytest.raises(DataError, match="caa to caa"):
        plots.concept_bars(run, "caa")


def test_pictures_are_the_same_every_time_and_take_any_name(made, tmp_path):
    odd = {"anger": "$\\frac{", "love": "<b>&" * 20, "wedding": "wedding"}
    rows = [made[0], *({**r, "concept": odd[r["concept"]]} for r in made[1:])]
    run = loaded(tmp_path, rows).only(methods=["caa", "fgaa"])
    for kind in ("svg", "png"):
        for name in ("a", "b"):
            drawing.save(plots.concept_bars(run, "fgaa"), tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert b"<dc:date>" not in (tmp_path / "a.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(DataError, match=r"\.png or \.svg"):
        drawing.save(plots.method_bars(run), tmp_path / "a.pdf")


def test_save_all_writes_both_kinds(run, tmp_path):
    paths = plots.save_all(run.only(methods=["unsteered", "caa"]), tmp_path / "plots")
    assert sorted(tmp_path.glob("plots/*")) == sorted(paths)
    names = [
        f"{name}.{kind}"
        for name in ("methods", "methods-matched-0.5", "frontier", "coefficients", "layers-caa")
        for kind in ("png", "svg")
    ]
    assert [p.name for p in paths] == names
    with pytest.raises(DataError, match="without records"):
        plots.save_all(Run(run.header, []), tmp_path)


HOSTILE = '\u202e</q>--><script>alert("x")</script>\u202e<img src=//x.org/a>&amp;\n'


def test_page_stands_alone_and_trusts_no_text(made, tmp_path):
    names = {"love": HOSTILE}
    rows = [{**r, "concept": names.get(r["concept"], r["concept"]), "text": r["text"] + HOSTILE} for r in made[1:]]
    plan = {**made[0]["plan"], "prompts": [HOSTILE] * 4, "judge": {"name": HOSTILE, "auc": {HOSTILE: HOSTILE}}}
    header = {**made[0], "plan": plan, "versions": {HOSTILE: HOSTILE}, "command": HOSTILE + "\ud800"}
    run = Run(header, loaded(tmp_path, [made[0], *rows]).records)
    report.write_report(run, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert not checker.open
    assert not {"script", "img", "i", "a", "link", "iframe"} & set(checker.tags)
    assert 'alert("x")</script>·<img src=//x.org/a>&amp;' in checker.text
    assert "\u202e" not in page
    assert not re.search(r'@import|url\((?!#)|(href|src)="(?!#)|https?://(?!www\.w3\.org/)', page)
    ids = [value for name, value in checker.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 0
    targets = [v[1:] for name, v in checker.attributes if name.endswith("href")] + re.findall(r"url\(#([^)]*)\)", page)
    assert targets
    assert set(targets) <= set(ids)


def test_page_of_conversations_shows_what_was_asked(run):
    prompts = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Why {n}?"}] for n in range(4)]
    asked = []
    chats = Run({**run.header, "plan": {**run.header["plan"], "prompts": prompts}}, run.records)
    page = report.html_report(chats, features=lambda text, prompt: asked.append(prompt) or [])
    text = Checker()
    text.feed(page)
    assert "Be brief.↵Why 0?" in text.text
    assert "[{'role'" not in text.text
    assert asked
    assert all(prompt in prompts for prompt in asked)


def test_page_tells_what_the_tables_say(run):
    page = report.html_report(run)
    text = Checker()
    text.feed(page)
    for row in average_table(run) + average_table(run, 0.5):
        assert report._interval(row.bcs) in text.text
        assert report._interval(row.difference, sign=True) in text.text
    for record in run.records:
        chosen = best_settings(run)[record.concept, record.method] == record.setting
        if chosen and record.method in ("unsteered", "caa", "fgaa_effects") and record.unit == (0, 0):
            assert record.text.strip() in text.text
    gain = compare(run, "fgaa_effects", "fgaa")
    header = run.header
    told = [f"{header['plan']['judge']['auc']['anger']:.3f}", header["command"], header["sha256"]["sae"], "torch"]
    for fact in [*told, f"FGAA + effects less FGAA: {report._interval(gain, sign=True)}"]:
        assert fact in text.text
    with pytest.raises(DataError, match="without records"):
        report.html_report(Run(header, []))


def test_page_of_a_run_of_the_baseline_alone(run):
    page = report.html_report(run.only(methods=["caa"]))
    assert page.count("<figure>") == 5
    header = {**run.header, "plan": {}}
    assert "<h2>Judge</h2>" not in report.html_report(Run(header, run.only(methods=["caa", "unsteered"]).records))


def test_markdown_table(run):
    rows = sorted(average_table(run), key=lambda row: -row.bcs.mean)
    lines = report.markdown(run).splitlines()
    assert len(lines) == 4 + len(rows)
    assert {line.count("|") for line in lines[:-2]} == {8}
    assert lines[-1].startswith("Intervals are t intervals over 4 prompts")
    best = rows[0]
    assert lines[2].startswith(f"| FGAA + effects | {best.bcs.mean:.3f} [{best.bcs.low:.3f}, {best.bcs.high:.3f}] | +")
    assert f" | {best.difference.effective:.0f} of 8 | " in lines[2]


def test_methods_that_are_not_in_the_table_are_refused_by_name(run):
    """No default makes them SAE methods: a run with a method of another name has no best one, no table, no page."""
    odd = Run(run.header, [replace(r, method="fgaa_2") if r.method == "fgaa" else r for r in run.records])
    assert "fgaa_2" in odd.methods
    for told in (best_sae_method, average_table, concept_table, report.markdown, report.html_report, plots.pictures):
        with pytest.raises(DataError, match=r"fgaa_effects.*got the method 'fgaa_2'.*run\.only"):
            told(odd)
    assert best_sae_method(odd.only(methods=["caa", "sta", "fgaa_effects", "random"])) == "fgaa_effects"
    residual = Run(run.header, [r for r in run.records if r.method in ("unsteered", "random", "caa", "prompt")])
    assert best_sae_method(residual) is None


def test_samples_carry_what_is_seen_in_them(run):
    asked = []

    def seen(text, prompt):
        asked.append((text, prompt))
        return [f"{len(asked)} <b>"]

    page = report.html_report(run, samples=1, features=seen)
    assert len(asked) == page.count("&lt;b&gt;</li>") == 3 * len(run.concepts)  # unsteered, CAA and the best SAE method
    assert "<b>" not in page
    shown = {r.text for r in run.records if r.half == "report"}
    assert {text for text, _ in asked} <= shown
    assert 'class="seen"' not in report.html_report(run, samples=1)
