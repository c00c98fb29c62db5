"""Traces of a server against those of the library: a stand-in for vLLM's client answers with a tiny model's numbers."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import fgsteer as fg
from fgsteer.serving import http, tracing
from fgsteer.serving.control import Control
from fgsteer.serving.http import Access, StartedServer, SteeringMiddleware, trace_bytes, upload_bytes
from fgsteer.serving.request import steering
from fgsteer.serving.tracing import MAX_TRACED_CHARS, MAX_TRACED_TOKENS, parse_trace_request
from fgsteer.traces.passes import run_text
from fgsteer.traces.tokens import Row
from tests.helpers.engine import WIDTH, FakeEngine
from tests.helpers.engine import vector as engine_vector
from tests.helpers.pages import Checker
from tests.helpers.steering import vector

OPEN = Access()
PROMPT, NEW = "a dog sat on the bread", 6
SCRIPT = "</span><script>alert(1)</script>"


class ClientError(Exception):
    """As vLLM's, which a client has caused."""


class FakeClient:
    """As much of an ``AsyncLLM`` as a trace needs; it answers with the log-probabilities of a model in transformers."""

    def __init__(self, model, tokenizer, by_name):
        self.model, self.tokenizer, self.by_name = model, tokenizer, by_name
        config = SimpleNamespace(max_model_len=64, served_model_name="tiny", logprobs_mode="raw_logprobs",
                                 get_vocab_size=lambda: model.config.vocab_size)  # fmt: skip
        self.vllm_config = SimpleNamespace(model_config=config)
        self.asked, self.aborted, self.wait, self.refusal = [], [], 0.0, ""

    def get_tokenizer(self):
        return self.tokenizer

    async def generate(self, prompt, params, number):
        ids, extra = list(prompt["prompt_token_ids"]), params.extra_args
        assert params.output_kind == "the last alone"  # each of the others would hold all log-probabilities again
        self.asked.append((len(ids), params, number))
        if self.refusal:
            raise ClientError(self.refusal)
        items = [self.by_name[extra["steer"]].add(extra["steer_scale"], scope=extra["steer_scope"])] if extra else []
        try:
            await asyncio.sleep(self.wait)
        except asyncio.CancelledError:
            self.aborted.append(number)
            raise
        with fg.steer(self.model, items or None), torch.no_grad():
            out = self.model.generate(torch.tensor([ids]), max_new_tokens=params.max_tokens, do_sample=False)[
                0
            ].tolist()
        logits = run_text(self.model, Row(0, "given", out, len(ids), ""), items, None).logits
        places = [None, *(self._logprobs(row, out[n + 1]) for n, row in enumerate(logits[:-1]))]
        written = SimpleNamespace(token_ids=out[len(ids) :], logprobs=places[len(ids) :], text="")
        yield SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=places[: len(ids)], outputs=[written])

    @staticmethod
    def _logprobs(row, token):
        """The likeliest tokens and the token itself, in the order of vLLM: the token first."""
        values = row.double().log_softmax(-1)
        ids = dict.fromkeys([token, *values.topk(5).indices.tolist()])
        return {n: SimpleNamespace(logprob=float(values[n]), rank=None, decoded_token=None) for n in ids}


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    monkeypatch.setitem(sys.modules, "vllm.exceptions", SimpleNamespace(VLLMClientError=ClientError))
    kinds = SimpleNamespace(FINAL_ONLY="the last alone")
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", SimpleNamespace(RequestOutputKind=kinds))


@pytest.fixture
def client(llama, tokenizer):
    return FakeClient(llama, tokenizer, {"love": vector()})


def door_of(client, inline=False, access=OPEN):
    """The middleware of a server that has the vector "love"."""
    control = Control(FakeEngine([1]), [1], inline=inline)
    control.load("love", engine_vector())
    started = StartedServer(control, access, upload_bytes(4, WIDTH), client)

    async def app(scope, receive, send):
        raise AssertionError("a trace is answered before vLLM's app")

    return SteeringMiddleware(app, lambda: started)


async def ask(door, body, method="POST", path="/v1/steering/trace", leaves=None, headers=()):
    """(status, JSON) of a request by a client that stays, or leaves after some seconds."""
    scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": list(headers)}
    pieces, sent = [body if isinstance(body, bytes) else json.dumps(body).encode()], []

    async def receive():
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": False}
        await asyncio.sleep(3600 if leaves is None else leaves)
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    await door(scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def asked(**more):
    extra = steering("love", scale=0.6, scope="generated")
    return {"prompt": PROMPT, "max_tokens": NEW, "vllm_xargs": extra, **more}


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("scope", ["all", "generated"])
def test_a_served_trace_is_that_of_the_library(client, llama, tokenizer, scope, as_ids):
    prompt = tokenizer(PROMPT)["input_ids"] if as_ids else PROMPT
    body = asked(prompt=prompt, vllm_xargs=steering("love", scale=0.6, scope=scope))
    status, answer = asyncio.run(ask(door_of(client), body))
    assert status == 200
    found = fg.Trace.from_dict(answer)
    expected = fg.trace(llama, tokenizer, [PROMPT], vector().add(0.6, scope=scope), max_new_tokens=NEW, do_sample=False)
    text, own = found.texts[0], expected.texts[0]
    assert own.source == "steered"
    assert (text.completion, text.prompt_tokens, len(text.tokens)) == (
        own.completion,
        own.prompt_tokens,
        len(own.tokens),
    )
    for token, same in zip(text.tokens, own.tokens, strict=True):
        assert (token.id, token.text, token.kind) == (same.id, same.text, same.kind)
        for name in ("log_probability_before", "log_probability_after"):
            # the same passes of the same model, in the same order of sums
            assert getattr(token, name) == pytest.approx(getattr(same, name), abs=1e-6)
        for name in ("top_before", "top_after"):
            ours, theirs = getattr(token, name), getattr(same, name)
            assert [(one.id, one.text) for one in ours] == [(one.id, one.text) for one in theirs]
            logs = [one.log_probability for one in theirs]
            assert [one.log_probability for one in ours] == pytest.approx(logs, abs=1e-6)
        assert token.kl_steered_unsteered is None
    assert text.log_ratio == pytest.approx(own.log_ratio, abs=1e-5)
    assert text.log_ratio != 0
    (row,) = found.interventions
    assert (row.kind, row.hookpoint, row.scope, row.gate) == ("add", "blocks.1.hook_resid_post", scope, "")
    assert found.settings["model"] == "tiny"
    assert "fg.trace" in found.settings["left out"]
    (first, steered, one), (second, plain, other) = client.asked
    assert (steered.max_tokens, plain.max_tokens, plain.extra_args, second - first) == (NEW, 1, {}, NEW)
    assert one != other


def test_a_page_of_a_served_trace_shows_what_is_known(client, tmp_path):
    _, answer = asyncio.run(ask(door_of(client), asked()))
    found = fg.Trace.from_dict(answer)
    found.write(tmp_path / "trace.html")
    page = (tmp_path / "trace.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert 'id="view-likelier" checked' in page
    assert not any(f'id="view-{name}"' in page for name in ("kl", "dose", "gate"))
    assert not re.search(r"KL\(steered|\bnan\b", page)
    assert "log p after − log p before in all" in page
    assert "dose" not in str(found)
    found.write(tmp_path / "trace.json")
    assert fg.Trace.from_dict(json.loads((tmp_path / "trace.json").read_text())).as_dict() == answer
    hostile = {**answer, "prompts": [SCRIPT], "settings": {SCRIPT: SCRIPT}}
    hostile["texts"][0]["tokens"][1]["text"] = SCRIPT
    assert "<script" not in fg.Trace.from_dict(hostile).page()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "JSON"),
        (b"\xff", "JSON"),
        (b"[" * 200, "JSON"),
        (b"[]", "JSON"),
        (asked(prompt=""), "prompt"),
        (asked(prompt="a" * (MAX_TRACED_CHARS + 1)), "characters"),
        (asked(prompt=[3] * (MAX_TRACED_TOKENS + 1)), "prompt"),
        (asked(prompt=[3, -1]), "token id"),
        (asked(prompt=[True]), "prompt"),
        (asked(prompt=[10**9]), "token id"),
        (asked(prompt=None), "prompt"),
        (asked(max_tokens=0), "max_tokens"),
        (asked(max_tokens=MAX_TRACED_TOKENS + 1), "max_tokens"),
        (asked(max_tokens=60), "at most 63 tokens"),
        (asked(max_tokens="8"), "max_tokens"),
        (asked(temperature=float("nan")), "temperature"),
        (asked(temperature=-1), "temperature"),
        (asked(temperature=10**400), "temperature"),
        (asked(seed=1.5), "seed"),
        (asked(seed=-1), "seed"),
        (asked(features=[3]), "features"),
        (asked(stream=True), "stream"),
        (asked(vllm_xargs=None), "vllm_xargs"),
        (asked(vllm_xargs={}), "vllm_xargs"),
        (asked(vllm_xargs={"steer": "hate"}), "one of love"),
        (asked(vllm_xargs={"steer": "love", "steer_scale": "x"}), "steer_scale"),
        (asked(vllm_xargs={"steer_vector": "x"}), "--inline-vectors"),
    ],
    ids=lambda value: str(value)[:48],
)
def test_what_makes_no_trace_is_the_clients_error(client, body, says):
    status, told = asyncio.run(ask(door_of(client), body))
    assert (status, told["error"]["type"], told["error"]["code"]) == (400, "BadRequestError", 400)
    assert says in told["error"]["message"]
    assert told["error"]["message"].isprintable()
    assert client.asked == []


def test_a_prompt_of_no_tokens_is_the_clients_error(client):
    client.tokenizer = SimpleNamespace(encode=lambda text: [])
    status, told = asyncio.run(ask(door_of(client), asked(prompt="\u200b")))
    assert (status, "no tokens" in told["error"]["message"]) == (400, True)
    assert client.asked == []


def test_what_the_engine_refuses_is_the_clients_error(client):
    client.refusal = "Activations would overflow."
    status, told = asyncio.run(ask(door_of(client), asked()))
    assert (status, told["error"]["message"]) == (400, "Activations would overflow.")
    client.vllm_config.model_config.logprobs_mode = "processed_logits"
    status, told = asyncio.run(ask(door_of(client), asked()))
    assert (status, "--logprobs-mode" in told["error"]["message"]) == (400, True)


def test_the_body_of_a_request_is_bounded(client):
    most = trace_bytes(WIDTH)
    assert most > 12 * MAX_TRACED_CHARS, "each character may be two escapes"
    door = door_of(client)
    assert asyncio.run(ask(door, b" " * (most + 1)))[0] == 413
    assert asyncio.run(ask(door, b"x", headers=[(b"content-length", str(most + 1).encode())]))[0] == 413
    assert asyncio.run(ask(door, asked(prompt="\U0001f30a" * MAX_TRACED_CHARS)))[0] == 200  # one word of this tokenizer


def test_few_traces_at_once_and_each_gives_its_place_back(client):
    client.wait, door = 0.05, door_of(client)

    async def many():
        return await asyncio.gather(*(ask(door, asked()) for _ in range(5)))

    statuses = [status for status, _ in asyncio.run(many())]
    assert sorted(statuses) == [200] * http.MAX_TRACES + [503] * (5 - http.MAX_TRACES)
    client.refusal = "no"
    assert asyncio.run(ask(door, asked()))[0] == 400
    client.refusal = ""
    assert [status for status, _ in asyncio.run(many())].count(200) == http.MAX_TRACES


def test_a_client_that_leaves_ends_its_trace(client):
    client.wait, door = 30.0, door_of(client)
    asyncio.run(asyncio.wait_for(ask(door, asked(), leaves=0.05), 10))
    assert [number for _, _, number in client.asked] == client.aborted
    assert len(client.aborted) == 1
    client.wait = 0.0
    assert asyncio.run(ask(door, asked()))[0] == 200
    assert door.traces == 0


def test_a_trace_needs_what_a_completion_needs(client):
    """Who lists and loads has the admin's key; who has the server's key, which vLLM checks before, writes texts."""
    for access in (Access(), Access("admin"), Access("admin", has_server_key=True)):
        assert asyncio.run(ask(door_of(client, access=access), asked()))[0] == 200
    door = door_of(client, access=Access(allow_uploads=True))
    for method in ("GET", "PATCH"):
        assert asyncio.run(ask(door, b"", method))[0] == 405
    assert asyncio.run(ask(door, b"", path="/v1/steering/other"))[0] == 405
    early = SteeringMiddleware(door.app, lambda: None)
    assert asyncio.run(ask(early, asked()))[0] == 503


def test_a_vector_in_a_request_is_kept_until_it_is_answered(client, monkeypatch):
    door = door_of(client, inline=True)
    control, held = door.started().control, []

    async def look(*_):
        held.append([name in control.leases for name in control._by_name if name.startswith("=")])
        return {}

    monkeypatch.setattr(http, "trace_request", look)
    assert asyncio.run(ask(door, asked(vllm_xargs=steering(engine_vector(5), scale=2.0))))[0] == 200
    assert held == [[True]]
    assert not any(name in control.leases for name in control._by_name)


def test_defaults_are_greedy():
    made = parse_trace_request(json.dumps({"prompt": "x", "vllm_xargs": steering("love")}).encode())
    assert (made.max_tokens, made.temperature, made.seed) == (tracing.DEFAULT_NEW_TOKENS, 0.0, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"texts": 3},
        {"texts": [{}]},
        {"prompts": [3]},
        {"prompts": None},
        {"features": [{"id": 1, "label": "x", "mean_before": 0.0, "mean_after": 0.0}]},
        {"texts": [{"prompt": 0, "source": "elsewhere", "completion": "", "prompt_tokens": 0, "tokens": []}]},
        {"interventions": [{"kind": 1}]},
        {"settings": {"deep": json.loads("[" * 400 + "]" * 400)}},
    ],
    ids=lambda change: str(change)[:48],
)
def test_what_is_no_trace_is_refused(llama, tokenizer, change):
    plain = fg.trace(llama, tokenizer, [PROMPT], vector().add(0.5), max_new_tokens=2).as_dict()
    assert fg.Trace.from_dict(plain).as_dict() == plain
    with pytest.raises(fg.FormatError, match="trace"):
        fg.Trace.from_dict({**plain, **change})
    with pytest.raises(fg.FormatError):
        fg.Trace.from_dict(None)
