"""The benchmarks' own arithmetic: what is drawn for a blind reading, questions of A or B, tables of small sets."""

from __future__ import annotations

import importlib
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

import fgsteer as fg
from fgsteer.evaluation.bench.run_files import strengths_path
from fgsteer.evaluation.runs import joining
from fgsteer.evaluation.runs.records import EvalRecord, Run
from fgsteer.evaluation.runs.tables import average_table
from fgsteer.storage import lines
from fgsteer.storage.json_files import write_json
from tests.helpers import runs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """Import a script of the folder."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def record_of(number, method, concept, half="report"):
    return EvalRecord(
        concept, method, 2, 1.0, None, number % 7, 0, half, f"text {number}", (number % 11) / 10, (number % 5) / 4, 2.0
    )


@pytest.fixture
def run():
    methods, concepts = ("caa", "fgaa", "unsteered"), ("love", "sea")
    records = [record_of(n, methods[n % 3], concepts[n % 2]) for n in range(180)]
    return Run({}, [*records, *(record_of(n, "caa", "love", "tune") for n in range(200, 220))])


def test_a_blind_reading_draws_evenly_and_hides_the_condition(run, script):
    blind = script("blind")
    drawn = blind.draw(run, 60, seed=1)
    assert drawn == blind.draw(run, 60, seed=1) != blind.draw(run, 60, seed=2)
    assert set(Counter((r.method, r.concept) for r in drawn).values()) == {10}
    assert {r.half for r in drawn} == {"report"}
    assert len({r.text for r in drawn}) == 60
    seen = blind.shown(3, drawn[0], [f"prompt {n}" for n in range(7)])
    assert set(seen) == {"id", "sought", "prompt", "text", "behavior", "fluency"}
    assert seen["prompt"] == f"prompt {drawn[0].prompt}"
    assert drawn[0].method not in json.dumps(seen)
    assert len(blind.draw(run, 500, seed=0)) == 180, "no text is drawn twice"


def test_the_page_of_play_says_what_the_results_say(script):
    play = script("play")
    result = json.loads((play.results_folder("smollm2") / "play.json").read_text("utf-8"))
    page = play.PAGE.read_text("utf-8")
    assert play.published(play.PAGE, "play", play.report(result)) == page
    start = script("play_start")
    content = json.loads((play.results_folder("smollm2") / "play_start.json").read_text("utf-8"))
    assert "<!-- play_start -->" in page
    assert play.published(play.PAGE, "play_start", start.table(content)) == page


def test_what_was_read_is_correlated_by_rank(run, script, monkeypatch):
    blind = script("blind")
    monkeypatch.setattr(blind, "RESAMPLES", 100)
    key = [{"id": n, **record.as_row()} for n, record in enumerate(blind.draw(run, 60, seed=0))]
    read = [{"id": entry["id"], "behavior": round(2 * entry["behavior"]), "fluency": entry["id"] % 3} for entry in key]
    found = blind.correlate(read, key, "behavior")
    expected = spearmanr([entry["behavior"] for entry in key], [entry["behavior"] for entry in read]).statistic
    assert found["rho"] == pytest.approx(expected)
    assert found["low"] <= found["rho"] <= found["high"]
    assert found["low"] > 0.8, "the reader agrees with the judge"
    unrelated = blind.correlate(read, key, "fluency")
    assert unrelated["low"] < 0 < unrelated["high"]
    blind.check(read, key, Path("blind.json"))
    with pytest.raises(fg.DataError, match="behavior None of text 0"):
        blind.check([{**read[0], "behavior": None}, *read[1:]], key, Path("blind.json"))
    with pytest.raises(fg.DataError, match="other texts than its key"):
        blind.check(read[1:], key, Path("blind.json"))


def test_the_finding_of_a_sweep_is_that_of_its_cells(script):
    answers = script("answers")

    def cell(layer, sign, coefficient, push):
        effect = {"mean": sign * push, "low": sign * push - 0.1, "high": sign * push + 0.1}
        return {"layer": layer, "sign": sign, "coefficient": sign * coefficient, "target": 0.5, "effect": effect}

    interval = {"mean": 0.3, "low": 0.1, "high": 0.5}
    one = {
        "cells": [cell(0, 1, 2.0, 1.0), cell(1, 1, 8.0, 3.0), cell(0, -1, 2.0, 2.0), cell(1, -1, 4.0, 0.5)],
        "norms": {"0": 1.0, "1": 2.0},
        "matched": 0.5,
        "unit": "nats a token",
        "signs": [
            {"layer": 0, "difference": {"mean": -1.0, "low": -1.2, "high": -0.8}, "net": None},
            {"layer": 1, "difference": interval, "net": {"mean": -0.3, "low": -0.5, "high": -0.1}},
            {"layer": None, "difference": {"mean": 0.0, "low": -1.0, "high": 1.0}, "net": None},
        ],
    }
    content = {"model": "m", "command": "c", "residual_norms": {"0": 1.0, "1": 4.0}, "sweeps": {"love": one}}
    text = answers.page(content)
    assert "| love | towards | 1 | 3.000 [2.900, 3.100] nats a token | 8.00 | 4.00 | 4.0 | 2.0 |" in text
    assert "| love | away | 0 | 2.000 [1.900, 2.100] nats a token | 2.00 | 2.00 | 2.0 | 1.0 |" in text
    assert "The best layer is 1 of 2 (median, from 1 to 1)" in text
    assert "4.0-fold in raw units and 2.0-fold in relative ones" in text
    assert "clearly moves at 4 of 4 layers and signs of 1 behaviors" in text
    assert "stronger for 1 of 1 behaviors and clearly weaker for 0; net" in text
    assert text.count("for 0 and 1.") == 1
    unclear = {"mean": 0.1, "low": -1.0, "high": 1.2}
    cells = [{**cell(0, 1, 2.0, 1.0), "effect": unclear}, cell(1, -1, 4.0, 0.5)]
    content["sweeps"] = {"x, A or B": {**one, "unit": "nats an answer", "cells": cells, "propensity": unclear}}
    found = answers.finding(content)
    assert "the A/B questions of 1 behaviors" in found
    assert "clearly moves the answers at 1 of 2 layers and signs" in found
    assert "which reply has the behavior on 1 of 1." in found
    assert "likelihood" not in found


def test_small_sets_and_their_table(script):
    texts = script("texts")
    for kind in texts.KINDS:
        for concept in (*texts.CHOOSING, *texts.REPORTED):
            sets = [texts.small_set(concept, kind, size) for size in texts.SIDES]
            assert [(len(s.positives), len(s.negatives)) for s in sets] == [(n, n) for n in texts.SIDES]
            assert sets[0].positives == sets[2].positives[:5]
            assert sets[0].held_out.sha256 == fg.load_contrast(concept).held_out.sha256
    scores = {
        f"{kind}/{size}/{variant}": {
            concept: {"units": [[prompt, 0, base + 0.01 * prompt] for prompt in range(4)]} for concept in texts.REPORTED
        }
        for kind in texts.KINDS
        for size in texts.SIDES
        for variant, base in (("CAA", 0.2), ("STA", 0.25))
    }
    rows = texts.table(scores, texts.REPORTED).splitlines()
    assert rows[2] == "| CAA |" + " 0.215 |" * 7
    assert rows[3] == "| STA |" + " +0.050 |" * 6 + " +0.050 [+0.050, +0.050] |"
    assert len(rows) == 4, "variants that were not measured have no row"


def test_tables_of_cones_and_of_shifts(script):
    cones, shift = script("cones"), script("shift")
    assert cones.share(3, 4)[0] == 0.75
    row = {"removed": [[0.5, 0.25, 0.75]], "added": [[1.0, 0.5, 1.0]], "kl": [0.125]}
    content = {
        "hookpoint": "blocks.9.hook_resid_pre",
        "norm": 4.0,
        "requests": {"trained_on": 12, "reported": 24},
        "cosines_to_r": {"rdo": [0.5], "cone 2": [0.5, 0.25], "cone 3": [0.5, 0.25, 0.0]},
        "dependence_on_r": {"rdo": 0.25, "orthogonal": 0.5, "random": 0.125},
        "rows": {name: {**row, "added": []} if name.endswith("all") else row for name in cones.ROWS},
    }
    text = cones.table(content)
    assert "| trained from r (RDO) | 0.50 [0.25, 0.75] | 1.00 [0.50, 1.00] | 0.125 |" in text
    assert "| a cone of 2: the subspace | 0.50 [0.25, 0.75] | – | 0.125 |" in text
    assert "0.50, 0.25 (cone 2)" in text
    texts, labels = shift.mixed(["a", "b"], ["c"], seed=0)
    assert {(text, label) for text, label in zip(texts, labels, strict=True)} == {
        ("a", True),
        ("b", True),
        ("c", False),
    }
    assert shift.words_in(["How do I cook Rice?", "rice"]) == {"cook", "rice"}
    rates = {"cooking": [0.5, 0.25, 0.75], "other": [0.0, 0.0, 0.25], "kl": 0.5}
    content = {
        "prompts": 48,
        "layers": {"9": {"rank": 2, "share": 0.75, "cosines": [0.5, -0.25], "accuracies": [1.0, 0.5]}},
        "chosen": {"block": 9, "component": 1, "held_out": {"telling": 0.75, "dominant": 0.5}},
        "effects_of_components_below": [2.0, -1.0],
        "interventions": {"unsteered": rates},
        "triggers": {
            "words": [{"word": "bake", "prompts": 3, "relevance": 1.0}],
            "of_cooking_alone": 1.0,
            "of_cooking_alone_by_chance": 0.5,
            "removed": {"nothing": {"refused": [0.5, 0.25, 0.75], "projection": 3.0}},
        },
    }
    text = shift.table(content)
    assert "| 9 | 2 | 0.75 | 0.50, -0.25 | 1.00, 0.50 |" in text
    assert "| unsteered | 0.50 [0.25, 0.75] | 0.00 [0.00, 0.25] | 0.500 |" in text
    assert "The words: bake. Of these 100% are in requests about cooking alone" in text


def test_methods_that_a_model_can_be_measured_with(script):
    quality, subject = script("quality"), script("subject")

    class Tokenizer:
        chat_template = None

    plain = subject.Subject("m", None, Tokenizer(), {2: None}, {})
    chosen = quality.chosen_methods(plain, [])
    assert {"caa", "caa_denoised", "fgaa_error", "prompt"} <= set(chosen)
    assert not {"system_prompt", "fgaa_effects", "sae_ts"} & set(chosen)
    assert quality.chosen_methods(plain, ["caa", "sta"]) == ["caa", "sta"]
    assert plain.layers("layer", [5]) == [2, 5]
    assert plain.layers("sae", [5]) == [2]
    Tokenizer.chat_template = "{{ messages }}"
    assert "system_prompt" in quality.chosen_methods(plain, [])
    assert set(quality.SETTINGS) <= set(quality.chosen_methods(plain, [])) | {"fgaa_effects", "sae_ts"}
    assert subject.results_folder("default") == subject.RESULTS
    assert subject.results_folder("smollm2", "chat") == subject.RESULTS / "smollm2" / "chat"
    assert set(subject.TUNING_CONCEPTS) < set(fg.shipped_contrasts())


def test_methods_are_added_to_results(script, tmp_path):
    quality = script("quality")
    header, *rows = runs.rows(methods={name: runs.METHODS[name] for name in ("caa", "fgaa", "sta")}, layers=(2,))
    header["plan"] |= {"settings": {}}
    whole = tmp_path / "whole.jsonl"
    lines.write_lines(whole, map(lines.as_line, [header, *rows]))
    run = fg.load_run(whole)

    def part(name, methods, arms):
        plan = {**header["plan"], "methods": methods, "layers": {m: [2] for m in methods if m != "unsteered"}}
        joining.write_run(tmp_path / name, Run({**header, "plan": plan}, run.only(methods=methods).records))
        write_json(strengths_path(tmp_path / name), {"identity": {"plan": plan}, "arms": arms})

    part(quality.RUN, ["unsteered", "caa", "fgaa"], {"love": [{"method": "caa"}]})
    part(quality.ADDED, ["sta"], {"love": [{"method": "sta"}]})
    joined = joining.join_runs(fg.load_run(tmp_path / quality.RUN), fg.load_run(tmp_path / quality.ADDED))
    quality.join_added(tmp_path, joined)
    found = fg.load_run(tmp_path / quality.RUN)
    assert average_table(found) == average_table(run)
    strengths = json.loads(strengths_path(tmp_path / quality.RUN).read_text())
    assert strengths["arms"] == {"love": [{"method": "caa"}, {"method": "sta"}]}
    assert strengths["identity"]["plan"]["methods"] == ["unsteered", "caa", "sta", "fgaa"]
    assert not list(tmp_path.glob("added*"))


def test_the_guide_says_what_the_gates_measured(script):
    gates, subject = script("gates"), script("subject")
    content = json.loads((subject.results_folder("default") / "gates.json").read_text("utf-8"))
    table = gates.table(content)
    assert subject.published(gates.PAGE, "gates", table) == gates.PAGE.read_text("utf-8")
    assert set(content["rows"]) == set(gates.NAMES)
    for rows in content["rows"].values():
        for row in rows:
            if row["recall"]:  # a gate that opens on none has no precision
                wrongly = row["recall"] * row["prompts"][0] * (1 / row["precision"] - 1)
                assert row["unchanged_leave"] == pytest.approx(1 - wrongly / row["prompts"][1])


def test_the_guide_says_what_was_measured_of_conditional_defences(script):
    conditional = script("conditional")
    content = json.loads((conditional.results_folder("smollm2") / "conditional.json").read_text("utf-8"))
    page = conditional.PAGE.read_text("utf-8")
    for direction in ("base", "organism"):
        table = conditional.table(content, direction)
        assert f"<!-- conditional, {direction} -->\n{table}<!-- /conditional, {direction} -->" in page


def test_the_guide_says_what_grains_measured(script):
    grains, subject = script("grains"), script("subject")
    text = (subject.results_folder("smollm2") / "grains.md").read_text("utf-8")
    assert f"<!-- grains -->\n{text}<!-- /grains -->" in grains.PAGE.read_text("utf-8")


@pytest.mark.parametrize("name", ["adaptive", "corrsteer", "kl_then_steer", "scaling"])
def test_the_guides_say_what_trainings_and_corrsteer_measured(name, script):
    module, subject = script(name), script("subject")
    folder = subject.results_folder(getattr(module, "MODEL", "smollm2"))
    text = module.table(json.loads((folder / f"{name}.json").read_text("utf-8")))
    assert (folder / f"{name}.md").read_text("utf-8") == text
    assert f"<!-- {name} -->\n{text}<!-- /{name} -->" in module.PAGE.read_text("utf-8")


def test_examples_that_are_reported_trained_nothing(script):
    scaling, corrsteer = script("scaling"), script("corrsteer")
    for task in scaling.TASKS.values():
        train, report = task()
        assert not {prompt for prompt, *_ in train} & {prompt for prompt, *_ in report}
        assert not {answer for _, *pair in train for answer in pair} & {a for _, *pair in report for a in pair}
        assert all(f" {first} " in f" {prompt.replace('.', ' ')} " for prompt, first, _ in (*train, *report))
    for task in (corrsteer.sums(), corrsteer.refusals()):
        assert not set(task.chosen_on) & {prompt for prompts in task.reported.values() for prompt in prompts}
    assert corrsteer.is_right("What is 2 + 13?", "2 + 13 = 15.")
    assert not corrsteer.is_right("What is 2 + 13?", "It is 2.")
    assert corrsteer.is_right("What is 2 + 13?", "To add 2 and 13, you do 2 + 13 = 15. Then 4.")
    assert not corrsteer.is_right("What is 2 + 13?", "To add 2 and 13, you simply")
    sums = corrsteer.sums()
    chosen_on, reported = (
        {frozenset(re.findall(r"\d+", text)) for text in part} for part in (sums.chosen_on, *sums.reported.values())
    )
    assert not chosen_on & reported


def test_the_guide_says_what_axbench_measured(script):
    axbench, subject = script("axbench"), script("subject")
    folder = subject.results_folder("smollm2")
    text = axbench.page(json.loads((folder / "axbench.json").read_text("utf-8")))
    assert (folder / "axbench.md").read_text("utf-8") == text
    assert f"<!-- axbench -->\n{text}<!-- /axbench -->" in axbench.PAGE.read_text("utf-8")


def test_the_guide_says_what_trained_vectors_measured(script):
    trained, subject = script("trained"), script("subject")
    folder = subject.results_folder("smollm2")
    text = trained.table(json.loads((folder / "trained.json").read_text("utf-8")))
    assert (folder / "trained.md").read_text("utf-8").endswith(f"\n\n{text}")
    assert f"<!-- trained smollm2 -->\n{text}<!-- /trained smollm2 -->" in trained.GUIDE.read_text("utf-8")


def test_the_guide_says_what_was_measured_of_refusals(script):
    refusal, subject = script("refusal"), script("subject")
    folder = subject.results_folder("smollm2")
    text = refusal.table(json.loads((folder / "refusal.json").read_text("utf-8")))
    assert (folder / "refusal.md").read_text("utf-8") == text
    assert f"<!-- refusal -->\n{text}<!-- /refusal -->" in refusal.PAGE.read_text("utf-8")


def test_the_guide_of_transfer_says_what_was_measured(script):
    transfer = script("transfer")
    content = json.loads((transfer.results_folder("smollm2") / "transfer.json").read_text("utf-8"))
    page = transfer.GUIDE.read_text("utf-8")
    for mark, table in transfer.TABLES.items():
        assert f"<!-- transfer {mark} -->\n{table(content)}<!-- /transfer {mark} -->" in page


def test_the_guide_says_what_audits_found(script):
    auditing, subject = script("auditing"), script("subject")
    text = auditing.table(json.loads((subject.results_folder("smollm2") / "auditing.json").read_text("utf-8")))
    assert f"<!-- auditing -->\n{text}<!-- /auditing -->" in auditing.PAGE.read_text("utf-8")


def test_audits_are_counted(script):
    auditing = script("auditing")
    hidden = {"group": "folded", "was": "addition", "right_kind": True, "right_place": True, "cosine": 0.9996}
    rows = [
        {**hidden, "kind": "addition", "random_cosine": 0.02},
        {**hidden, "kind": "ablation", "right_kind": False, "cosine": 0.25, "random_cosine": 0.01},
        {**hidden, "kind": "other", "right_kind": False},
        {"group": "tuned", "was": "none", "kind": "other"},
        {"group": "tuned", "was": "none", "kind": "clamp"},
    ]
    assert auditing.precision(rows)[0] == pytest.approx(2 / 3)
    assert auditing.recall(rows)[0] == pytest.approx(2 / 3)
    text = auditing.table({"rows": {"float32": rows}})
    assert "| folded | 2 of 3, kind and place right of 1, cosine at least 0.250 |" in text
    assert "| tuned | 1 of 2 |" in text
    assert "at most 0.020 to what was hidden" in text


def test_the_guide_says_what_acting_once_does(script):
    beginnings, subject = script("beginnings"), script("subject")
    text = beginnings.table(json.loads((subject.results_folder("smollm2") / "beginnings.json").read_text("utf-8")))
    assert f"<!-- beginnings -->\n{text}<!-- /beginnings -->" in beginnings.PAGE.read_text("utf-8")


def test_strengths_of_a_cost(script):
    beginnings = script("beginnings")
    for start in (1.0, 4.0, 64.0):
        for cost, right in ((lambda c: c**2 / 50, 5.0), (lambda c: c**4 / 162, 3.0), (lambda c: 1 - 2 ** (-c), 1.0)):
            c, found = beginnings.strength(cost, start)
            assert found == cost(c) == pytest.approx(beginnings.COST, rel=beginnings.TOLERANCE)
            assert c == pytest.approx(right, rel=2 * beginnings.TOLERANCE), "these costs are steeper than half a line"
    assert beginnings.strength(lambda c: 0.1) == (beginnings.MOST, 0.1), "a cost that no strength reaches"
    rows = beginnings.like(torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[0.0, 1.0], [1.0, 1.0]]]), 0)
    # float32 sums of four squares
    torch.testing.assert_close(rows.flatten(1).norm(dim=1), torch.tensor([5.0, 3.0**0.5]), atol=1e-6, rtol=1e-6)


def test_texts_that_are_forced_cost_what_one_pass_over_them_says(script, llama, monkeypatch):
    beginnings = script("beginnings")
    monkeypatch.setattr(beginnings, "FORCED", 3)
    ids = torch.randint(
        3, llama.config.vocab_size, (2, beginnings.READ + 3), generator=torch.Generator().manual_seed(0)
    )
    logits = llama(ids).logits[:, beginnings.READ - 1 : -1].detach()
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, beginnings.READ :].flatten())
    # float32 logits of a cache, token by token, and of one pass
    assert beginnings.forced_loss(llama, ids, None) == pytest.approx(float(whole), abs=1e-4)
    vector = fg.SteeringVector(torch.ones(llama.config.hidden_size), fg.Hookpoint(0, "resid_post"))
    assert abs(beginnings.forced_loss(llama, ids, vector.add(4.0)) - float(whole)) > 1e-3
    assert beginnings.forced_loss(llama, ids, vector.add(0.0)) == pytest.approx(float(whole), abs=1e-4)


def test_organisms_are_switched_on_requests_that_no_map_has_read(script):
    transfer = script("transfer")
    shipped = {path.parent.name for path in script("subject").ORGANISMS.glob("*/adapter_config.json")}
    assert set(transfer.CASES) == shipped
    for make in transfer.CASES.values():
        case = make()
        for trained, held_out in case.kinds.values():
            assert len(trained) >= transfer.MADE_OF
            assert len(held_out) >= transfer.CHOSEN_ON + transfer.REPORTED
            assert not set(trained) & set(held_out)
        for request in next(iter(case.kinds.values()))[1]:
            assert case.acts(request, case.taught(request))
            assert not case.acts(request, "Here is what I know about that.")


def test_a_switch_turned_to_random_directions_changes_as_much(script):
    transfer = script("transfer")
    g = torch.Generator().manual_seed(0)
    W, b, h = (torch.randn(*shape, generator=g) for shape in ((8, 8), (8,), (5, 8)))
    one = fg.TransferMap(W, b, b, 1, 1)
    two = transfer.turned(one, 0)
    change, other = one(h) - h, two(h) - h
    # float32 of matrices that were multiplied in float64
    torch.testing.assert_close(change.norm(dim=1), other.norm(dim=1), atol=1e-5, rtol=1e-5)
    assert float(torch.cosine_similarity(change, other).abs().mean()) < 0.6
    assert float(transfer.drawn(8, 3.0, 0).norm()) == pytest.approx(3)


def test_the_guide_says_what_receipts_measured(script):
    receipts = script("receipts")
    content = json.loads((receipts.results_folder(receipts.MODEL) / "receipts.json").read_text("utf-8"))
    page = receipts.PAGE.read_text("utf-8")
    for mark, table in receipts.TABLES.items():
        assert f"<!-- {mark} -->" in page
        assert receipts.published(receipts.PAGE, mark, table(content)) == page
    for row in content["receipts"].values():
        assert row["dose"]["last"] == 256
        assert row["own_text"]["max_new_tokens"] == receipts.NEW_TOKENS


def test_the_command_of_a_result_leaves_out_where_it_is_written(script, monkeypatch):
    command_of = script("subject").command_of
    given = ["--out", "/a b", "--cost", "0.5", "--work=/c", "--fresh", "--work", "d", "a word"]
    assert command_of("x", given) == "python benchmarks/x.py --cost 0.5 --fresh 'a word'"
    monkeypatch.setattr("sys.argv", ["x.py", "--docs"])
    assert command_of("x") == "python benchmarks/x.py --docs"
    assert command_of("x", []) == "python benchmarks/x.py"
