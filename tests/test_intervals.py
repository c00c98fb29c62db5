"""Intervals over prompts: against loops, their coverage by simulation, and the designs and texts that they count."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

import fgsteer as fg
from fgsteer.cli.bench_setup import QUICK
from fgsteer.data.shipped import load_bench_prompts
from fgsteer.errors import DataError, PairingError
from fgsteer.evaluation.bench.concept_runs import begun_design
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import Interval, mean_interval, paired_differences, t_quantile
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.evaluation.runs.records import HALVES, Unit
from fgsteer.evaluation.runs.tables import average_table, over_prompts
from tests.helpers import runs
from tests.reference import tables as naive

# sums in another order: a few ulps of float64
EXACT: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
# the reference's t quantile steps by a hundred-thousandth
ENDS: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-12}


def values(x):
    """{unit: value} of an array (prompts, seeds)."""
    return {Unit(p, s): float(x[p, s]) for p in range(x.shape[0]) for s in range(x.shape[1])}


@pytest.mark.parametrize("level", [0.5, 0.95])
@pytest.mark.parametrize("seeds", [1, 3])
def test_intervals_agree_with_a_loop_over_prompts(level, seeds):
    rng = np.random.default_rng(5)
    strata = [values(rng.normal(size=(7, 1)) + rng.normal(size=(7, seeds))) for _ in range(3)]
    found = over_prompts(strata) if level == 0.95 else mean_interval(strata, lambda unit: unit.prompt, level=level)
    np.testing.assert_allclose([*found], naive.interval(strata, lambda unit: unit.prompt, level), **ENDS)
    assert (found.clusters, found.units) == (7, 7 * seeds)
    shuffled = [dict(sorted(s.items(), key=lambda item: item[1])) for s in strata]
    assert mean_interval(shuffled, lambda unit: unit.prompt, level=level) == found  # whatever the order of units


def test_strata_without_a_common_prompt_are_independent():
    """Two samples are Welch's interval; concepts of which one lacks a prompt still move together."""
    rng = np.random.default_rng(6)
    one, two = (rng.normal(size=n) * s for n, s in ((5, 1.0), (9, 3.0)))
    strata = [{("a", n): x for n, x in enumerate(one)}, {("b", n): x for n, x in enumerate(two)}]
    np.testing.assert_allclose([*mean_interval(strata, lambda u: u)], naive.interval(strata, lambda u: u), **ENDS)
    shared = rng.normal(size=(8, 1))
    both = [values(shared + 0.01 * rng.normal(size=(8, 1))) for _ in range(2)]
    lacking = [both[0], {unit: x for unit, x in both[1].items() if unit.prompt < 7}]
    whole, part = over_prompts(both), over_prompts(lacking)
    # had the seven common prompts counted twice, the width would be smaller by about the square root of two
    assert (part.high - part.low) / (whole.high - whole.low) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (2, 4.3027), (7, 2.3646), (15, 2.1314), (30, 2.0423), (1e6, 1.9600)]
)
def test_t_quantiles_are_those_of_the_tables(freedom, expected):
    assert t_quantile(0.95, freedom) == pytest.approx(expected, abs=5e-5)  # the tables' four digits


def test_t_quantiles_between_whole_degrees_of_freedom():
    for level, freedom in ((0.5, 2.5), (0.9, 3.75), (0.999, 11.3)):
        assert t_quantile(level, freedom) == pytest.approx(naive.t_quantile(level, freedom), rel=1e-3)


def test_the_effective_number_of_units():
    rng = np.random.default_rng(7)
    x = 0.8 * rng.normal(size=(6, 1)) + rng.normal(size=(6, 4))
    found = over_prompts([values(x)])
    assert found.effective == pytest.approx(naive.effective(x.tolist()), rel=1e-9)
    assert 6 < found.effective < 24
    same = over_prompts([values(np.repeat(x[:, :1], 4, 1))])  # another seed tells nothing
    assert same.effective == pytest.approx(6)
    assert over_prompts([values(x[:, :1])]).effective == 6
    apart = over_prompts([values(x - x.mean(1, keepdims=True))])  # prompts that resemble each other: no more than all
    assert apart.effective == 24
    # the variance of a mean of four concepts that prompts move together, against that of as many texts by themselves
    many = [0.7 * rng.normal(size=(400, 1)) + 0.7 * rng.normal(size=(400, 3)) for _ in range(4)]
    told = over_prompts([values(x) for x in many])
    assert told.effective == pytest.approx(1200 / (1 + 2 * 0.5), rel=0.1)  # ICC 1/2, known to about 1/sqrt(400)


RUNS = 3000
ERROR = math.sqrt(0.95 * 0.05 / RUNS)  # of a coverage, from so many runs: 0.4 %


@pytest.mark.parametrize(("prompts", "seeds"), [(16, 3), (16, 1), (8, 3)])
def test_intervals_cover_the_truth_however_much_a_prompts_texts_resemble_each_other(prompts, seeds):
    """Nominal 95 %, at ICC .5; four concepts that share prompts, which move them together.

    Cluster means are normal here, for which a t interval is exact: 95 % at 8 prompts as at 16. Taken as independent
    units, the same texts cover 80 % and 78 % (16 and 8 prompts, 3 seeds); a percentile bootstrap of the prompts 92 %
    and 87 %.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(RUNS):
        easy = np.sqrt(0.5) * rng.normal(size=(prompts, 1))  # a prompt, for all concepts
        concepts = easy + np.sqrt(0.5) * rng.normal(size=(1, prompts, seeds))
        strata = [values(0.3 + x + 0.2 * rng.normal(size=(prompts, seeds))) for x in np.repeat(concepts, 2, 0)]
        found = over_prompts(strata)
        covered += found.low <= 0.3 <= found.high
    assert 0.95 - 4 * ERROR <= covered / RUNS <= 0.95 + 4 * ERROR
    assert covered / RUNS >= 0.93


def test_intervals_of_skewed_scores_cover_nearly_as_often():
    """Scores in [0, 1] with many near 0, as BCS has them: beta(2 q, 2 (1 - q)) around the prompt's own mean q.

    94 % at 16 prompts; at 8, where a t interval of skewed means is too narrow, 92 %.
    """
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(RUNS):
        means = rng.beta(1, 3, size=(16, 1))  # mean 1/4
        found = over_prompts([values(rng.beta(2 * means + 1e-9, 2 * (1 - means) + 1e-9, size=(16, 3)))])
        covered += found.low <= 0.25 <= found.high
    assert covered / RUNS >= 0.93 - 2 * ERROR


def test_intervals_refuse_what_has_none():
    nothing: list[list[dict[Unit, float]]] = [[], [{}], [{Unit(0, 0): 1.0}], [{Unit(0, 0): 1.0, Unit(1, 0): math.nan}]]
    one_prompt = [{Unit(0, seed): float(seed) for seed in range(8)}]
    for strata in [*nothing, one_prompt]:
        with pytest.raises(DataError):
            over_prompts(strata)
    with pytest.raises(DataError, match="8 values of 1 prompt,"):
        over_prompts(one_prompt)
    with pytest.raises(PairingError, match=r"2 of 3 .*\(0, 0\)"):
        paired_differences({(0, 0): 1.0, (0, 1): 1.0}, {(0, 1): 1.0, (1, 0): 1.0})
    level = mean_interval([{0: 0.25, 1: 0.25}], hash)
    assert level == Interval(0.25, 0.25, 0.25, 2, 2, 2.0)
    assert [mean_interval([{0: x, 1: x}], hash).clear for x in (-1.0, 0.0, 1.0)] == [True, False, True]
    mean, low, high = level
    assert mean == low == high


def test_a_benchmark_prefers_prompts_to_seeds():
    plan = BenchPlan(("love",), methods=("unsteered",))
    assert plan.prompts >= 16
    assert plan.seeds == 1
    assert (QUICK["prompts"], QUICK["seeds"]) == (8, 1)
    prompts = load_bench_prompts()
    assert len(prompts) == len(set(prompts)) == 64
    assert prompts[:16] == fg.load_neutral()[1]  # the prompts of earlier runs stay theirs


def test_a_run_that_goes_on_keeps_its_prompts_and_seeds(tmp_path):
    path = tmp_path / "bench.jsonl"
    assert begun_design(path) == {}
    header = {"plan": {"prompts": [str(n) for n in range(2 * 8)], "seeds": 2}}
    (tmp_path / "bench.parts").mkdir()
    (tmp_path / "bench.parts" / "love.jsonl").write_text(json.dumps(header) + "\n{")
    assert begun_design(path) == {"prompts": 8, "seeds": 2}
    path.write_text(json.dumps({**header, "plan": {**header["plan"], "seeds": 3}}) + "\n")
    assert begun_design(path) == {"prompts": 8, "seeds": 3}
    path.write_text("[1]\n")
    assert begun_design(path) == {"prompts": 8, "seeds": 2}


def test_tables_of_a_run_count_its_prompts(tmp_path):
    """A made-up run in which a prompt moves every text of it by far more than a seed does."""
    rng = np.random.default_rng(3)
    ease = rng.uniform(0.2, 0.8, 8)
    made = list(runs.rows(concepts=("love",), methods={"caa": (0.5, 1.0)}, layers=(1,), seeds=4))
    for row in made[1:]:
        row["half"] = HALVES[row["seed"] % 2]
        row["behavior"], row["coherence"] = float(ease[row["prompt"]] + 0.01 * rng.uniform()), 1.0
    run = fg.load_run(runs.write(tmp_path / "run.jsonl", made))
    for row in average_table(run):
        assert (row.bcs.clusters, row.bcs.units) == (8, 16)
        assert row.bcs.effective == pytest.approx(8, rel=0.02)
        np.testing.assert_allclose(row.bcs.high - row.bcs.mean, 2.3646 * ease.std(ddof=1) / math.sqrt(8), rtol=0.05)


def test_pairs_of_one_prompt_are_one_cluster():
    pairs = [fg.ContrastPair(f"yes {n}", f"no {n}", prompt=f"question {n // 3}") for n in range(12)]
    x = np.random.default_rng(4).normal(size=12)
    found = Propensity(fg.ContrastSet("q", pairs=pairs)).interval(x)
    stratum = {n: 12 * value for n, value in enumerate(x)}
    np.testing.assert_allclose([*found], naive.interval([stratum], lambda n: n // 3), **ENDS)
    assert (found.clusters, found.units) == (4, 12)
    for prompt in ("", "the one question"):  # what all share is no cluster
        alike = [fg.ContrastPair(pair.positive, pair.negative, prompt=prompt) for pair in pairs]
        assert Propensity(fg.ContrastSet("q", pairs=alike)).interval(x).clusters == 12
    chats = [
        fg.ContrastPair(p.positive, p.negative, prompt=[{"role": "user", "content": str(n // 6)}])
        for n, p in enumerate(pairs)
    ]
    mixed = fg.ContrastSet("q", pairs=chats, positives=["a", "b"], negatives=["c", "d", "e"])
    assert Propensity(mixed).interval(np.arange(17.0)).clusters == 2 + 2 + 3
