"""The inside of ``fgsteer play``: plans, what they build, the queue, the guard, the code that the page shows."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import shlex
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.play import code, writing
from fgsteer.play.actions import ACTIONS
from fgsteer.play.building import build_control, build_steering, build_vector
from fgsteer.play.guard import MAX_BODY_BYTES, Guard
from fgsteer.play.measuring import DOSES, strength_curve
from fgsteer.play.plan import MAX_TEXT_CHARS, FeatureItem, parse_item, parse_plan
from fgsteer.play.report import Report, report_page
from fgsteer.play.served import SteeringServer
from fgsteer.play.session import PlaySession, sae_sources
from fgsteer.play.turns import MAX_WAITING, Turns
from fgsteer.play.writing import Written, write_texts
from fgsteer.serving.inline import encode_vector
from fgsteer.serving.request import parse_request
from fgsteer.serving.sources import load_stages
from tests.helpers.cli import app, invoke

SAE, FEATURE = "layer_2", 2326
SCRIPT = "</p><script>alert(1)</script><img src=x onerror=alert(2)>"
TYPED = {"positives": ("The sea was wild.", "Waves broke on the shore."), "negatives": ("The bus is late.", "He ate.")}


@pytest.fixture(scope="module")
def session():
    model, tokenizer = fg.load_model("default", device="cpu")
    sources, first = sae_sources("default", None, [])
    return PlaySession(model, tokenizer, "default", sources, first_sae=first)


def feature(**more):
    return {"kind": "feature", "sae": SAE, "feature": FEATURE, "amount": 150.0, **more}


def plan_of(*items, **more):
    fields = {"prompt": "It was", "max_new_tokens": 8, "temperature": 0.8, "seeds": [3, 4], **more}
    return parse_plan({**fields, "items": list(items)})


def texts_of(session, plan):
    written = Written(plan)
    events = list(write_texts(session, plan, written))
    return written, events


def act(session, action, **body):
    return list(ACTIONS[action](session, body))


def built(session, plan, build=build_steering) -> Any:
    return build(session, plan)


def event_of(name):
    yield {"event": name}


# ---------------------------------------------------------------- plans


def test_a_plan_is_the_same_after_a_round_trip():
    gate = {"sae": SAE, "feature": 7, "above": 2.0, "pooling": "max", "inverted": True}
    plan = plan_of(
        feature(gate=gate, scope="first:2"),
        {"kind": "edit", "sae": SAE, "feature": 5, "edit": "at_most", "amount": 2.0, "on": False},
        {"kind": "vector", "name": "love", "op": "ablate"},
        {"kind": "contrast", "method": "caa", "sae": SAE, "layer": 1, "amount": 3.0, **TYPED},
        chat=True,
        system="Be brief.",
        control=True,
    )
    assert parse_plan(json.loads(json.dumps(plan.as_json()))) == plan
    assert [item.on for item in plan.active] == [True] * 3


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a" * (MAX_TEXT_CHARS + 1)},
        {"prompt": 3},
        {"seeds": [1, 1]},
        {"seeds": list(range(9))},
        {"seeds": 3},
        {"seeds": ["1"]},
        {"max_new_tokens": 100_000},
        {"max_new_tokens": 8.5},
        {"temperature": float("nan")},
        {"temperature": -1},
        {"chat": "yes"},
        {"items": [feature()] * 17},
        {"items": [feature(amount=float("inf"))]},
        {"items": [feature(amount=10**400)]},
        {"temperature": 10**400},
        {"items": [feature(amount=True)]},
        {"items": [feature(op="exec")]},
        {"items": [feature(scope="everywhere")]},
        {"items": [feature(feature=-1)]},
        {"items": [feature(gate={"sae": SAE})]},
        {"items": [feature(gate={"sae": SAE, "feature": 1, "pooling": "__class__"})]},
        {"items": [feature(kind="__init__")]},
        {"items": [feature(__class__="x")]},
        {"items": [{"kind": "contrast", "method": "pca", "sae": SAE, **TYPED}]},
        {"items": [{"kind": "contrast", "method": "fgaa", "sae": SAE, "layer": 2, **TYPED}]},
        {"items": [{"kind": "contrast", "method": "caa", "sae": SAE, "positives": [], "negatives": ["x"]}]},
        {"items": [{"kind": "contrast", "method": "caa", "sae": SAE, "positives": ["x"] * 65, "negatives": ["x"]}]},
        {"items": ["feature"]},
        {"more": 1},
    ],
    ids=lambda change: json.dumps(change)[:60],
)
def test_what_makes_no_plan_is_refused(change):
    with pytest.raises(fg.FgsteerError):
        parse_plan({"prompt": "x", **change})


def test_the_usual_scope_reads_a_chats_question_as_it_is():
    item = parse_item(feature())
    assert (item.scope_in(True), item.scope_in(False)) == ("reply", "all")


# ---------------------------------------------------------------- what is built, and written


def test_items_are_what_the_library_builds(session):
    sae = session.sae(SAE)
    gate = {"sae": SAE, "feature": 7, "above": 2.0, "pooling": "mean"}
    add, edit, off = built(
        session,
        plan_of(
            feature(gate=gate),
            {"kind": "edit", "sae": SAE, "feature": 5, "edit": "at_most", "amount": 2.0},
            {"kind": "edit", "sae": SAE, "feature": 6},
            feature(on=False),
        ),
    )
    expected = fg.from_features(sae, [FEATURE], normalize=True).add(150.0)
    assert torch.equal(add.direction, expected.direction)
    assert (add.coefficient, add.hookpoint) == (150.0, expected.hookpoint)
    assert repr(add.when) == repr(fg.Feature(sae, 7).mean() > 2.0)
    assert (edit.at_most, off.targets) == ({5: 2.0}, {6: 0.0})


@pytest.mark.filterwarnings("ignore::fgsteer.errors.SelectionWarning")  # of so few texts
@pytest.mark.parametrize("method", ["caa", "fgaa", "sta", "ace"])
def test_contrasts_are_built_as_the_methods_build_them(session, method):
    item = parse_item({"kind": "contrast", "method": method, "sae": SAE, "amount": 1.0, **TYPED})
    sae = session.sae(SAE)
    contrast = fg.ContrastSet("typed", **TYPED)
    stats = fg.collect(session.model, session.tokenizer, contrast, sae=sae)
    expected: Any = {"caa": fg.caa, "ace": fg.ace, "fgaa": fg.fgaa, "sta": fg.sta}[method]
    vector = expected(stats) if method in ("caa", "ace") else expected(stats, sae)
    vector = vector if method == "ace" else vector.unit()
    # both read the same activations; only that the SAE is read too differs, which rounds nothing
    assert torch.allclose(build_vector(session, item).direction, vector.direction, atol=1e-5)
    assert build_vector(session, item) is build_vector(session, item)


def test_a_random_control_has_the_same_norm_place_scope_and_gate(session):
    plan = plan_of(feature(scope="prompt"), {"kind": "edit", "sae": SAE, "feature": 5, "edit": "set", "amount": 2.0})
    own, control = built(session, plan), built(session, plan, build_control)
    # two norms of the same vector, computed in float32
    assert float(control[0].direction.norm()) == pytest.approx(float(own[0].direction.norm()), rel=1e-5)
    assert abs(float(torch.cosine_similarity(own[0].direction, control[0].direction, dim=0))) < 0.3
    assert (control[0].hookpoint, control[0].scope, control[0].coefficient) == (own[0].hookpoint, "prompt", 150.0)
    assert control[1].features != own[1].features
    again = built(session, plan, build_control)
    assert torch.equal(control[0].direction, again[0].direction)


def test_texts_are_those_of_generate(session):
    plan = plan_of(feature(), control=True)
    written, events = texts_of(session, plan)
    for column, steering in written.steering.items():
        for seed in plan.seeds:
            torch.manual_seed(seed)
            entry = [steering] if steering else None
            expected = fg.generate(session.model, session.tokenizer, [plan.prompt], steering=entry, **plan.options)
            assert written.texts[column, seed] == expected[0]
            streamed = ""
            for event in events:
                if event["event"] == "text" and (event["column"], event["seed"]) == (column, seed):
                    streamed = streamed[: event["at"]] + event["text"]
            assert streamed == expected[0]
    assert len({written.texts[column, 3] for column in ("steered", "unsteered", "random")}) == 3


def test_an_amount_of_zero_and_no_items_change_nothing(session):
    nothing, _ = texts_of(session, plan_of(temperature=0))
    zero, _ = texts_of(session, plan_of(feature(amount=0.0), temperature=0))
    assert {column for column, _ in nothing.texts} == {"unsteered"}
    assert zero.texts["steered", 3] == zero.texts["unsteered", 3] == nothing.texts["unsteered", 3]


def test_unsteered_texts_are_written_once(session, monkeypatch):
    plan = plan_of(feature(), prompt="Once upon a time", seeds=[0])
    texts_of(session, plan)
    calls = []
    real = vars(writing)["stream_tokens"]
    monkeypatch.setattr(writing, "stream_tokens", lambda *a, **k: calls.append(k["steering"]) or real(*a, **k))
    texts_of(session, plan)
    assert [steering is None for steering in calls] == [False]


def test_closing_ends_generation_and_takes_the_hooks_off(session):
    plan = plan_of(feature(), max_new_tokens=512, temperature=0)
    events = write_texts(session, plan, Written(plan))
    next(events)
    events.close()
    assert not any(thread.name == "fgsteer.stream" for thread in threading.enumerate())
    assert not any(module._forward_hooks for module in session.model.modules())


# ---------------------------------------------------------------- what it costs, and what it did


def test_a_curve_of_costs_is_that_of_cross_entropy(session):
    item = parse_item(feature())
    curve = strength_curve(session, item, chat=False)
    from fgsteer.likelihood.strengths import neutral_texts

    texts, sae = neutral_texts(chat=False), session.sae(SAE)
    for point in (curve["points"][1], curve["points"][4]):
        steering = fg.from_features(sae, [FEATURE]).add(point["amount"])
        base = fg.cross_entropy(session.model, session.tokenizer, texts)
        rise = fg.cross_entropy(session.model, session.tokenizer, texts, steering=steering) - base
        assert point["cost"] == pytest.approx(rise, abs=1e-4)  # batches of other sizes round otherwise
    assert [point["dose"] for point in curve["points"]] == list(DOSES)
    costs = [point["cost"] for point in curve["points"]]
    below = max(n for n, cost in enumerate(costs) if cost < 1.0)
    assert DOSES[below] < curve["worse"] < DOSES[below + 1]
    assert strength_curve(session, dataclasses.replace(item, amount=-1.0), chat=False)["points"][0]["dose"] < 0


def test_the_events_of_a_run_say_what_steering_did(session):
    plan = plan_of(feature(), {"kind": "edit", "sae": SAE, "feature": 5}, seeds=[0, 1], control=True)
    events = act(session, "write", plan=plan.as_json(), sae=SAE)
    kinds = [event["event"] for event in events]
    assert kinds[0] == "run"
    assert kinds[-1] == "features"
    tokens = [event for event in events if event["event"] == "tokens"]
    assert {(e["column"], e["seed"]) for e in tokens} == {
        (c, s) for c in ("steered", "unsteered", "random") for s in (0, 1)
    }
    for event in tokens:
        assert "".join(token["text"] for token in event["tokens"]).strip()
        assert [f["id"] for f in event["features"]] == [f["id"] for f in tokens[0]["features"]]
    assert {FEATURE, 5} <= {f["id"] for f in tokens[0]["features"]}
    moved = events[-1]
    assert moved["predicted_by"] == ""
    assert moved["why"] == "Effects predict what adding a vector does, not ClampFeature."
    assert moved["rows"][0]["error"] is not None
    page = act(session, "page", run=events[0]["run"])[0]
    html = base64.b64decode(page["content"]).decode()
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    session.judge = fg.KeywordJudge({"looks": ["window"]}), "looks"
    scores = act(session, "judge", run=events[0]["run"])[0]
    session.judge = None
    assert {value for values in scores["behavior"].values() for value in values} <= {0.0, 1.0}
    assert all(0 <= value <= 1 for values in scores["coherence"].values() for value in values)


def test_predicted_effects_are_those_of_the_sum_of_vectors(session):
    plan = plan_of(feature(), feature(feature=5, amount=-50.0), seeds=[0])
    moved = act(session, "write", plan=plan.as_json(), sae=SAE)[-1]
    sae, effects = session.sae(SAE), fg.load_effects("default", SAE)
    total = 150.0 * sae.direction(FEATURE) / sae.direction(FEATURE).norm()
    total = total - 50.0 * sae.direction(5) / sae.direction(5).norm()
    expected = effects.predict(total)
    for row in moved["rows"]:
        assert row["predicted"] == pytest.approx(float(expected[row["feature"]]), abs=1e-4)  # float32 sums


# ---------------------------------------------------------------- what is taken away

GATE = {"sae": "layer_1", "feature": 7, "above": 0.5, "inverted": True}
PLANS = {
    "feature": [feature()],
    "gate and edit": [
        feature(gate=GATE, op="add_relative", amount=0.4),
        {"kind": "edit", "sae": SAE, "feature": 5, "edit": "set", "amount": 30.0},
    ],
    "contrasts": [
        {"kind": "contrast", "method": "fgaa", "sae": SAE, "amount": 120.0, **TYPED},
        {"kind": "contrast", "method": "caa", "sae": SAE, "layer": 3, "amount": 60.0, **TYPED},
        {"kind": "contrast", "method": "ace", "sae": SAE, "op": "affine", "amount": 1.5, **TYPED},
    ],
    "vector": [{"kind": "vector", "name": "sea", "op": "at_least", "amount": 90.0, "scope": "generated"}],
    "nothing": [],
}  # fmt: skip


@pytest.fixture
def with_vector(session, tmp_path, monkeypatch):
    session.folder = tmp_path
    session.add_vector("sea", fg.from_features(session.sae(SAE), [FEATURE]))
    yield session
    session.folder = None


@pytest.mark.filterwarnings("ignore::fgsteer.errors.SelectionWarning")  # of so few texts
@pytest.mark.parametrize("name", PLANS)
def test_the_python_code_writes_the_texts_of_the_page(with_vector, name, monkeypatch):
    plan = plan_of(*PLANS[name], prompt='He said: "It\'s\nlate" and')
    written, _ = texts_of(with_vector, plan)
    monkeypatch.setattr(fg, "load_model", lambda *_: (with_vector.model, with_vector.tokenizer))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code.python_code(with_vector, plan), "page", "exec"), {})
    column = "steered" if plan.items else "unsteered"
    assert out.getvalue() == "".join(written.texts[column, seed] + "\n" for seed in plan.seeds)


def test_the_command_writes_the_texts_of_the_page(session, tmp_path, monkeypatch):
    edit = {"kind": "edit", "sae": SAE, "feature": 5, "edit": "set", "amount": 30.0}
    plan = plan_of(feature(), edit, prompt="-- It's", seeds=[3])
    written, _ = texts_of(session, plan)
    file = act(session, "steering", plan=plan.as_json())[0]
    (tmp_path / file["name"]).write_bytes(base64.b64decode(file["content"]))
    monkeypatch.chdir(tmp_path)
    words = shlex.split(code.shell_code(session, plan).replace("\\\n", " "))
    result = CliRunner().invoke(app, [*words[1:-2], "--device", "cpu", "--json", *words[-2:]])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["unsteered"], told["steered"]) == ([written.texts["unsteered", 3]], [written.texts["steered", 3]])


def test_the_request_is_one_that_the_server_takes(session, tmp_path):
    plan = plan_of(feature(scope="reply"), {"kind": "edit", "sae": SAE, "feature": 5, "edit": "at_most", "amount": 2.0})
    file = act(session, "steering", plan=plan.as_json())[0]
    path = tmp_path / file["name"]
    path.write_bytes(base64.b64decode(file["content"]))
    assert len(load_stages(path, [session.sae(SAE)])) == 2
    shown = act(session, "code", plan=plan.as_json())[0]["server"]
    body = json.loads(shlex.split(shown)[-1])
    (asked,) = parse_request(body["vllm_xargs"])
    assert (asked.name, asked.scale) == ("page", 1.0)
    assert (body["prompt"], body["max_tokens"], body["seed"]) == ("It was", 8, 4)
    gated = plan_of(feature(gate={"sae": SAE, "feature": 7, "pooling": "max"}))
    assert code.server_code(session, gated).startswith("# vLLM cannot steer so.")


def test_a_share_file_opens_with_its_vectors(with_vector):
    plan = plan_of(*PLANS["vector"], feature())
    shared = json.loads(json.dumps(act(with_vector, "share", plan=plan.as_json())[0]["share"]))
    vector = with_vector.vectors.pop("sea")
    opened = act(with_vector, "open", share=shared)[0]
    assert parse_plan(opened["plan"]) == plan
    assert torch.equal(with_vector.vector("sea").direction, vector.direction)
    for change in (
        {"kind": "other"},
        {"version": 2},
        {"plan": {"items": [feature(feature=10**6)]}},
        {"vectors": {"../../x": shared["vectors"]["sea"]}},
        {"vectors": {"x": "no base64"}},
        {"vectors": [1]},
    ):
        with pytest.raises(fg.FgsteerError):
            act(with_vector, "open", share={**shared, **change})


def test_a_vector_from_elsewhere_replaces_none(with_vector):
    """A share file steers as it did where it was made, also where another vector has the name here."""
    own, other = with_vector.vector("sea"), with_vector.vector("sea") * 2.0
    shared = act(with_vector, "share", plan=plan_of(*PLANS["vector"]).as_json())[0]["share"]
    assert act(with_vector, "open", share=shared)[0]["plan"] == shared["plan"], "the same vector needs no other name"
    opened = act(with_vector, "open", share={**shared, "vectors": {"sea": encode_vector(other)}})[0]
    names = [item["name"] for item in opened["plan"]["items"] if item["kind"] == "vector"]
    assert set(names) == {"sea-2"}
    assert torch.equal(with_vector.vector("sea-2").direction, other.direction)
    added = act(with_vector, "add-vector", name="sea", content=encode_vector(own * 3.0))[0]
    assert added["name"] == "sea-3"
    assert torch.equal(fg.SteeringVector.load(with_vector.folder / "sea.safetensors").direction, own.direction)


def test_a_reopened_page_names_no_file_that_is_not_there(with_vector):
    """What a share file brings is in memory alone, until it is saved."""
    plan = plan_of({"kind": "vector", "name": "tide", "amount": 3.0})
    content = encode_vector(fg.from_features(with_vector.sae(SAE), [5]))
    shared = {"kind": "fgsteer play", "version": 1, "plan": plan.as_json(), "vectors": {"tide": content}}
    opened = parse_plan(act(with_vector, "open", share=shared)[0]["plan"])
    python = code.python_code(with_vector, opened)
    assert code.UNSAVED in python
    assert "fg.SteeringVector.load('tide.safetensors')" in python
    assert not list(with_vector.folder.glob("tide*"))
    with_vector.add_vector("tide", with_vector.vector("tide"))
    python = code.python_code(with_vector, opened)
    assert code.UNSAVED not in python
    assert repr(str(with_vector.folder / "tide.safetensors")) in python
    assert (with_vector.folder / "tide.safetensors").is_file()


def test_a_vector_is_taken_off_the_list_and_its_file_stays(with_vector, monkeypatch):
    monkeypatch.setattr("fgsteer.play.session.MAX_VECTORS", len(with_vector.vectors))
    own = with_vector.vector("sea")
    with pytest.raises(fg.DataError, match="off the list"):
        act(with_vector, "add-vector", name="tides", content=encode_vector(own * 2.0))
    with_vector.kept("curve", "of the old one", list)
    told = act(with_vector, "forget-vector", name="sea")[0]
    assert "sea" not in told["vectors"]
    added = act(with_vector, "add-vector", name="tides", content=encode_vector(own * 2.0))[0]
    assert "tides" in added["vectors"]
    assert with_vector.kept("curve", "of the old one", lambda: "measured anew") == "measured anew"
    assert torch.equal(fg.SteeringVector.load(with_vector.folder / "sea.safetensors").direction, own.direction)
    with_vector.forget_vector("tides")
    with pytest.raises(fg.DataError, match="another file"):  # it was the page's no longer
        with_vector.add_vector("sea", own * 3.0)
    for name in ("sea", "../sea", "", 5):
        with pytest.raises(fg.DataError):
            act(with_vector, "forget-vector", name=name)


def test_a_file_that_is_no_vector_is_not_written_over(with_vector):
    path = with_vector.folder / "model.safetensors"
    path.write_bytes(b"weights")
    with pytest.raises(fg.DataError, match="another file"):
        act(with_vector, "save-vector", item=feature(), name="model")
    assert path.read_bytes() == b"weights"
    path.unlink()


def test_another_vector_of_a_name_has_costs_of_its_own(with_vector):
    with_vector.kept("curve", "of the old one", list)
    with_vector.add_vector("sea", with_vector.vector("sea") * 2.0, save=False)
    assert with_vector.kept("curve", "of the old one", lambda: "measured anew") == "measured anew"


def test_a_saved_vector_is_a_file_in_the_folder(with_vector):
    file, names = act(with_vector, "save-vector", item=feature(), name="wave")
    vector = fg.SteeringVector.load(with_vector.folder / "wave.safetensors")
    assert torch.equal(vector.direction, build_vector(with_vector, parse_item(feature())).direction)
    assert (file["name"], "wave" in names["vectors"]) == ("wave.safetensors", True)
    for name in ("../out", "a/b", "", ".hidden", "x" * 65, "a\x00"):
        with pytest.raises(fg.FgsteerError):
            act(with_vector, "save-vector", item=feature(), name=name)
    assert sorted(path.name for path in with_vector.folder.iterdir()) == ["sea.safetensors", "wave.safetensors"]


def test_texts_of_strangers_are_escaped_in_the_page(session):
    plan = plan_of(feature(), prompt=SCRIPT, seeds=[0])
    report = Report(Written(plan), SCRIPT)
    report.written.texts["steered", 0] = SCRIPT
    token = {"text": SCRIPT, "kl": 1.0, "special": False}
    report.tokens["steered", 0] = {"event": "tokens", "tokens": [token], "kl": 1.0, "surprise": 1.0, "distinct": 1.0}
    row = {"feature": 1, "label": SCRIPT, "observed": 1.0, "error": None, "predicted": None}
    report.movement = {"rows": [row], "why": SCRIPT, "correlation": None}
    report.code = {SCRIPT: SCRIPT}
    page = report_page(report)
    assert "<script" not in page
    assert "<img" not in page
    assert page.count("&lt;script&gt;") >= 6


def test_searches_and_cards(session):
    rows = act(session, "search", sae=SAE, by="word", words="sea")[0]["rows"]
    assert rows[0]["id"] == fg.find_features(session.model, session.tokenizer, session.sae(SAE), "sea",
                                             examples=session.examples(SAE))[0].id  # fmt: skip
    fired = act(session, "search", sae=SAE, by="text", words="The ship went down in the sea.")[0]["rows"]
    assert FEATURE in [row["id"] for row in fired]
    card = act(session, "card", sae=SAE, feature=FEATURE)[0]
    assert card["row"]["label"] == session.sae(SAE).labels[FEATURE]
    for body in (
        {"sae": SAE, "by": "word", "words": "x" * 201},
        {"sae": SAE, "by": "text", "words": " "},
        {"sae": "../x", "by": "word", "words": "sea"},
        {"sae": SAE, "by": "eval", "words": "sea"},
        {"sae": SAE, "by": "word"},
    ):
        with pytest.raises(fg.FgsteerError):
            act(session, "search", **body)
    with pytest.raises(fg.FgsteerError):
        act(session, "card", sae=SAE, feature="5")


def test_the_command_serves_what_its_options_say(session, tmp_path, monkeypatch):
    served = []
    monkeypatch.setattr("fgsteer.play.web.need_play", lambda: None)
    monkeypatch.setattr("fgsteer.play.web.serve_page", lambda *given: (served.append(given), given[3]("http://here")))
    monkeypatch.setattr("fgsteer.cli.play.load_model", lambda _: (session.model, session.tokenizer))
    fg.from_features(session.sae(SAE), [FEATURE]).save(tmp_path / "wave.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"no vector")
    options = ("--sae-id", "layer_1", "--vectors", tmp_path, "--port", 0, "--no-browser", "--judge", "keyword")
    result = invoke("play", "-m", "default", *options, "--concept", "love", "--server", "http://127.0.0.1:9")
    assert (result.exit_code, "http://here" in result.output) == (0, True)
    ((made, token, port, _),) = served
    assert (list(made.sources), made.first_sae, port, len(token)) == (["layer_1"], "layer_1", 0, 32)
    assert (list(made.vectors), made.judge[1], made.server.url) == (["wave"], "love", "http://127.0.0.1:9")
    invoke("play", "-m", "default", "--no-browser")
    assert (list(served[1][0].sources), served[1][0].first_sae) == (["layer_1", "layer_2", "layer_3"], "layer_2")
    assert served[1][1] != token


# ---------------------------------------------------------------- the queue


def test_one_at_a_time_in_order_each_told_its_place():
    at_work, most, order = 0, 0, []

    def work(name):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        order.append(name)
        for n in range(3):
            time.sleep(0.005)
            yield {"event": "step", "n": n}
        at_work -= 1

    async def ask(turns, name):
        return [event async for event in turns.take(lambda: work(name))]

    async def run():
        turns = Turns()
        return await asyncio.gather(*(ask(turns, name) for name in range(4)))

    told = asyncio.run(run())
    assert (most, order) == (1, [0, 1, 2, 3])
    for name, events in enumerate(told):
        assert [e["place"] for e in events if e["event"] == "queue"] == list(range(name, 0, -1))
        assert [e["n"] for e in events if e["event"] == "step"] == [0, 1, 2]


def test_who_leaves_ends_the_work_and_frees_the_turn():
    ended = threading.Event()

    def endless():
        try:
            while True:
                time.sleep(0.002)
                yield {"event": "step"}
        finally:
            ended.set()

    async def run():
        turns = Turns()
        first = turns.take(endless)
        await anext(first)
        waiting = turns.take(lambda: event_of("never"))
        assert (await anext(waiting))["place"] == 1
        await waiting.aclose()  # one that waits leaves too
        await first.aclose()
        assert [e async for e in turns.take(lambda: event_of("mine")) if e["event"] == "mine"]
        while turns.waiting:  # until who had the turn has left
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert ended.is_set()


def test_an_error_reaches_who_asked_and_frees_the_turn():
    def broken():
        yield {"event": "step"}
        raise fg.DataError("a broken thing", "a whole one")

    async def run():
        turns = Turns()
        with pytest.raises(fg.DataError):
            [event async for event in turns.take(broken)]
        return [event async for event in turns.take(lambda: event_of("next"))]

    assert asyncio.run(run())[-1] == {"event": "next"}


def test_a_long_queue_is_refused():
    async def run():
        turns, gate = Turns(), threading.Event()

        def held():
            gate.wait(20)
            yield {"event": "step"}

        async def drain():
            return [event async for event in turns.take(held)]

        tasks = [asyncio.create_task(drain()) for _ in range(MAX_WAITING + 1)]
        await asyncio.sleep(0.05)
        with pytest.raises(fg.BusyError):
            await anext(turns.take(held))
        gate.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


# ---------------------------------------------------------------- the guard

HOST = "127.0.0.1:8765"
GOOD = {"host": HOST, "origin": f"http://{HOST}", "content-type": "application/json"}


def request(headers, method="POST", query="", size=0):
    """The status and the headers of an answer of a guarded app that always says 200."""
    sent = []

    async def inner(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive():
        return {"type": "http.request", "body": b"x" * size}

    async def send(message):
        sent.append(message)

    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "headers": pairs, "query_string": query.encode(), "path": "/"}
    asyncio.run(Guard(inner, "secret", {HOST, "localhost:8765"})(scope, receive, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


def test_who_has_the_token_and_comes_from_the_page_is_answered():
    status, headers = request({"host": HOST}, "GET", "token=secret")
    assert status == 200
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert request({**GOOD, "cookie": cookie.partition(";")[0]})[0] == 200
    own = cookie.partition(";")[0]
    for other in ('page={"x":1}', "we[ird=1", "no value", "@@", f"{own.partition('=')[0]}=of an older session"):
        assert request({**GOOD, "cookie": f"{other}; {own}"})[0] == 200, "other programs have cookies here"
    assert request({**GOOD, "authorization": "Bearer secret"})[0] == 200
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(
    ("change", "method", "query", "status"),
    [
        ({}, "POST", "", 401),
        ({"cookie": "fgsteer-play-8765=wrong"}, "POST", "", 401),
        ({}, "POST", "token=secret", 401),  # the address is for opening the page alone
        ({"authorization": "Bearer wrong"}, "POST", "", 401),
        ({}, "GET", "token=wrong", 401),
        ({"authorization": "Bearer secret", "host": "evil.example:8765"}, "POST", "", 403),
        ({"authorization": "Bearer secret", "host": "127.0.0.1:9999"}, "POST", "", 403),
        ({"authorization": "Bearer secret", "origin": "http://evil.example"}, "POST", "", 403),
        ({"authorization": "Bearer secret", "origin": "null"}, "POST", "", 403),
        ({"cookie": "fgsteer-play-8765=secret", "origin": None}, "POST", "", 403),
        ({"authorization": "Bearer secret", "sec-fetch-site": "cross-site"}, "POST", "", 403),
        ({"authorization": "Bearer secret", "content-type": "text/plain"}, "POST", "", 415),
        ({"authorization": "Bearer secret", "content-length": str(MAX_BODY_BYTES + 1)}, "POST", "", 413),
        ({"authorization": "Bearer secret"}, "DELETE", "", 405),
    ],
)
def test_everyone_else_is_refused(change, method, query, status):
    headers = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    told, answered = request(headers, method, query)
    assert told == status
    assert "content-security-policy" in answered
    assert "set-cookie" not in answered


# ---------------------------------------------------------------- a served model


class Served(BaseHTTPRequestHandler):
    """A stand-in for fgsteer serve, which checks requests with its own parser."""

    seen: ClassVar[list] = []

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self._answer(json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_PUT(self):
        self.seen.append(("PUT", self.path, self._body(), self.headers.get("Authorization")))
        self._answer(b"{}")

    def do_POST(self):
        body = json.loads(self._body())
        parse_request(body.get("vllm_xargs"))
        self.seen.append(("POST", self.path, body))
        if body.get("prompt") == "fail":
            return self._answer(b"the key is SECRETKEY, no", 400)
        if body.get("prompt") == "refuse":
            return self._answer(b'{"error": {"message": "No table at layer 2 for SECRETKEY.", "code": 401}}', 401)
        if body.get("prompt") == "break":
            return self._answer(b'data: {"error": {"message": "The engine died of SECRETKEY."}}\n\n')
        key = "delta" if "messages" in body else "text"
        parts = [{"choices": [{key: {"content": word} if key == "delta" else word}]} for word in (" the", " sea")]
        lines = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
        self._answer(lines.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Served.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Served) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield SteeringServer(f"http://127.0.0.1:{running.server_address[1]}", key="SECRETKEY")
        running.shutdown()


def test_a_server_writes_the_texts(session, server, tmp_path):
    session.server = server
    try:
        plan = plan_of(feature(), seeds=[5], prompt="At the shore")
        written, _ = texts_of(session, plan)
        texts_of(session, plan_of(feature(), seeds=[5], chat=True))
        assert written.texts == {("steered", 5): " the sea", ("unsteered", 5): " the sea"}
        (put, path, content, key), first, second, _, chat, _ = Served.seen
        assert (put, key) == ("PUT", "Bearer SECRETKEY")
        file = tmp_path / "loaded.safetensors"
        file.write_bytes(content)
        loaded: Any = fg.load_steering(file)[0]
        assert torch.equal(loaded.direction, written.steering["steered"][0].direction)
        assert first[2]["vllm_xargs"]["steer"] == path.rpartition("/")[2]
        assert "vllm_xargs" not in second[2]
        assert (first[2]["seed"], first[2]["temperature"], first[2]["max_tokens"], first[2]["model"]) == (
            5,
            0.8,
            8,
            "tiny",
        )
        assert chat[1] == "/v1/chat/completions"
        with pytest.raises(fg.SteeringError) as raised:
            texts_of(session, plan_of(feature(), prompt="fail"))
        assert "SECRETKEY" not in str(raised.value)
        for prompt, said in (
            ("refuse", "401: No table at layer 2 for [^ ]+ Pass the key"),
            ("break", "off: The engine died"),
        ):
            with pytest.raises(fg.SteeringError, match=said) as raised:
                texts_of(session, plan_of(feature(), prompt=prompt))
            assert "SECRETKEY" not in str(raised.value)
            assert "{" not in str(raised.value)
        loads = sum(seen[0] == "PUT" for seen in Served.seen)
        texts_of(session, plan_of(feature(), prompt="again"))
        assert sum(seen[0] == "PUT" for seen in Served.seen) == loads + 1, "a server that fails may have lost it"
    finally:
        session.server = None
    assert "SECRETKEY" not in repr(server)


@pytest.mark.parametrize(
    ("url", "key"),
    [
        ("file:///etc/passwd", ""),
        ("http://user:pw@host", ""),
        ("http://h/path", ""),
        ("nothing", ""),
        ("http://h?x", ""),
        ("http://example.com", "a key that anyone on the way could read"),
    ],
)
def test_addresses_that_are_refused(url, key):
    with pytest.raises(fg.DataError):
        SteeringServer(url, key)


def test_a_server_that_is_not_there(session):
    with pytest.raises(fg.SteeringError, match="running fgsteer serve"):
        SteeringServer("http://127.0.0.1:9").start()


def test_items_are_values():
    item = parse_item(feature())
    assert item == FeatureItem(sae=SAE, feature=FEATURE, amount=150.0)
    assert hash(item) == hash(dataclasses.replace(item))
