"""The speed benchmark: its sections run, contenders that do the same work agree, and it says so where they do not."""

import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("speed")


@pytest.fixture
def clock(speed):
    return importlib.import_module("timing.clock")


# contenders that need no peer, and the one that the others are measured by
CONTENDERS = {
    "collect": ["forward passes to the layer", "collect, last token", "collect, all tokens"],
    "encode": ["x @ W_enc", "encode", "sae-lens, encode", "encode_selected, 8 features"],
    "step": ["unsteered", "steer, 1 layer", "steer, all layers", "steer, a vector a row", "steer, Ablate + Add"],
    "generate": ["unsteered", "steer, 1 layer", "steer, a vector a row", "steer, all layers", "steer, Ablate + Add"],
    "effects": ["a vector a call", "a vector a row"],
}


@pytest.mark.parametrize(
    ("section", "model"),
    [
        pytest.param("collect", "gpt2", marks=pytest.mark.slow),
        pytest.param("encode", "llama-100m", marks=pytest.mark.slow),
        ("step", "gpt2"),
        pytest.param("generate", "llama", marks=pytest.mark.slow),
        ("effects", "llama"),
    ],
)
def test_sections_run_and_agree(speed, tmp_path, capsys, section, model):
    out = tmp_path / "speed.json"
    assert speed.main(["--quick", "--only", section, "--models", model, "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    document = json.loads(out.read_text())
    rows = speed.all_rows(document)
    assert {row["section"] for row in rows} == {section}
    assert set(CONTENDERS[section]) <= {row["contender"] for row in rows}
    assert rows[0]["contender"] == CONTENDERS[section][0]
    assert rows[0]["ratio"] == [1.0, 1.0, 1.0]
    assert all(row["difference"] is not None for row in rows if row["like"])
    assert section == "step" or any(row["like"] for row in rows)
    assert str(tmp_path) not in out.read_text()  # no path of the machine
    assert json.loads(printed[-1]) == speed.digest(document["runs"][0])
    table = speed.markdown(document)
    assert all(f"| {name} |" in table for name in CONTENDERS[section])


def test_a_section_timed_again_replaces_what_was_there(speed):
    def run(*sections):
        return {"sections": list(sections), "rows": [{"section": name, "of": sections} for name in sections]}

    document = speed.added(speed.added({"runs": []}, run("collect", "step")), run("step", "encode"))
    assert [run["sections"] for run in document["runs"]] == [["collect"], ["step", "encode"]]
    assert [(row["section"], len(row["of"])) for row in speed.all_rows(document)] == [
        ("collect", 2),
        ("encode", 2),
        ("step", 2),
    ]
    assert document["runs"][0]["rows"][0]["of"] == ("collect", "step")


def test_every_addition_changes_what_is_written(speed):
    """Contenders that agree might all be doing nothing."""
    steering, bench = importlib.import_module("timing.steering"), importlib.import_module("timing.bench")
    given = bench.Bench(speed.Clock(torch.device("cpu")), ["llama"], quick=True)
    (subject,) = given.subjects()
    ids = steering.prompt_ids(subject, 2, 8)
    plain = functools.partial(subject.model.generate, input_ids=ids, max_new_tokens=16, do_sample=False)
    ways = {way.name: way.run for way in steering._ways(given, subject, plain, 2)}
    for name in (steering.ADD, steering.ADD_ALL, "steer, Ablate + Add"):
        assert bench.unequal(ways[name](), plain()) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("section", ["memory", "start", "effects", "train"])
def test_sections_on_the_default(speed, tmp_path, section):
    out = tmp_path / "speed.json"
    assert speed.main(["--quick", "--only", section, "--models", "default", "--out", str(out)]) == 0
    rows = speed.all_rows(json.loads(out.read_text()))
    assert rows
    if section == "memory":
        assert 50 < rows[0]["peak_mib"] <= rows[1]["peak_mib"] * 1.1


def test_peak_is_of_the_child_alone(clock):
    held = torch.ones(100 << 18)  # 100 MiB, here and not there
    output, seconds, peak = clock.measured_child(["-c", "x = bytearray(50 << 20); print(len(x))"])
    assert held.any()
    assert int(output) == 50 << 20
    assert 50 < peak < 100
    assert seconds > 0


def test_ratios_are_of_the_same_turn_and_quick_work_is_looped(clock, monkeypatch):
    """On a made-up clock: the machine gets twice as slow every turn, and no ratio moves."""
    now, runs = [0.0], {"slow": 0, "quick": 0}
    monkeypatch.setattr(clock, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def work(name, seconds):
        runs[name] += 1
        now[0] += seconds * 2 ** max(0, runs["slow"] - 2)

    contenders = [
        clock.Contender("slow", lambda: work("slow", 2.0)),
        clock.Contender("quick", lambda: work("quick", 0.25)),
    ]
    rows = clock.Clock(torch.device("cpu"), 4, at_least=1.0).compare(clock.Case("a", "b", "c", 6.0, "x/s"), contenders)
    assert runs == {"slow": 2 + 4, "quick": 2 + 4 * 4}  # a warm-up and a first look; then turns, of four loops each
    assert rows[0].ratio == (1.0, 1.0, 1.0)
    assert rows[0].seconds == (7.0, 12.0, 20.0)  # quartiles of 4, 8, 16, 32
    assert rows[0].rate == 6.0 / 12.0
    # quick goes first in every other turn, before slow has made that turn slower: 1/16 there, 1/8 elsewhere
    assert rows[1].ratio == (0.0625, 0.09375, 0.125)


def test_results_that_differ_are_told(speed, clock, capsys):
    def disagreeing(bench):
        case = clock.Case("collect", "llama", "c", difference=lambda a, b: abs(a - b), tolerance=0.1)
        near, far = clock.Contender("near", lambda: 1.05, "exact"), clock.Contender("far", lambda: 1.5, "exact")
        yield from bench.clock.compare(case, [clock.Contender("exact", lambda: 1.0), near, far])

    speed.SECTIONS["collect"], kept = disagreeing, speed.SECTIONS["collect"]
    try:
        assert speed.main(["--quick", "--only", "collect"]) == 1
    finally:
        speed.SECTIONS["collect"] = kept
    told = capsys.readouterr().out.splitlines()
    assert [name in line for line in told for name in ["DIFFERS"]].count(True) == 1
    assert "DIFFERS from exact by 0.5" in next(line for line in told if "far" in line)
    assert json.loads(told[-1])["agree"] is False
