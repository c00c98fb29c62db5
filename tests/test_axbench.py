"""AxBench: its files, its rules against plain loops, its protocol on a miniature, and its command."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from importlib import util
from typing import Any

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer import cli
from fgsteer.evaluation.axbench import published
from fgsteer.evaluation.axbench.building import a_max, first_component, max_auc_feature, mean_difference
from fgsteer.evaluation.axbench.contestants import CONTESTANTS, available
from fgsteer.evaluation.axbench.detection import aurocs, detection, youden_threshold
from fgsteer.evaluation.axbench.protocol import (
    choose_factor,
    harmonic_mean,
    instructions_of,
    selection_size,
    text_score,
)
from fgsteer.evaluation.axbench.ratings import RatedAnswer, parse_rating
from fgsteer.evaluation.axbench.reading import as_prompt, shared_beginning, token_activations
from tests.helpers import axbench_folder
from tests.helpers.judges import BagOfWords
from tests.helpers.saes import make_sae
from tests.reference import axbench as reference


def without_template(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


UNTRAINED = ("prompt", "diffmean", "sae", "random")


@pytest.fixture
def folder(tmp_path):
    return axbench_folder.write(tmp_path / "mini")


@pytest.fixture
def data(folder):
    return fg.load_axbench(folder)


def plan(**changes):
    quick = {"instructions": 4, "max_new_tokens": 4, "factors": (0.5, 1.0), "trained_factors": (2.0, 4.0)}
    return fg.AxBenchPlan(**{"methods": UNTRAINED, **quick, **changes})


# --- rules


@pytest.mark.parametrize(
    ("ratings", "mean"), [((2, 2, 2), 2), ((2, 2, 1), 1.5), ((2, 1, 1), 1.2), ((1, 1, 1), 1), ((2, 2, 0), 0)]
)
def test_harmonic_means_of_the_paper(ratings, mean):
    assert harmonic_mean(ratings) == pytest.approx(mean, rel=1e-15)  # one rounding


def test_harmonic_means_of_all_ratings():
    for ratings in itertools.product((0, 1, 2), repeat=3):
        assert harmonic_mean(ratings) == pytest.approx(reference.harmonic(ratings), rel=1e-14)
        assert text_score(*ratings) == harmonic_mean(ratings)


def test_suppression_turns_the_rating_of_the_concept_round():
    assert text_score(0, 2, 2, "suppress") == 2
    assert text_score(2, 2, 2, "suppress") == 0
    assert text_score(1, 2, 1, "suppress") == text_score(1, 2, 1)


@pytest.mark.parametrize(("n", "first"), [(2, 1), (3, 1), (4, 2), (5, 3), (6, 3), (7, 3), (9, 5), (10, 5)])
def test_halves_round_as_python_does(n, first):
    """n − round(n/2), where halves go to the even number: 3 is 1 and 2, 5 is 3 and 2."""
    assert selection_size(n) == first


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_factor_is_chosen_on_the_first_half_and_the_first_of_equals(n):
    rng = np.random.default_rng(n)
    factors = (0.2, 0.4, 1.0, 5.0)
    for _ in range(30):
        scores = {f: rng.integers(0, 3, n).astype(float).tolist() for f in factors}  # many ties
        best = choose_factor([scores[f] for f in factors], selection_size(n))
        expected, told = reference.best_factor(factors, scores, n)
        assert factors[best] == expected
        assert np.mean(scores[factors[best]][selection_size(n) :]) == pytest.approx(told)
    assert choose_factor([[1.0, 0.0], [1.0, 9.0]], 1) == 0


def test_factors_of_suppression_rise_from_the_strongest(folder, llama, tokenizer, data, tmp_path):
    """Groups are in the order of the signed factor, so that of equals the strongest is taken."""
    found = fg.axbench(
        llama, tokenizer, data, tmp_path / "out", hookpoint=1, plan=plan(methods=("diffmean",), mode="suppress")
    )
    texts = json.loads((tmp_path / "out" / "texts" / "diffmean-0.json").read_text())
    assert texts["factors"] == [-1.0, -0.5]
    assert found.content["plan"]["mode"] == "suppress"


def test_instructions_are_those_that_pandas_draws():
    pandas = pytest.importorskip("pandas")
    listed = [f"instruction {n}" for n in range(805)]
    frame = pandas.DataFrame({"instruction": listed})
    for concept in (0, 1, 7, 499):
        assert instructions_of(listed, 10, concept) == frame.sample(10, random_state=concept)["instruction"].tolist()


def test_instructions_of_concept_0_as_pandas_drew_them():
    """Noted from pandas 3.1: the test above needs it installed."""
    assert instructions_of([str(n) for n in range(12)], 4, 0) == ["6", "11", "4", "10"]
    with pytest.raises(fg.DataError, match="13 are to be drawn"):
        instructions_of([str(n) for n in range(12)], 13, 0)


def test_a_max_is_50_where_nothing_reads_above_0():
    assert a_max([-3.0, 2.5, 1.0]) == 2.5
    assert a_max([-3.0, 0.0]) == 50.0


# --- detection


def test_areas_are_the_shares_of_pairs():
    g = torch.Generator().manual_seed(0)
    values = torch.randint(0, 4, (14, 700), generator=g).float()  # ties, and more columns than one part
    positive = torch.arange(14) % 3 == 0
    areas = aurocs(values, positive)
    for n in (0, 1, 511, 512, 699):
        column = values[:, n].tolist()
        sides = [[x for x, up in zip(column, positive.tolist(), strict=True) if up == side] for side in (True, False)]
        assert float(areas[n]) == pytest.approx(reference.area(*sides), abs=1e-12)  # sums of halves in float64


def test_thresholds_are_those_of_the_curve():
    rng = np.random.default_rng(1)
    for _ in range(40):
        up, down = (rng.integers(0, 5, n).astype(float).tolist() for n in (5, 6))
        assert youden_threshold(up, down) == reference.roc_threshold(up, down)
    assert youden_threshold([1.0], [1.0]) is None
    assert youden_threshold([0.0], [1.0]) is None


def test_hard_negatives_count_in_the_area_and_not_in_the_threshold():
    readings = [3.0, 2.0, 1.0, 0.0, 2.5, 0.5]
    kinds = ["positive", "positive", "negative", "negative", "hard negative", "hard negative"]
    found = detection(readings, kinds)
    assert found.auroc == reference.area([3.0, 2.0], [1.0, 0.0, 2.5, 0.5]) == 0.875
    assert found.auroc_plain == 1.0
    assert found.threshold == 2.0
    assert (found.positive_accuracy, found.negative_accuracy, found.hard_accuracy) == (1.0, 1.0, 0.5)
    assert found.hard_average == 0.75
    assert detection(readings[:4], kinds[:4]).hard_average is None


def test_max_auc_takes_the_first_of_the_best():
    largest = torch.tensor([[0.0, 2.0, 5.0, 5.0], [0.0, 1.0, 4.0, 4.0], [1.0, 1.5, 3.0, 3.0]])
    assert max_auc_feature(largest, [True, True, False]) == (2, 1.0)


# --- activations and vectors


def test_diffmean_is_the_mean_over_tokens(llama, tokenizer, data):
    concept, at = data.concepts[0], fg.Hookpoint(1)
    sides = []
    for texts in (concept.positives, concept.negatives):
        found = dict(token_activations(llama, tokenizer, texts, at))
        sides.append([found[n] for n in range(len(texts))])
    direction = mean_difference(*(torch.cat(side) for side in sides))
    expected = reference.unit_mean_difference(*sides)
    assert direction.tolist() == pytest.approx(expected, abs=1e-12)  # float64 sums of float32 values


def test_tokens_are_those_after_what_all_chats_begin_with(llama, tokenizer, data):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = "{{ 'user I ' }}{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    text = data.concepts[0].positives[0]
    assert shared_beginning(chat) == 2  # the template brings its own BOS, or none
    whole = len(chat(f"user I {text.input} {text.output}", add_special_tokens=False)["input_ids"])
    ((_, values),) = token_activations(llama, chat, [text], fg.Hookpoint(1))
    assert len(values) == whole - shared_beginning(chat)
    assert as_prompt(chat, "the man") == [{"role": "user", "content": "the man"}]
    assert as_prompt(without_template(tokenizer), "the man") == "the man\n"


def test_the_first_component_is_turned_towards_the_concept():
    g = torch.Generator().manual_seed(3)
    points = torch.randn(50, 6, generator=g) * torch.tensor([5.0, 1, 1, 1, 1, 1])
    component = first_component(points, torch.tensor([-1.0, 0, 0, 0, 0, 0], dtype=torch.float64))
    assert component[0] < -0.9  # the axis of the largest spread; its sample wanders by a few per cent
    scatter = torch.linalg.svd(points.double() - points.double().mean(0)).Vh[0]
    assert abs(float(component @ scatter)) == pytest.approx(1.0, abs=1e-9)


# --- files


def test_both_kinds_of_tables_read_alike(tmp_path):
    pytest.importorskip("pyarrow")
    one = fg.load_axbench(axbench_folder.write(tmp_path / "x" / "mini"))
    other = fg.load_axbench(axbench_folder.write(tmp_path / "y" / "mini", parquet=True))
    assert one.sha256 == other.sha256
    first = one.concepts[0]
    assert (first.feature, first.genre, len(first.positives), len(first.negatives)) == (3, "text", 4, 4)
    assert [len(first.of(kind)) for kind in ("positive", "negative", "hard negative")] == [4, 4, 2]
    assert one.limit(1).concepts == one.concepts[:1]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    folder = axbench_folder.write(tmp_path / "mini", parquet=True)
    find = util.find_spec
    monkeypatch.setattr(
        "fgsteer.evaluation.axbench.files.find_spec", lambda name: None if name == "pyarrow" else find(name)
    )
    with pytest.raises(fg.DataError, match=r"pip install 'fgsteer\[axbench\]'"):
        fg.load_axbench(folder)


def without(rows, field):
    return [{key: value for key, value in row.items() if key != field} for row in rows]


def set_in(rows, **values):
    return [{**rows[0], **values}, *rows[1:]]


BROKEN = {
    "no column": (lambda m, t, e, i: (m, without(t, "concept_genre"), e, i), "lacks concept_genre"),
    "no column of the evaluation": (lambda m, t, e, i: (m, t, without(e, "sae_id"), i), "lacks sae_id"),
    "another category": (lambda m, t, e, i: (m, set_in(t, category="good"), e, i), "field 'category'"),
    "no number": (lambda m, t, e, i: (m, set_in(t, concept_id="0"), e, i), "field 'concept_id'"),
    "below the shared id": (lambda m, t, e, i: (m, set_in(t, concept_id=-2), e, i), "field 'concept_id'"),
    "no text": (lambda m, t, e, i: (m, set_in(t, output=None), e, i), "field 'output'"),
    "a reference without a feature": (lambda m, t, e, i: (set_in(m, ref="https://x/y"), t, e, i), "field 'ref'"),
    "a concept twice": (lambda m, t, e, i: ([*m, m[0]], t, e, i), "twice"),
    "no genre": (lambda m, t, e, i: (set_in(m, concept_genres_map={}), t, e, i), "concept_genres_map"),
    "no concept": (lambda m, t, e, i: ([], t, e, i), "no concept"),
    "no positives": (lambda m, t, e, i: (m, t[4:], e, i), "no training text with it"),
    "no negatives": (lambda m, t, e, i: (m, t[:8], e, i), "of genre 'text' without it"),
    "no evaluation": (lambda m, t, e, i: (m, t, e[10:], i), "no positive row"),
    "no instruction": (lambda m, t, e, i: (m, t, e, [{"prompt": "x"}]), "lacks instruction"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_bad_files_are_refused_with_their_place(name, tmp_path):
    change, told = BROKEN[name]
    with pytest.raises(fg.DataError, match=told):
        fg.load_axbench(axbench_folder.write(tmp_path / "mini", tables=change(*axbench_folder.tables())))


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(fg.DataError, match="There is no folder"):
        fg.load_axbench(tmp_path / "none")
    (folder / "alpaca_eval.json").rename(tmp_path / "asked.json")
    with pytest.raises(fg.DataError, match=r"alpaca_eval\.json.*--instructions"):
        fg.load_axbench(folder)
    assert len(fg.load_axbench(folder, instructions=tmp_path / "asked.json").instructions) == 12
    (folder / "inference" / "latent_eval_data.jsonl").unlink()
    with pytest.raises(fg.DataError, match="no latent_eval_data"):
        fg.load_axbench(folder)


# --- runs


def test_every_method_runs_and_a_second_call_makes_nothing(llama, tokenizer, data, tmp_path):
    sae = make_sae()
    effects = fg.EffectApproximator(torch.randn(32, 24), torch.randn(24), sae.hookpoint, sae.sha256)
    trained = {row.name: {"epochs": 1} for row in CONTESTANTS.values() if row.kind == "trained"}
    for name, settings in trained.items():
        settings |= {"features": 6} if name.endswith("_sae") else {}
    common = {"sae": sae, "effects": effects, "rater": fg.EmbeddingRater(BagOfWords())}
    everything = plan(methods=None, settings=trained, factors=(1.0,), trained_factors=(2.0,))
    found = fg.axbench(llama, tokenizer, data, tmp_path / "out", plan=everything, **common)
    assert list(found.scores) == list(available(sae=True, effects=True)) == list(CONTESTANTS)
    assert all(0 <= score <= 2 for score in found.scores.values())
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.*") if path.parent.name in
               ("vectors", "texts", "measures", "readings")}  # fmt: skip
    assert len(written) > 4 * len(CONTESTANTS)
    again = fg.axbench(llama, tokenizer, data, tmp_path / "out", plan=everything, **common)
    assert again.content == found.content
    assert {path: path.stat().st_mtime_ns for path in written} == written
    loaded = fg.load_axbench_result(tmp_path / "out")
    assert loaded.table == found.table
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == found.table


def test_a_model_without_a_chat_template(llama, tokenizer, data, tmp_path):
    """Texts are then an instruction, a line break and the answer, for every kind of method."""
    quick = {name: {"epochs": 1} for name in ("lm", "reps", "reft_r1")}
    chosen = plan(methods=("diffmean", "fgaa", "sae_a", *quick), settings=quick, factors=(1.0,), trained_factors=(2.0,))
    found = fg.axbench(llama, without_template(tokenizer), data, tmp_path / "out", sae=make_sae(), plan=chosen, limit=1)
    assert len(found.content["methods"]) == 7


def test_what_is_reported_is_what_the_kept_answers_score(llama, tokenizer, data, tmp_path):
    rater = fg.EmbeddingRater(BagOfWords())
    found = fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(), rater=rater)
    (row,) = (one for one in found.content["methods"] if one["method"] == "diffmean")
    for concept, one in zip(data.concepts, row["by_concept"], strict=True):
        texts = json.loads((tmp_path / "out" / "texts" / f"diffmean-{concept.id}.json").read_text())
        measures = json.loads((tmp_path / "out" / "measures" / f"diffmean-{concept.id}.json").read_text())
        asked = instructions_of(data.instructions, 4, concept.id)
        scores = {}
        for n, factor in enumerate(texts["factors"]):
            answers = [
                RatedAnswer(*part) for part in zip(asked, texts["texts"][n], measures["coherences"][n], strict=True)
            ]
            scores[factor] = [harmonic_mean(three) for three in rater.rate(concept, answers)]
        factor, score = reference.best_factor(texts["factors"], scores, 4)
        assert (one["factor"], one["score"]) == (factor, pytest.approx(score, abs=1e-12))
    assert row["score"]["mean"] == pytest.approx(np.mean([one["score"] for one in row["by_concept"]]))


def test_a_run_goes_on_and_another_plan_is_refused(llama, tokenizer, data, tmp_path, monkeypatch):
    whole = fg.axbench(llama, tokenizer, data, tmp_path / "whole", sae=make_sae(), plan=plan())

    class StopError(Exception):
        pass

    def stop(done, *_):
        if done == 12:
            raise StopError

    hooks = sum(len(module._forward_hooks) for module in llama.modules())
    with pytest.raises(StopError):
        fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(), progress=stop)
    assert sum(len(module._forward_hooks) for module in llama.modules()) == hooks
    some = list((tmp_path / "out" / "texts").glob("*.json"))
    assert 0 < len(some) < 10
    found = fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan())
    assert found.content == whole.content
    with pytest.raises(fg.PairingError, match="max_new_tokens"):
        fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(max_new_tokens=5))
    fresh = fg.axbench(
        llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(max_new_tokens=5), fresh=True
    )
    assert fresh.content["plan"]["max_new_tokens"] == 5
    (tmp_path / "out" / "texts" / "none-0.json").write_text('{"factors": [0.0], "texts": [["a"]]}')
    with pytest.raises(fg.FormatError, match=r"none-0\.json is damaged"):
        fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(max_new_tokens=5))


def test_a_run_that_was_stopped_while_it_saved_vectors_goes_on(llama, tokenizer, data, tmp_path, monkeypatch):
    """The checkpoint is of a whole group, of which some vectors are there already."""
    options: Any = {"hookpoint": 1, "plan": plan(methods=("lm",)), "write": False}
    save, saved = fg.SteeringVector.save, []

    def stop(vector, path):
        if saved:
            raise KeyboardInterrupt
        saved.append(path)
        return save(vector, path)

    monkeypatch.setattr(fg.SteeringVector, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        fg.axbench(llama, tokenizer, data, tmp_path, **options)
    monkeypatch.setattr(fg.SteeringVector, "save", save)
    assert len(list(tmp_path.glob("vectors/*"))) == 1
    assert len(list(tmp_path.glob("*training.safetensors"))) == 1
    fg.axbench(llama, tokenizer, data, tmp_path, **options)
    assert not list(tmp_path.glob("*training.safetensors"))


def test_methods_are_added_to_a_run_and_keep_their_settings(llama, tokenizer, data, tmp_path):
    out = tmp_path / "out"
    fg.axbench(llama, tokenizer, data, out, hookpoint=1, plan=plan(methods=("diffmean",)))
    before = (out / "texts" / "diffmean-1.json").stat().st_mtime_ns
    probe = plan(methods=("diffmean", "probe"), settings={"probe": {"ridge": 2.0}})
    found = fg.axbench(llama, tokenizer, data, out, hookpoint=1, plan=probe)
    assert [row["method"] for row in found.content["methods"]] == ["none", "diffmean", "probe"]
    assert (out / "texts" / "diffmean-1.json").stat().st_mtime_ns == before
    with pytest.raises(fg.PairingError, match="ridge was 2"):
        fg.axbench(llama, tokenizer, data, out, hookpoint=1, plan=plan(methods=("probe",)))


def test_a_vector_is_added_by_factor_and_a_max(llama, tokenizer, data, tmp_path):
    """The kept answers are those of h + f·a_max·v, drawn again with the same random numbers."""
    from fgsteer.evaluation.axbench.writing import Drawing

    chosen = plan(methods=("diffmean",))
    fg.axbench(llama, tokenizer, data, tmp_path / "out", hookpoint=1, plan=chosen)
    readings = json.loads((tmp_path / "out" / "readings" / "diffmean-0.json").read_text())
    kept = json.loads((tmp_path / "out" / "texts" / "diffmean-0.json").read_text())
    vector = fg.SteeringVector.load(tmp_path / "out" / "vectors" / "diffmean-0.safetensors")
    assert vector.norm == pytest.approx(1.0, abs=1e-6)  # float32
    found = dict(token_activations(llama, tokenizer, data.concepts[0].evaluation, fg.Hookpoint(1)))
    largest = [float((found[n] @ vector.direction).max()) for n in range(len(found))]
    assert readings["readings"] == pytest.approx(largest, abs=1e-5)  # float32 sums in another order
    assert readings["a_max"] == a_max(readings["readings"])
    asked = [as_prompt(tokenizer, text) for text in instructions_of(data.instructions, 4, 0)]
    for factor, texts in zip(kept["factors"], kept["texts"], strict=True):
        steering = vector.add(factor * readings["a_max"])
        options = {"do_sample": False, "max_new_tokens": 4, "logits_processor": [Drawing(chosen, 0, 4)]}
        assert texts == fg.generate(llama, tokenizer, asked, steering=[steering], per_row=False, **options)


def test_without_a_rater_and_without_answers(llama, tokenizer, data, tmp_path):
    found = fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(), write=False)
    assert not list((tmp_path / "out" / "texts").glob("*"))
    by_name = {row["method"]: row for row in found.content["methods"]}
    assert by_name["diffmean"]["detection"]["auroc"] > 0.5
    assert by_name["none"]["detection"] is None
    assert set(found.scores.values()) == {None}
    found = fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan())
    assert all(row["perplexity"] > 1 for row in found.content["methods"])
    assert set(found.scores.values()) == {None}
    assert "No judge" in found.table


def test_published_figures_are_compared_only_with_their_own_kind(llama, tokenizer, data, tmp_path):
    run = {
        "model": "google/gemma-2-2b-it",
        "layer": 10,
        "site": "resid_post",
        "judge": "endpoint:gpt-4o-mini",
        "concepts": 500,
        "plan": fg.AxBenchPlan().as_dict(),
    }
    assert published.differences(run) == ()
    assert "compare with care" in published.verdict(run)
    for change, told in (
        ({"model": "smollm2"}, "the model is smollm2"),
        ({"layer": 12}, "layer 12"),
        ({"judge": "endpoint:gpt-4o"}, "the judge is endpoint:gpt-4o"),
        ({"judge": None}, "the judge is none"),
        ({"concepts": 10}, "10 concepts"),
        ({"plan": fg.AxBenchPlan(instructions=4).as_dict()}, "instructions is 4"),
        ({"plan": fg.AxBenchPlan(factors=(1.0, 2.0)).as_dict()}, "factors is 2 values"),
    ):
        assert told in published.verdict({**run, **change})
        assert published.verdict({**run, **change}).startswith("Not comparable")
    found = fg.axbench(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(), limit=1)
    assert found.verdict.startswith("Not comparable")
    theirs = "| 0.297 | 0.178 | 0.322 | 0.158 |"  # DiffMean's scores
    assert theirs not in found.table, "beside detection they would be read as detection"
    score = {"mean": 1.0, "low": None, "high": None}
    rated = {**found.content, "methods": [{**row, "score": score} for row in found.content["methods"]]}
    assert theirs in fg.AxBenchResult(rated).table, "beside ours"


def test_what_cannot_run_is_refused_before_work(llama, tokenizer, data, tmp_path):
    run = fg.axbench
    with pytest.raises(fg.DataError, match="hookpoint"):
        run(llama, tokenizer, data, tmp_path / "out")
    with pytest.raises(fg.PairingError, match="an SAE"):
        run(llama, tokenizer, data, tmp_path / "out", hookpoint=1, plan=plan(methods=("sae",)))
    with pytest.raises(fg.PairingError, match="measured effects"):
        run(llama, tokenizer, data, tmp_path / "out", sae=make_sae(), plan=plan(methods=("sae_ts",)))
    with pytest.raises(fg.PairingError, match="feature 3"):
        run(llama, tokenizer, data, tmp_path / "out", sae=make_sae(d_sae=3), plan=plan(methods=("sae",)))
    with pytest.raises(fg.DataError, match="12 instructions"):
        run(llama, tokenizer, data, tmp_path / "out", hookpoint=1, plan=plan(methods=("pca",), instructions=13))
    with pytest.raises(fg.ArgumentError, match="rater"):
        run(llama, tokenizer, data, tmp_path / "out", hookpoint=1, rater="gpt-4o-mini")
    assert not (tmp_path / "out").exists()
    for wrong in (
        {"methods": ("nothing",)},
        {"mode": "both"},
        {"factors": ()},
        {"factors": (float("nan"),)},
        {"instructions": 1},
        {"settings": {"reps": {"speed": 1}}},
        {"settings": {"diffmean": {"x": 1}}},
        {"settings": {"fgaa": {"x": 1}}},
    ):
        with pytest.raises((fg.DataError, fg.ArgumentError)):
            fg.AxBenchPlan(**wrong)


# --- ratings


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("It is there. Rating: [[2]]", 2),
        ("Rating: 1", 1),
        ("**Rating: 2**", 2),
        ("Rating: 0\nRating: 1.", 1),
        ("Rating: 2.0", 2),
        ("rating: 2", 0),
        ("2", 0),
        ("Rating: 3", 0),
        ("Rating: nan", 0),
        ("Rating:", 0),
        ("Rating: 0.5", 0),
        ("", 0),
    ],
)
def test_ratings_are_read_after_their_word(answer, rating):
    assert parse_rating(answer) == rating


def test_a_chat_model_is_asked_three_questions_and_never_twice(data, tmp_path, monkeypatch):
    asked = []

    def ask(self, prompt, *_):
        asked.append(prompt)
        return f"So. Rating: {min(2, prompt.count('bride'))}"

    monkeypatch.setattr("fgsteer.evaluation.judges.chat_client.ChatClient.ask", ask)
    rater = fg.EndpointRater("m", base_url="http://localhost:1/v1", cache=tmp_path / "kept.jsonl")
    answers = [RatedAnswer("is it?", "a bride and a bride", 0.5), RatedAnswer("a bride?", "no", 0.1)]
    assert rater.rate(data.concepts[0], answers) == [(2.0, 2.0, 2.0), (0.0, 1.0, 0.0)]
    assert len(asked) == 6
    assert any('"concept": "a wedding"' in prompt for prompt in asked)
    again = fg.EndpointRater("m", base_url="http://localhost:1/v1", cache=tmp_path / "kept.jsonl")
    assert again.rate(data.concepts[0], answers) == [(2.0, 2.0, 2.0), (0.0, 1.0, 0.0)]
    assert len(asked) == 6
    assert again.identity == rater.identity != fg.EndpointRater("n", base_url="http://localhost:1/v1").identity


def test_offline_ratings_by_hand(data):
    rater = fg.EmbeddingRater(BagOfWords())
    facts = rater.prepare(data.concepts, [RatedAnswer("the dog", "the dog", 1.0)])
    assert facts["usual_cosine"] == pytest.approx(1.0, abs=1e-6)  # float32 unit vectors
    shown, other, blank = rater.rate(
        data.concepts[0],
        [
            RatedAnswer("the dog", "bride ring church wedding groom bride", 0.25),
            RatedAnswer("the dog", "the dog", 1.0),
            RatedAnswer("the dog", " ", 0.0),
        ],
    )
    assert shown.concept > 1 > other.concept
    assert (shown.fluency, other.fluency) == (0.5, 2.0)
    assert other.instruction == pytest.approx(2.0, abs=1e-6)
    assert shown.instruction < 1
    assert blank == (0.0, 0.0, 0.0)


# --- the command


def test_the_command_writes_a_table(folder, llama, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: (llama, tokenizer))
    arguments = ["axbench", folder, "-o", tmp_path / "out", "--hookpoint", 1, "--limit", 2, "--prompts", 4]
    arguments += ["--max-new-tokens", 3, "--method", "diffmean", "--factor", 0.5, "--json"]
    monkeypatch.setattr(sys, "argv", ["fgsteer", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    printed = json.loads(capsys.readouterr().out)
    assert [row["method"] for row in printed["methods"]] == ["none", "diffmean"]
    assert printed["verdict"].startswith("Not comparable")
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") == printed["table"]
