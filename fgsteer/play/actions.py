"""Actions: what the page asks for by name, each an iterator of events.

for event in ACTIONS["search"](session, {"sae": "layer_2", "words": "sea"}): ...
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from fgsteer.data.contrast_files import load_contrast
from fgsteer.data.shipped import load_neutral, shipped_contrasts
from fgsteer.errors import DataError
from fgsteer.errors.checks import describe_value, is_whole_number
from fgsteer.evaluation.metrics.coherence import Coherence
from fgsteer.features.active import seen_features
from fgsteer.features.description import describe_features
from fgsteer.features.search import find_features
from fgsteer.interventions.files import save_steering
from fgsteer.interventions.scopes import describe_scopes
from fgsteer.interventions.table import INTERVENTIONS
from fgsteer.methods.table import spec
from fgsteer.play import plan as plans
from fgsteer.play.building import build_steering, build_vector
from fgsteer.play.code import STEERING_FILE, python_code, server_code, shell_code
from fgsteer.play.measuring import measure_cost, strength_curve
from fgsteer.play.plan import ContrastItem, Plan, VectorItem, has_dose, parse_item, parse_plan
from fgsteer.play.reading import read_texts
from fgsteer.play.report import Report, report_page
from fgsteer.play.session import PlaySession
from fgsteer.play.turns import Event, Events
from fgsteer.play.writing import Written, write_texts
from fgsteer.serving.inline import decode_vector, encode_vector
from fgsteer.steering.generation import generate

Action = Callable[[PlaySession, dict[str, Any]], Events]
MAX_WORD_CHARS = 200
MAX_FOUND = 24
FIRST_PROMPT = "She looked out of the window and"
MAX_VECTOR_CHARS = 4 << 20  # of base64
COHERENCE_SAMPLES = 12
EXAMPLE_TEXTS = 16  # of either side of a contrast set that ships
SHARE_KIND, SHARE_VERSION = "fgsteer play", 1
_runs = count(1)


def about(session: PlaySession, _: dict[str, Any]) -> Events:
    """What there is to choose from."""
    methods = [{"name": name, "label": spec(name, "build").label} for name in plans.CONTRAST_METHODS]
    dosed = {row.name for row in INTERVENTIONS if row.amount == "coefficient"}
    yield {
        "event": "about",
        "model": session.model_name,
        "chats": session.chats,
        "can_chat": getattr(session.tokenizer, "chat_template", None) is not None,
        "saes": list(session.sources),
        "sae": session.first_sae,
        "layers": session.layers(),
        "methods": methods,
        "operations": [
            {"name": row.name, "summary": row.summary, "equation": row.equation, "amount": row.amount}
            for row in INTERVENTIONS
            if row.of_vector and row.name != "adaptive_add"
        ],
        "dosed": sorted(dosed),
        "scopes": ["auto", "all", "prompt", "generated", "reply", "last_prompt"],
        "scope_help": describe_scopes(),
        "edits": list(plans.EDITS),
        "vectors": sorted(session.vectors),
        "contrasts": shipped_contrasts(),
        "prompt": FIRST_PROMPT,
        "server": None if session.server is None else session.server.url,
        "judge": None if session.judge is None else {"name": session.judge[0].name, "concept": session.judge[1]},
        "limits": {"text": plans.MAX_TEXT_CHARS, "tokens": plans.MAX_NEW_TOKENS, "seeds": plans.MAX_SEEDS},
    }


def search(session: PlaySession, body: dict[str, Any]) -> Events:
    """Features by a word, or those that fire on a text."""
    key, by = _text(body, "sae", MAX_WORD_CHARS), _text(body, "by", 8)
    sae = session.sae(key)
    if by == "text":
        text = _text(body, "words", plans.MAX_TEXT_CHARS)
        if not text.strip():
            raise DataError("an empty text", "a text whose features are looked for", "paste a text")
        rows = [
            {"id": row.id, "label": row.label, "why": f"{row.activation:.1f} on “{row.token}”"}
            for row in seen_features(session.model, session.tokenizer, sae, text, top=MAX_FOUND)
        ]
    elif by == "word":
        word = _text(body, "words", MAX_WORD_CHARS)
        examples = session.examples(key)
        found = session.kept(
            "search",
            (key, word.strip().lower()),
            lambda: find_features(session.model, session.tokenizer, sae, word, examples=examples, top=MAX_FOUND),
        )
        rows = [{"id": row.id, "label": sae.labels.get(row.id, ""), "why": "; ".join(row.why)} for row in found]
        described = describe_features(session.model, session.tokenizer, sae, [row.id for row in found], tokens=4)
        for row, told in zip(rows, described, strict=True):
            row["raises"] = list(told.tokens)
    else:
        raise DataError(f"by = {by!r}", "'word' or 'text'")
    yield {"event": "found", "rows": rows}


def card(session: PlaySession, body: dict[str, Any]) -> Events:
    """What is known of one feature."""
    key = _text(body, "sae", MAX_WORD_CHARS)
    sae, examples = session.sae(key), session.examples(key)
    row = describe_features(
        session.model,
        session.tokenizer,
        sae,
        [_whole(body, "feature")],
        tokens=8,
        examples=examples,
    )[0]
    yield {"event": "card", "sae": key, "at": str(sae.hookpoint), "row": row.as_dict()}


def contrast(_: PlaySession, body: dict[str, Any]) -> Events:
    """The first texts of a contrast set that ships, to begin with."""
    name = _text(body, "name", plans.MAX_NAME_CHARS)
    if name not in shipped_contrasts():
        raise DataError(f"the contrast set {name!r}", f"one of {', '.join(shipped_contrasts())}")
    sides = load_contrast(name)
    lists = {
        word: [text for _, text in sides.side(positive) if isinstance(text, str)][:EXAMPLE_TEXTS]
        for word, positive in (("positives", True), ("negatives", False))
    }
    yield {"event": "contrast", **lists}


def strength(session: PlaySession, body: dict[str, Any]) -> Events:
    """What strengths of one item cost."""
    item, chat = parse_item(body.get("item")), body.get("chat") is True
    if not has_dose(item):
        raise DataError("an item without a dose", "one that adds a vector", "its cost is measured with all others")
    yield {"event": "strength", **strength_curve(session, item, chat=chat)}


def cost(session: PlaySession, body: dict[str, Any]) -> Events:
    """What everything costs together."""
    yield {"event": "cost", **measure_cost(session, parse_plan(body.get("plan")))}


def write(session: PlaySession, body: dict[str, Any]) -> Events:
    """Write the texts of a plan, then read what steering did to them."""
    plan = parse_plan(body.get("plan"))
    key = _text(body, "sae", MAX_WORD_CHARS)
    report = Report(Written(plan), session.model_name)
    number = next(_runs)
    yield {"event": "run", "run": number}
    with closing(write_texts(session, plan, report.written)) as events:
        yield from events
    yield {"event": "texts", "first_token_seconds": report.written.first_token_seconds}
    report.cost = measure_cost(session, plan)
    yield {"event": "cost", **report.cost}
    with closing(read_texts(session, report.written, key)) as events:
        for event in events:
            report.take(event)
            yield event
    report.code = {"Python": python_code(session, plan), "Command line": shell_code(session, plan)}
    session.kept("run", number, lambda: report)


def judge(session: PlaySession, body: dict[str, Any]) -> Events:
    """Coherence of the texts of a run, and behavior where there is a judge."""
    report = _report(session, body)
    plan, written = report.written.plan, report.written
    columns = sorted({column for column, _ in written.texts})
    texts = {column: [written.texts.get((column, seed), "") for seed in plan.seeds] for column in columns}

    def fit() -> Coherence:
        prompts = load_neutral()[1][:COHERENCE_SAMPLES]
        model, tokenizer = session.model, session.tokenizer
        samples = generate(model, tokenizer, prompts, max_new_tokens=plan.max_new_tokens, do_sample=True)
        return Coherence.fit(session.model, session.tokenizer, samples)

    coherence = session.kept("coherence", plan.max_new_tokens, fit)
    scores: dict[str, dict[str, list[float]]] = {"coherence": {}, "behavior": {}}
    for column, listed in texts.items():
        scores["coherence"][column] = coherence.score(listed).tolist()
        if session.judge is not None:
            scorer, concept = session.judge
            scores["behavior"][column] = scorer.score(listed, concept).tolist()
    report.scores = scores
    yield {"event": "scores", **scores}


def code(session: PlaySession, body: dict[str, Any]) -> Events:
    """The code of a plan, and its share file."""
    plan = parse_plan(body.get("plan"))
    yield {
        "event": "code",
        "python": python_code(session, plan),
        "shell": shell_code(session, plan),
        "server": server_code(session, plan),
    }


def steering_file(session: PlaySession, body: dict[str, Any]) -> Events:
    """The file of the steering, as ``fgsteer generate --steering`` and ``fgsteer serve`` take it."""
    steering = build_steering(session, parse_plan(body.get("plan")))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / STEERING_FILE
        save_steering(path, steering)
        content = path.read_bytes()
    yield _file(STEERING_FILE, content)


def vector_file(session: PlaySession, body: dict[str, Any]) -> Events:
    """The vector of an item, as a file; and under the name, as a vector of the page."""
    name, vector = _text(body, "name", plans.MAX_NAME_CHARS), build_vector(session, parse_item(body.get("item")))
    session.add_vector(name, vector)
    yield _file(f"{name}.safetensors", base64.b64decode(encode_vector(vector)))
    yield {"event": "vectors", "vectors": sorted(session.vectors)}


def add_vector(session: PlaySession, body: dict[str, Any]) -> Events:
    """Take a vector's file."""
    vector = decode_vector(_text(body, "content", MAX_VECTOR_CHARS), MAX_VECTOR_CHARS)
    name = session.take_vector(_text(body, "name", plans.MAX_NAME_CHARS), vector)
    yield {"event": "vectors", "vectors": sorted(session.vectors), "name": name}


def forget_vector(session: PlaySession, body: dict[str, Any]) -> Events:
    """Take a vector off the page's list, which holds a limited number of them; a file of it stays."""
    session.forget_vector(_text(body, "name", plans.MAX_NAME_CHARS))
    yield {"event": "vectors", "vectors": sorted(session.vectors)}


def share(session: PlaySession, body: dict[str, Any]) -> Events:
    """The share file: everything that is set on the page, with the vectors that it names."""
    plan = parse_plan(body.get("plan"))
    names = [item.name for item in plan.items if isinstance(item, VectorItem)]
    vectors = {name: encode_vector(session.vector(name)) for name in dict.fromkeys(names)}
    shared = {
        "kind": SHARE_KIND,
        "version": SHARE_VERSION,
        "model": session.model_name,
        "plan": plan.as_json(),
        "vectors": vectors,
    }
    yield {"event": "share", "share": shared}


def open_share(session: PlaySession, body: dict[str, Any]) -> Events:
    """Open a share file, which is checked like everything else. Nothing in it is run."""
    shared = body.get("share")
    if not isinstance(shared, Mapping) or shared.get("kind") != SHARE_KIND:
        raise DataError(f"{describe_value(shared)}", "a share file of fgsteer play", "choose another file")
    if shared.get("version") != SHARE_VERSION:
        raise DataError(f"a share file of version {describe_value(shared.get('version'))}", f"version {SHARE_VERSION}")
    plan, vectors = parse_plan(shared.get("plan")), shared.get("vectors", {})
    if not isinstance(vectors, Mapping):
        raise DataError(describe_value(vectors), "vectors by name in a share file")
    names: dict[str, str] = {}
    for name, content in vectors.items():
        if not isinstance(content, str):
            raise DataError(describe_value(content), "a vector's file in base64")
        names[name] = session.take_vector(name, decode_vector(content, MAX_VECTOR_CHARS), save=False)
    items = (
        replace(item, name=names.get(item.name, item.name)) if isinstance(item, VectorItem) else item
        for item in plan.items
    )
    plan = replace(plan, items=tuple(items))
    _check_known(session, plan)
    model = shared.get("model")
    other = "" if model == session.model_name else f"It was made with the model {model!r:.80}."
    yield {"event": "opened", "plan": plan.as_json(), "note": other, "vectors": sorted(session.vectors)}


def _check_known(session: PlaySession, plan: Plan) -> None:
    """Raises DataError, SelectionError for what a plan names and the session does not have."""
    for item in plan.items:
        if isinstance(item, VectorItem):
            session.vector(item.name)
        elif not isinstance(item, ContrastItem):
            session.sae(item.sae).direction(item.feature)  # type: ignore[attr-defined]
        if item.gate is not None:
            session.sae(item.gate.sae).direction(item.gate.feature)


def page(session: PlaySession, body: dict[str, Any]) -> Events:
    """The comparison of a run as one HTML page."""
    yield _file("comparison.html", report_page(_report(session, body)).encode("utf-8", "replace"))


def _report(session: PlaySession, body: dict[str, Any]) -> Report:
    def missing() -> Report:
        raise DataError("a run that is not kept any more", "one of the last runs", "write the texts anew")

    return session.kept("run", body.get("run") if isinstance(body.get("run"), int) else 0, missing)


def _file(name: str, content: bytes) -> Event:
    return {"event": "file", "name": name, "content": base64.b64encode(content).decode()}


def _whole(body: dict[str, Any], name: str) -> int:
    """A whole number of a request. Raises DataError for anything else."""
    value = body.get(name)
    if not is_whole_number(value):
        raise DataError(f"{describe_value(value)} as {name}", "a whole number")
    return int(value)


def _text(body: dict[str, Any], name: str, most: int) -> str:
    """A text of a request. Raises DataError for what is none, or is too long."""
    value = body.get(name)
    if not isinstance(value, str) or len(value) > most:
        got = f"{len(value):,} characters" if isinstance(value, str) else describe_value(value)
        raise DataError(f"{got} as {name}", f"a text of at most {most:,} characters", "shorten it")
    return value


ACTIONS: dict[str, Action] = {
    "about": about,
    "search": search,
    "card": card,
    "contrast": contrast,
    "strength": strength,
    "cost": cost,
    "write": write,
    "judge": judge,
    "code": code,
    "steering": steering_file,
    "save-vector": vector_file,
    "add-vector": add_vector,
    "forget-vector": forget_vector,
    "share": share,
    "open": open_share,
    "page": page,
}
