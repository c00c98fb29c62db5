"""The benchmark: what it writes, that a killed run ends with the same file, and what it refuses."""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import random
import shlex
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
import fgsteer.evaluation.bench.conditions as conditions_module
from fgsteer.cli.bench_setup import choose_engine, make_judge
from fgsteer.data.contrasts import check_name
from fgsteer.data.shipped import load_bench_prompts, load_chat_prompts
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.concept_runs import begun_design, concepts_folder
from fgsteer.evaluation.bench.conditions import CONTINUE, ConceptConditions, bench_methods, default_methods
from fgsteer.evaluation.bench.distributors import RayWorkers, Torchrun
from fgsteer.evaluation.bench.generators import Generator, TransformersGenerator
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.bench.run_files import append, resume, strengths_path
from fgsteer.evaluation.judges.learning import plain_text
from tests.helpers.cli import app

PLAN = BenchPlan(
    concepts=("love", "war"),
    layers=(2,),
    ce_rises=(0.25, 0.5),
    prompts=2,
    seeds=1,
    texts=2,
    max_new_tokens=4,
    batch_rows=8,
)


class LengthJudge:
    """Judges by length, and can be told to fail at a call."""

    name = "length"

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = 0, fail_at

    def score(self, texts, concept):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return torch.tensor([min(1.0, len(text) / 100) for text in texts], dtype=torch.float64)


@pytest.fixture(scope="module")
def parts():
    model, tokenizer = fg.load_model("default")
    sae, effects = fg.load_sae("default"), fg.load_effects("default")
    layer = sae.hookpoint.layer
    return model, tokenizer, {layer: sae}, {layer: effects}


def make(parts, judge, **changes):
    layers = tuple(parts[2])
    model, tokenizer, saes, effects = parts
    return Bench(model, tokenizer, saes, effects, judge, replace(PLAN, **{"layers": layers, **changes}))


@pytest.fixture(scope="module")
def unbroken(parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "run.jsonl"
    make(parts, LengthJudge()).run(path)
    return path


def test_every_arm_is_written_for_every_prompt_and_seed(unbroken):
    run = fg.load_run(unbroken)
    assert set(run.methods) == set(default_methods())
    counts = Counter((r.concept, r.method, r.ce_rise, r.matched, r.half) for r in run.records)
    assert set(counts.values()) == {PLAN.prompts * PLAN.seeds}
    steered = len(default_methods()) - 2
    assert len(counts) == 2 * 2 * (2 + steered * (len(PLAN.ce_rises) + 1))
    halves = {half: {r.unit for r in run.records if r.half == half} for half in ("tune", "report")}
    assert not {u.prompt for u in halves["tune"]} & {u.prompt for u in halves["report"]}
    assert not {u.seed for u in halves["tune"]} & {u.seed for u in halves["report"]}


def test_a_benchmark_with_another_plan_shares_what_it_has_read(parts, tmp_path, monkeypatch):
    first = make(parts, LengthJudge(), methods=("caa", "fgaa"), concepts=("love",), ce_rises=(0.5,))
    first.concept("love").vector("fgaa", 2)
    coherence = first.fitted_coherence
    monkeypatch.setattr(conditions_module, "collect", None)  # nothing is collected again
    other = first.with_plan(replace(first.plan, settings={"fgaa": {"n_positive": 2}}))
    assert len(other.concept("love").vector("fgaa", 2).features) == 2
    assert len(first.concept("love").vector("fgaa", 2).features) > 2
    assert other.fitted_coherence is coherence
    longer = first.with_plan(replace(first.plan, max_new_tokens=5))
    assert longer.fitted_coherence is not coherence
    assert first.with_plan(longer.plan).fitted_coherence is longer.fitted_coherence, "kept for all plans"
    assert other.identity != first.identity


CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if not loop.last or not continue_final_message %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS = tuple([{"role": "user", "content": text}] for text in ("Why?", "How?", "Who said that?", "Where is it?"))


class Reads(LengthJudge):
    """Notes what it judges."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def score(self, texts, concept):
        self.texts += texts
        return super().score(texts, concept)


def test_a_chat_is_asked_and_its_replies_are_judged(parts, tmp_path):
    model, tokenizer, saes, effects = parts
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    judge, methods = Reads(), ("unsteered", "prompt", "system_prompt")
    plan = replace(PLAN, concepts=("cheerful",), methods=methods, own_prompts=QUESTIONS)
    bench = Bench(model, tokenizer, saes, effects, judge, plan)
    bench.run(tmp_path / "chat.jsonl")
    run = fg.load_run(tmp_path / "chat.jsonl")
    assert set(run.methods) == set(methods)
    assert {record.text for record in run.records} <= set(judge.texts), "the prompts are no part of what is judged"
    assert run.header["plan"]["prompts"] == [list(map(dict, question)) for question in QUESTIONS]
    bench.run(tmp_path / "chat.jsonl")  # goes on with the same prompts
    assert len(fg.load_run(tmp_path / "chat.jsonl").records) == len(run.records)


def test_examples_and_instructions_come_before_prompts(parts):
    model, tokenizer, saes, effects = parts

    def conditions(name):
        return ConceptConditions(model, tokenizer, fg.load_contrast(name), saes, effects, {})

    cheerful, love = conditions("cheerful"), conditions("love")
    (turns,), (first, *_) = cheerful.prompts("prompt", QUESTIONS[:1]), cheerful.contrast.pairs
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4 + ["user"]
    assert turns[:2] == [*first.prompt, {"role": "assistant", "content": first.positive}]
    assert turns[-1] == QUESTIONS[0][0]
    ((message,),) = love.prompts("prompt", QUESTIONS[:1])
    assert message["content"] == f"{love.prefix}\nWhy?"
    assert love.prefix.startswith(love.contrast.positives[0] + "\n")
    assert love.prompts("prompt", ["I think"]) == [love.prefix + "I think"]
    (asked,) = cheerful.prompts("system_prompt", QUESTIONS[:1])
    assert [turn["role"] for turn in asked] == ["system", "user"]
    assert cheerful.contrast.description in asked[0]["content"]
    (begun,) = love.prompts("system_prompt", ["I think"])
    assert begun[1:] == [{"role": "user", "content": CONTINUE}, {"role": "assistant", "content": "I think"}]
    assert "system_prompt" in bench_methods()
    assert "system_prompt" not in BenchPlan(concepts=("love",), layers=(2,)).methods


def test_trained_vectors_are_those_of_train_and_run_where_they_are_named(parts):
    model, tokenizer, saes, effects = parts
    (layer, sae), contrast = next(iter(saes.items())), fg.load_contrast("love")
    settings: dict[str, Any] = {"epochs": 1, "batch": 8}
    chosen = {"trained": settings, "trained_features": {**settings, "objective": "bipo", "features": 8}}
    love = ConceptConditions(model, tokenizer, contrast, saes, effects, chosen)
    reps, bipo = (fg.VectorTraining.recipe(name, **settings) for name in ("reps_relative", "bipo"))
    dense = fg.train(model, tokenizer, contrast, objective=reps, hookpoint=layer)
    sparse = fg.train(model, tokenizer, contrast, objective=bipo, space="sae", sae=sae, features=8)
    assert torch.equal(love.vector("trained", layer).direction, dense.direction)
    assert love.vector("trained_features", layer).features == sparse.features
    assert len(sparse.features) == 8
    assert {"trained", "trained_features"} <= set(bench_methods())
    assert not {"trained", "trained_features"} & set(default_methods())


@pytest.mark.parametrize("name", fg.shipped_contrasts(chat=True))
def test_the_shipped_sets_of_replies(name):
    contrast = fg.load_contrast(name)
    assert (len(contrast.pairs), len(contrast.held_out.pairs)) == (40, 20)
    questions = [plain_text(pair.prompt) for pair in (*contrast.pairs, *contrast.held_out.pairs)]
    asked = [prompt[0]["content"] for prompt in load_chat_prompts()]
    assert len({*questions, *asked}) == len(questions) + len(asked), "no question is asked twice"
    assert len(asked) == len(load_bench_prompts()) == 64


def test_strengths_cost_what_they_say(parts, unbroken):
    model, tokenizer, saes, effects = parts
    texts = fg.load_neutral()[0][: PLAN.texts]
    base = fg.cross_entropy(model, tokenizer, texts)
    conditions = ConceptConditions(model, tokenizer, fg.load_contrast("love"), saes, effects, {})
    (layer,) = saes
    found = {(r.method, r.ce_rise): r.coefficient for r in fg.load_run(unbroken).records if r.concept == "love"}
    for method in ("random", "caa", "ace", "fgaa_effects"):
        for rise in PLAN.ce_rises:
            steering = conditions.make(method, layer)(found[method, rise])
            got = fg.cross_entropy(model, tokenizer, texts, steering=steering) - base
            assert got == pytest.approx(rise, rel=0.03)  # calibration's tolerance is 2 %


def test_a_run_killed_anywhere_ends_with_the_same_file(parts, unbroken, tmp_path):
    expected = unbroken.read_bytes()
    rng = random.Random(0)
    path = tmp_path / "run.jsonl"
    sizes = []
    for fail_at in (2, 6, 8, 7, 5, 6):  # the first calls validate the judge
        with pytest.raises(KeyboardInterrupt):
            make(parts, LengthJudge(fail_at)).run(path)
        if path.exists():
            whole = path.read_bytes()
            path.write_bytes(whole[: rng.randrange(len(whole) // 2, len(whole) + 1)])  # what a crash left on the disk
            sizes.append(len(whole))
    seen = []
    make(parts, LengthJudge()).run(path, progress=lambda done, total: seen.append((done, total)))
    assert len(sizes) >= 4
    assert max(sizes) > 1.5 * min(sizes)  # killed with little done, and with much
    assert path.read_bytes() == expected
    assert seen[-1][0] == seen[-1][1] == len(expected.splitlines()) - 1
    make(parts, LengthJudge(fail_at=6)).run(path)  # nothing is left to judge
    assert path.read_bytes() == expected


def test_a_compressed_run_goes_on_and_ends_with_the_same_records(parts, unbroken, tmp_path):
    path, plain, whole = tmp_path / "run.jsonl.gz", tmp_path / "run.jsonl", unbroken.read_bytes()
    strengths_path(path).write_bytes(strengths_path(unbroken).read_bytes())
    plain.write_bytes(whole[:-9])  # killed in its last line
    make(parts, LengthJudge()).run(path)
    packed = path.read_bytes()
    assert gzip.decompress(packed) == whole
    assert packed[4:8] == bytes(4)  # no time of writing
    assert fg.load_run(path).records == fg.load_run(unbroken).records
    make(parts, LengthJudge(fail_at=6)).run(path)  # nothing is left to judge
    plain.write_bytes(whole)  # killed before the plain file was removed
    make(parts, LengthJudge(fail_at=6)).run(path)
    assert path.read_bytes() == packed
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.jsonl.gz", "run.strengths.json"]
    assert begun_design(path) == {"prompts": PLAN.prompts, "seeds": PLAN.seeds}
    with pytest.raises(fg.PairingError, match=r"run\.jsonl\.gz holds a run of something else: .*seeds was 1 and is 2"):
        make(parts, LengthJudge(), seeds=2).run(path)


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


def test_processes_that_share_a_run_write_the_same_file(parts, unbroken, tmp_path, monkeypatch):
    path = tmp_path / "run.jsonl"
    as_rank(monkeypatch, 1, 2)
    assert not Torchrun().run(make(parts, LengthJudge()), path)
    assert [p.name for p in sorted(concepts_folder(path).iterdir())] == ["war.jsonl", "war.strengths.json"]
    as_rank(monkeypatch, 0, 2)
    with pytest.raises(KeyboardInterrupt):
        Torchrun().run(make(parts, LengthJudge(fail_at=6)), path)
    assert not path.exists()
    assert Torchrun().run(make(parts, LengthJudge()), path)
    assert path.read_bytes() == unbroken.read_bytes()
    before = strengths_path(unbroken).read_bytes()
    assert json.loads(strengths_path(path).read_bytes()) == json.loads(before)
    make(parts, LengthJudge()).run(path)  # complete: nothing is added
    assert path.read_bytes() == unbroken.read_bytes()
    with pytest.raises(fg.PairingError, match=r"run\.jsonl holds a run of something else: .*seeds was 1 and is 2"):
        Torchrun().run(make(parts, LengthJudge(), concepts=("love",), seeds=2), path)


class Echo:
    """A generator that says what it was asked for."""

    name = "echo 1"

    def __call__(self, prompts, steering, how, number):
        return [f"{prompt} {item is not None} {how.seed} {number}" for item in steering for prompt in prompts]


def test_another_generator_generates_and_is_named(parts, unbroken, tmp_path):
    assert isinstance(Echo(), Generator)
    assert isinstance(TransformersGenerator(None, None), Generator)
    bench = make(parts, LengthJudge(), concepts=("love",))
    with pytest.warns(DeprecationWarning, match=r"writer is now called Bench\.generator"):
        bench.writer = Echo()
    bench.run(tmp_path / "run.jsonl")
    run = fg.load_run(tmp_path / "run.jsonl")
    assert run.header["plan"]["engine"] == "echo 1"
    for record in run.records:
        assert f" {record.method not in ('unsteered', 'prompt')} 0 {record.seed}" in record.text
    with pytest.raises(fg.PairingError, match=r"plan\.engine was echo 1 and is null"):
        make(parts, LengthJudge(), concepts=("love",)).run(tmp_path / "run.jsonl")
    model, tokenizer, saes, effects = parts
    with pytest.warns(DeprecationWarning, match="generator="):
        former = Bench(model, tokenizer, saes, effects, LengthJudge(), bench.plan, writer=Echo())
    assert former.identity == bench.identity


class Vowels:
    """Judges coherence by the share of vowels, and notes what it was asked."""

    name = "vowels"

    def __init__(self):
        self.asked = []

    def coherence(self, texts, prompts):
        self.asked += zip(texts, prompts, strict=True)
        return torch.tensor([sum(c in "aeiou" for c in text) / max(1, len(text)) for text in texts])


def test_another_judge_scores_coherence_and_all_else_stays(parts, unbroken, tmp_path):
    bench, vowels = make(parts, LengthJudge(), concepts=("love",)), Vowels()
    bench.coherence = vowels
    bench.run(tmp_path / "run.jsonl")
    run = fg.load_run(tmp_path / "run.jsonl")
    before = [record for record in fg.load_run(unbroken).records if record.concept == "love"]
    prompts = run.header["plan"]["prompts"]
    for record, other in zip(run.records, before, strict=True):
        assert replace(record, coherence=other.coherence) == other
        share = sum(c in "aeiou" for c in record.text) / len(record.text)
        assert record.coherence == pytest.approx(share, abs=1e-6)  # rounded to six digits
        assert (record.text, prompts[record.prompt]) in vowels.asked
    assert run.header["plan"]["coherence"] == "vowels"
    with pytest.raises(fg.PairingError, match=r"coherence was vowels and is null"):
        make(parts, LengthJudge(), concepts=("love",)).run(tmp_path / "run.jsonl")


def test_scores_out_of_range_are_refused_before_they_are_written(parts, tmp_path):
    class Loud(LengthJudge):
        def score(self, texts, concept):
            return 2 + super().score(texts, concept)

    with pytest.raises(fg.DataError, match="a number from 0 to 1, got behavior 2"):
        make(parts, Loud(), concepts=("love",)).run(tmp_path / "run.jsonl")
    assert len((tmp_path / "run.jsonl").read_bytes().splitlines()) == 1  # the header
    bench = make(parts, LengthJudge(), concepts=("love",))
    bench.generator = Echo()
    bench.generator.__class__ = type("Mute", (Echo,), {"__call__": lambda self, p, s, *_: [""] * len(p) * len(s)})
    bench.coherence = Vowels()
    with pytest.raises(fg.DataError, match="a finite number, got ce nan"):
        bench.run(tmp_path / "other.jsonl")


@pytest.mark.slow
def test_ray_spreads_concepts_over_two_workers(tmp_path):
    pytest.importorskip("ray")
    command = [sys.executable, "-m", "fgsteer", "bench", "--quick", "--judge", "keyword", "--device", "cpu", "--json"]
    for name, more in (("one", []), ("two", ["--distribute", "ray", "--workers", "2"])):
        subprocess.run([*command, *more, "--out", str(tmp_path / name)], check=True, capture_output=True)
    one, two = (fg.load_run(tmp_path / name / "bench.jsonl") for name in ("one", "two"))
    assert [r.text for r in two.records] == [r.text for r in one.records]
    assert two.records == one.records


@pytest.mark.parametrize(
    ("options", "world", "message"),
    [
        ("--generator tgi", 1, "transformers or vllm, got --generator tgi"),
        ("--distribute mpi", 1, "none, torchrun, ray, got --distribute mpi"),
        ("--distribute ray", 2, "--distribute ray under torchrun"),
        ("--distribute none", 2, "--distribute none under torchrun"),
        ("--distribute torchrun", 1, "torchrun --nproc-per-node"),
        ("--generator vllm --distribute ray", 1, "tensor_parallel_size"),
        ("--generator vllm", 2, "--generator vllm with --distribute torchrun"),
        ("--engine tgi", 1, "one of hf, vllm, ray, got --engine tgi"),
        ("--engine ray", 2, "--distribute ray under torchrun"),
    ],
)
def test_engines_that_cannot_be_are_refused(options, world, message, tmp_path, monkeypatch):
    as_rank(monkeypatch, 0, world)
    with pytest.raises(fg.DataError, match=message):
        CliRunner().invoke(app, ["bench", *options.split(), "-o", str(tmp_path)], catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "world", "chosen", "note"),
    [
        (("transformers", None, None), 1, ("transformers", "none"), ""),
        (("transformers", None, None), 2, ("transformers", "torchrun"), ""),
        (("vllm", None, None), 1, ("vllm", "none"), ""),
        (("transformers", None, "hf"), 2, ("transformers", "torchrun"), "--generator transformers"),
        (("transformers", None, "vllm"), 1, ("vllm", "none"), "--generator vllm"),
        (("transformers", None, "ray"), 1, ("transformers", "ray"), "--distribute ray"),
    ],
)
def test_engines_are_two_choices(arguments, world, chosen, note, monkeypatch, capsys):
    as_rank(monkeypatch, 0, world)
    assert choose_engine(*arguments) == chosen
    assert capsys.readouterr().err.strip().endswith(f"is now called {note}" if note else "")


def test_ray_must_be_installed(parts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(fg.DataError, match=r"fgsteer\[ray\]"):
        RayWorkers(lambda: pytest.fail("made"), 2).run(make(parts, LengthJudge()), tmp_path / "run.jsonl")


def test_a_file_of_another_plan_is_left_alone(parts, unbroken):
    before = unbroken.read_bytes()
    with pytest.raises(fg.PairingError, match=r"plan\.max_new_tokens was 4 and is 5"):
        make(parts, LengthJudge(), max_new_tokens=5).run(unbroken)
    assert unbroken.read_bytes() == before


def test_resume_keeps_whole_batches_only(tmp_path):
    header = {"fgsteer": "bench", "plan": 1, "sha256": {}, "model": "m"}
    path = tmp_path / "run.jsonl"
    assert resume(path, header, [2, 3]) == 0
    append(path, [{"row": i} for i in range(4)])
    assert resume(path, header, [2, 3]) == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == [header, {"row": 0}, {"row": 1}]
    path.write_bytes(path.read_bytes()[:7])  # killed while it was begun
    assert resume(path, header, [2, 3]) == 0
    assert json.loads(path.read_text()) == header
    for text in ("not a run\n", "a file without an end of line", "[]\n"):
        (tmp_path / "notes.txt").write_text(text)
        with pytest.raises(fg.FormatError, match="Line 1 of "):
            resume(tmp_path / "notes.txt", header, [2])
        assert (tmp_path / "notes.txt").read_text() == text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": ("fgaa", "magic")}, "magic"),
        ({"prompts": 33}, "33 prompts"),
        ({"ce_rises": (0.5, 0.25)}, "rising"),
        ({"ce_rises": ()}, "rising"),
        ({"matched": 0.3}, "matched 0.3"),
        ({"concepts": ()}, "no concepts"),
        ({"prompts": 1}, "Intervals are over prompts"),
        ({"layers": ()}, "no layer for ace, caa"),
        ({"methods": ("caa", "fgaa"), "layers": {"caa": (1,)}}, "no layer for fgaa"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(changes, told):
    with pytest.raises(fg.DataError, match=told):
        replace(PLAN, **changes)


def test_methods_have_layers_of_their_own(parts, tmp_path):
    layers = {"caa": (1, 2), "fgaa": tuple(parts[2])}
    plan = {"methods": ("unsteered", "caa", "fgaa"), "layers": layers, "ce_rises": (0.5,), "concepts": ("love",)}
    make(parts, LengthJudge(), **plan).run(tmp_path / "run.jsonl")
    run = fg.load_run(tmp_path / "run.jsonl")
    found = {(r.method, r.layer) for r in run.records}
    assert found == {("unsteered", None), ("caa", 1), ("caa", 2), *(("fgaa", layer) for layer in parts[2])}
    assert run.header["plan"]["layers"] == {method: list(at) for method, at in layers.items()}


def own_files(folder):
    """A contrast set, prompts and neutral texts of one's own."""
    love = fg.load_contrast("love")
    sides = {side: [text for _, text in love.side(side == "positive")][:12] for side in ("positive", "negative")}
    (folder / "my.json").write_text(json.dumps({"name": "my love", "description": "tenderness", **sides}))
    rows = [{"positive": p, "negative": n} for p, n in zip(sides["positive"], sides["negative"], strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("The captain said\nAt dawn\nMy uncle never\nLast winter\n")
    (folder / "neutral.txt").write_text("The report was filed on Monday.\nHe took the bus to work.\n")


def test_the_command_writes_records_report_and_pictures(tmp_path, monkeypatch):
    """Of contrast sets, prompts and texts of one's own, judged by keywords as without sentence-transformers."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "sentence_transformers" else found(n))
    monkeypatch.chdir(tmp_path)
    own_files(tmp_path)
    options = (
        "--method unsteered --method caa --method fgaa --ce-rise 0.5 --seeds 1 --max-new-tokens 4 --out out --json"
    )
    own = "--concept my.json --concept ./rows.jsonl --prompts-from prompts.txt --neutral neutral.txt"
    told = CliRunner().invoke(app, ["bench", *own.split(), *options.split()])
    assert told.exit_code == 0, told.output
    assert "judged by keywords" in told.stderr
    assert "my love has no held_out part" in told.stderr
    run = fg.load_run(tmp_path / "out" / "bench.jsonl")
    assert json.loads(told.stdout)["records"] == len(run.records) == 2 * 2 * 3 * 2
    assert run.concepts == ["my love", "rows"]
    plan = run.header["plan"]
    assert plan["prompts"] == ["The captain said", "At dawn", "My uncle never", "Last winter"]
    assert plan["texts"] == 2
    assert plan["judge"]["auc"]["my love"] > 0.5
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"bench.jsonl", "report.html", "table.md", "methods.png", "methods.svg"} <= written
    assert 'class="seen"' in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    refused = CliRunner().invoke(app, ["bench", "--out", "out", "--judge", "gpt"])
    assert isinstance(refused.exception, fg.DataError)
    assert "--judge-url" in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--concept my.json --concept copy/my.json", "two contrast sets named 'my love'"),
        ("--concept love --concept copy/Love.jsonl", "two contrast sets named 'Love'"),
        ("--concept path.json", r"named '\.\./love'"),
        ("--concept nowhere.json", "no contrast set or file 'nowhere.json'"),
        ("--concept few.json --judge keyword", "'few' with 3 texts on a side and no held_out part"),
        ("--prompts-from nowhere.txt", "Cannot read nowhere.txt"),
        ("--neutral my.json", "field 'text'"),
        ("--prompts-from two.txt", "two.txt with 2 prompts"),
        ("--prompts-from none.txt", "none.txt holds no documents"),
        ("--neutral none.txt", "none.txt holds no documents"),
        ("--prompts-from twice.txt", "'At dawn' twice"),
    ],
)
def test_own_files_that_cannot_be_used_are_refused_before_a_model_is_loaded(options, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_files(tmp_path)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "my.json").write_bytes((tmp_path / "my.json").read_bytes())
    (tmp_path / "copy" / "Love.jsonl").write_bytes((tmp_path / "rows.jsonl").read_bytes())
    sides = {"positive": ["a", "b", "c"], "negative": ["d", "e", "f"]}
    (tmp_path / "path.json").write_text(json.dumps({"name": "../love", **sides}))
    (tmp_path / "few.json").write_text(json.dumps(sides))
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "two.txt").write_text("At dawn\nLast winter\n")
    (tmp_path / "twice.txt").write_text("At dawn\nLast winter\nAt dawn\nNow\n")
    monkeypatch.setattr(fg, "load_model", lambda *_, **__: 1 / 0)
    refused = CliRunner().invoke(app, ["bench", *options.split(), "--out", "out"])
    assert isinstance(refused.exception, fg.DataError), refused.exception
    with pytest.raises(fg.DataError, match=told):
        raise refused.exception
    assert not (tmp_path / "out").exists()


def identity_of(made):
    _, judge = made
    return judge.identity


def test_a_chat_model_judges_by_what_a_file_says_of_its_behavior(tmp_path):
    own_files(tmp_path)
    sets = [fg.load_contrast(tmp_path / "my.json"), fg.load_contrast("war")]
    judge: Any
    kept, judge = make_judge(sets, "gpt", "http://localhost:1/v1", tmp_path)
    assert kept == sets  # nothing is held out for a judge that learns nothing
    assert "tenderness" in judge._behavior("my love")
    assert "war" in judge._behavior("war")
    assert judge.identity == identity_of(make_judge(sets, "gpt", "http://localhost:1/v1", tmp_path))
    assert judge.identity != identity_of(make_judge(sets, "gpt", "http://localhost:2/v1", tmp_path))
    assert judge.identity != identity_of(make_judge(sets[1:], "gpt", "http://localhost:1/v1", tmp_path))
    assert "localhost" not in str(judge.identity)


def test_every_third_text_is_held_out():
    pairs = [fg.ContrastPair(f"a{n}", f"b{n}", f"p{n}") for n in range(7)]
    parted = fg.ContrastSet("x", pairs, ("u", "v", "w"), ("z",), description="d").hold_out()
    assert [p.positive for p in parted.held_out.pairs] == ["a2", "a5"]
    assert [p.positive for p in parted.pairs] == ["a0", "a1", "a3", "a4", "a6"]
    assert (parted.positives, parted.held_out.positives, parted.negatives) == (("u", "v"), ("w",), ("z",))
    assert (parted.name, parted.description) == ("x", "d")
    assert parted.hold_out() is parted
    with pytest.raises(fg.DataError, match="at least 6 texts on either side"):
        fg.ContrastSet("x", pairs[:5]).hold_out()


@pytest.mark.parametrize("name", ["love", "my love", "v1.2-b_c+d", "Дом", "a" * 100])
def test_names_that_files_can_have(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../a", "/a", ".a", "-a", "a\\b", "a\n", "a\0", "a:", "a ", "a.", "x.running",
             "a" * 101, "\u202ea", "a\u200b", "ж" * 60]
)  # fmt: skip
def test_names_that_files_cannot_have(name):
    with pytest.raises(fg.DataError, match="a contrast set named"):
        check_name(name)
    with pytest.raises(fg.DataError, match="a contrast set named"):
        replace(PLAN, concepts=(name,))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"own_prompts": ("a", "b", "c", "c")}, "own_prompts with 'c' twice"),
        ({"own_prompts": ("a", "b", "c", " ")}, "own_prompts with an entry that is empty or is not a text"),
        ({"own_prompts": ("a", "b", "c")}, "2 prompts a half"),
        ({"own_prompts": "abcd"}, "own_prompts with an entry"),
        ({"own_prompts": (*QUESTIONS[:3], [])}, r"own_prompts\[3\]"),
        ({"own_prompts": (*QUESTIONS[:3], QUESTIONS[0])}, "twice"),
        ({"neutral": ("a", 3)}, "neutral with an entry"),
        ({"neutral": ("a", "a")}, "neutral with 'a' twice"),
        ({"concepts": ("love", "Love")}, "each name once, in upper or lower case"),
    ],
)
def test_own_texts_of_a_plan_are_checked(changes, told):
    with pytest.raises(fg.DataError, match=told):
        replace(PLAN, **changes)


def test_a_concept_that_is_nowhere_is_refused_with_what_to_do(parts, tmp_path):
    own_files(tmp_path)
    bench = make(parts, LengthJudge(), concepts=("my.json",))
    with pytest.raises(fg.DataError, match=r"no contrast set 'my\.json'.*contrasts="):
        bench.run(tmp_path / "run.jsonl")
    assert not (tmp_path / "run.jsonl").exists()
    model, tokenizer, saes, effects = parts
    twice = [fg.load_contrast(tmp_path / "my.json")] * 2
    with pytest.raises(fg.DataError, match="each name once"):
        Bench(model, tokenizer, saes, effects, LengthJudge(), PLAN, contrasts=twice)


def test_examples_in_a_prompt_are_text_where_a_set_has_messages(llama, tokenizer):
    chats = [
        fg.ContrastPair([{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}], "he said")
    ]
    assert ConceptConditions(llama, tokenizer, fg.ContrastSet("x", chats), {}, {}, {}).prefix == "yes\n"


@pytest.mark.slow
def test_the_command_killed_ten_times_ends_with_the_same_file(tmp_path):
    """On the embedded default: kill -9 at random moments, ten times, then let it end."""
    options = shlex.split(
        "--concept love --concept sea --concept war --method unsteered --method caa --method fgaa --judge keyword "
        "--ce-rise 0.25 --ce-rise 0.5 --matched 0.5 --prompts 4 --seeds 4 --max-new-tokens 8 --device cpu --json"
    )
    lottery = random.Random(0)

    def start(folder):
        command = [
            sys.executable,
            "-c",
            "from fgsteer.cli import main; main()",
            "bench",
            "--out",
            str(folder),
            *options,
        ]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    def sizes():
        return {path.name: path.stat().st_size for path in (tmp_path / "broken").glob("*.json*")}

    assert start(tmp_path / "whole").wait() == 0
    kills = set()
    for _ in range(10):
        seen, run = sizes(), start(tmp_path / "broken")
        while sizes() == seen and run.poll() is None:  # into what it writes first, or beyond
            time.sleep(0.005)
        time.sleep(lottery.random() * 0.2)
        assert run.poll() is None
        run.kill()
        run.wait()
        kills.add(tuple(sorted(sizes().items())))
    assert len(kills) == 10
    assert start(tmp_path / "broken").wait() == 0
    whole = (tmp_path / "whole" / "bench.jsonl").read_bytes().split(b"\n")
    broken = (tmp_path / "broken" / "bench.jsonl").read_bytes().split(b"\n")
    assert broken[1:] == whole[1:]  # the first line holds the command, that names its folder
    assert json.loads(broken[0])["plan"] == json.loads(whole[0])["plan"]


def test_methods_without_their_sae_are_refused_before_anything_is_written(parts, tmp_path):
    model, tokenizer, saes, _ = parts
    for given, told in (({}, "needs an SAE"), (saes, "needs measured effects")):
        bench = Bench(model, tokenizer, given, {}, LengthJudge(), replace(PLAN, layers=tuple(saes)))
        with pytest.raises(fg.DataError, match=told):
            bench.run(tmp_path / "run.jsonl")
        assert not (tmp_path / "run.jsonl").exists()


@pytest.mark.parametrize("paired", [False, True])
def test_pca_equals_the_top_eigenvector(llama, tokenizer, paired):
    positives = ["the bride wore a ring", "a king was good", "the sea is old and sad", "tea and bread"]
    negatives = ["a cat ran", "the man said no", "a ship", "is the dog happy ?"]
    data = [fg.ContrastPair(p, n) for p, n in zip(positives, negatives, strict=True)]
    contrast: Any = data
    if not paired:
        contrast = fg.ContrastSet("unpaired", positives=tuple(positives), negatives=tuple(negatives[:3]))
    stats = fg.collect(llama, tokenizer, contrast, hookpoints=fg.Hookpoint(1), keep_pooled=True)
    kept = stats.pooled[fg.Hookpoint(1)]
    up, down = kept.positive.double().numpy(), kept.negative.double().numpy()
    rows = up - down if paired else np.concatenate([up, down]) - (up.mean(0) + down.mean(0)) / 2
    values, vectors = np.linalg.eigh(rows.T @ rows)
    top = vectors[:, values.argmax()]
    top *= np.sign(top @ (up.mean(0) - down.mean(0)))
    assert np.allclose(fg.pca(stats).direction.numpy(), top, atol=1e-5)  # float32 of a unit vector
    with pytest.raises(fg.PairingError, match="keep_pooled"):
        fg.pca(fg.collect(llama, tokenizer, contrast, hookpoints=fg.Hookpoint(1)))
