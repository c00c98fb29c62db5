"""The benchmark with own-text KL as its cost: strengths, records, tables and pictures; and receipts from the shell."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.cli.bench_setup import KLS, cost_fields
from fgsteer.cli.diagnose import print_diagnosis
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.own_costs import OwnTextMeter, own_strengths
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import wilson
from fgsteer.evaluation.metrics.own_text import own_texts
from fgsteer.evaluation.runs.plots import own_text_curves, pictures
from fgsteer.evaluation.runs.records import parse_record
from fgsteer.evaluation.runs.report import html_report, markdown
from fgsteer.evaluation.runs.tables import average_table, base_rate
from tests.helpers.cli import invoke_on_cpu

LAYER = 2
PLAN = BenchPlan(
    concepts=("love",),
    methods=("unsteered", "prompt", "caa"),
    layers=(LAYER,),
    kls=(0.5, 2.0),
    matched=2.0,
    prompts=2,
    texts=2,
    max_new_tokens=4,
    top_k=MAX_COUNT,
    top_p=1.0,
)


class LengthJudge:
    """Judges by length."""

    name = "length"

    def score(self, texts, concept):
        return torch.tensor([min(1.0, len(text) / 100) for text in texts], dtype=torch.float64)


@pytest.fixture(scope="module")
def bench():
    model, tokenizer = fg.load_model("default")
    return Bench(model, tokenizer, {}, {}, LengthJudge(), PLAN)


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "bench.jsonl"
    bench.run(path)
    return fg.load_run(path)


def test_records_have_what_their_texts_cost(bench, run):
    assert run.has_kl
    assert run.cost_unit == "nats of own-text KL"
    assert {record.kl for record in run.records if record.method == "unsteered"} == {0.0}
    assert all(record.kl > 0 for record in run.records if record.method != "unsteered")
    assert all(0 < record.distinct <= 1 for record in run.records)
    built = bench.concept("love")
    for method in ("prompt", "caa"):
        setting = next(s for s in run.settings if s.method == method)
        entry = None if method == "prompt" else built.make(method, LAYER)(setting.coefficient)
        plain = PLAN.prompts_of("report")
        again = own_texts(
            bench.model, bench.tokenizer, built.prompts(method, plain), plain, [entry], PLAN.sampling, number=1
        )
        records = run.cells[setting, "report"].values()
        assert [record.text for record in records] == again.texts
        # texts are made beside others in the run, and float32 sums depend on the batch
        assert [record.kl for record in records] == pytest.approx(again.nats.tolist(), abs=1e-4)


def test_strengths_are_those_of_the_costs(bench):
    prompts = PLAN.prompts_of("tune")
    meter = OwnTextMeter(bench.model, bench.tokenizer, prompts, PLAN.sampling, rows=2)
    make = bench.concept("love").make("caa", LAYER)
    (strengths,) = own_strengths(meter, [make], PLAN.kls)
    costs = meter([make(c) for c in strengths])
    assert costs[0] < costs[1]
    assert costs == pytest.approx(PLAN.kls, rel=0.11)  # the tolerance of 0.1, and rounding of another batch
    both = OwnTextMeter(bench.model, bench.tokenizer, prompts, PLAN.sampling, rows=100)
    assert both([make(c) for c in strengths]) == pytest.approx(costs, abs=1e-4)


def test_a_run_of_neutral_costs_stays_as_it_was(run):
    neutral = BenchPlan(concepts=("love",), methods=("unsteered",), prompts=2)
    assert neutral.costs == neutral.ce_rises
    row = {key: value for key, value in run.records[0].as_row().items() if key not in ("kl", "distinct")}
    assert parse_record(row).as_row() == row
    with pytest.raises(fg.DataError, match="finite"):
        parse_record({**row, "kl": "1"})


def test_own_texts_of_another_sampling_or_engine_are_refused(bench, tmp_path):
    for changes in ({"top_k": 50}, {"top_p": 0.9}, {"temperature": 0.5}):
        with pytest.raises(fg.DataError, match="cut nothing off"):
            bench.with_plan(replace(PLAN, **changes)).run(tmp_path / "bench.jsonl")
    other = bench.with_plan(PLAN)

    class Engine:
        name = "engine 1"

        def __call__(self, *_):
            raise AssertionError

    other.generator = Engine()
    with pytest.raises(fg.DataError, match="engine 1"):
        other.run(tmp_path / "bench.jsonl")
    for wrong in ({"kls": (2.0, 1.0)}, {"kls": (0.0,)}, {"matched": 0.75}):
        with pytest.raises(fg.DataError):
            replace(PLAN, **wrong)


def test_tables_pages_and_pictures_have_the_cost_and_its_bound(run):
    (caa,) = [row for row in average_table(run) if row.method == "caa"]
    records = run.cells[next(s for s in run.settings if s.method == "unsteered"), "report"].values()
    p = sum(record.behavior for record in records) / len(records)
    assert base_rate(run, "love").mean == pytest.approx(p)
    assert caa.own_text.least == pytest.approx(fg.least_kl(p, caa.behavior.mean))
    assert "own-text KL [95 %] | least | distinct" in markdown(run)
    assert "matched at 2 nats of own-text KL" in html_report(run)
    assert "own-text" in [picture.name for picture in pictures(run)]
    axis = own_text_curves(run).axes[0]
    bound, _, measured = axis.lines
    for kl, behavior in zip(bound.get_xdata(), bound.get_ydata(), strict=True):
        assert kl == pytest.approx(fg.least_kl(p, behavior))
    assert sorted(np.asarray(measured.get_ydata()).tolist()) == sorted(
        run.mean(s, measure="behavior") for s in run.settings if s.method == "caa" and s.matched is None
    )


def test_what_is_never_seen_need_not_be_impossible(run):
    none = fg.Run(run.header, [replace(r, behavior=0.0) if r.method == "unsteered" else r for r in run.records])
    assert base_rate(none, "love").high == wilson(0, 2).high
    (caa,) = [row for row in average_table(none) if row.method == "caa"]
    expected = fg.least_kl(wilson(0, 2).high, caa.behavior.mean)
    assert caa.own_text.least == (0.0 if caa.behavior.mean <= wilson(0, 2).high else pytest.approx(expected))
    without = run.only(methods=("caa",))
    assert average_table(without)[0].own_text.least is None


def test_options_of_costs():
    assert cost_fields(None, None, [0.5], None) == {}
    assert cost_fields("neutral", None, [0.5], None) == {}
    assert cost_fields("own-text", None, None, None) == {"kls": KLS, "top_k": MAX_COUNT, "top_p": 1.0}
    assert cost_fields(None, [4.0, 1.0], None, 4.0)["kls"] == (1.0, 4.0)
    for wrong in (
        ("0.3", None, None, None),
        ("neutral", [1.0], None, None),
        ("own-text", None, [0.5], None),
        ("own-text", [1.0], None, 2.0),
    ):
        with pytest.raises(fg.DataError):
            cost_fields(*wrong)


def test_the_shell_prints_and_stores_a_receipt(tmp_path, capsys):
    file = tmp_path / "v.safetensors"
    direction = torch.randn(fg.load_model("default")[0].config.hidden_size)
    fg.SteeringVector(direction, LAYER).save(file)
    output = json.loads(invoke_on_cpu("diagnose", "love", "-v", file, "-c", "2", "--store", "--json").stdout)
    found = output["receipt"]
    assert found["coefficient"] == 2.0
    assert found["wrong_way"]["units"] == 40, "the held-out texts of the contrast set"
    assert fg.SteeringVector.load(file).provenance["receipt"] == found
    print_diagnosis(output)
    assert "relative dose: " in capsys.readouterr().out
    with pytest.raises(fg.DataError, match="vector"):
        invoke_on_cpu("diagnose", "love", "-c", "2")
    with pytest.raises(fg.DataError, match="--store"):
        invoke_on_cpu("diagnose", "love", "-v", file, "--store")
