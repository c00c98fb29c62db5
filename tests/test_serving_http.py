"""The addresses for vectors, and requests that ask for steering and get none, without vLLM."""

from __future__ import annotations

import asyncio
import json
import threading
from types import SimpleNamespace

import pytest

from fgsteer.serving import http
from fgsteer.serving.admission import OUTCOME
from fgsteer.serving.control import Control
from fgsteer.serving.http import Access, StartedServer, SteeringMiddleware, upload_bytes
from fgsteer.serving.request import steering
from fgsteer.serving.server import upload_access
from tests.helpers.engine import WIDTH, FakeEngine, request, vector

OPEN = Access(allow_uploads=True)


class Client:
    """A door around an app, and requests to it over ASGI."""

    def __init__(self, access=OPEN, app=None, rows=4):
        self.engine = FakeEngine([1], rows=rows)
        self.control = Control(self.engine, [1])
        self.started = StartedServer(self.control, access, upload_bytes(rows, WIDTH))
        self.door = SteeringMiddleware(app or self.vllm, lambda: self.started)
        self.seen = []

    async def vllm(self, scope, receive, send):
        """Answer 200 with what came in, after a look at the engine where ``steer`` is in vllm_xargs."""
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if b"steered" in body and (outcome := OUTCOME.get()):
            outcome.admitted = True
        if b"refused" in body and (outcome := OUTCOME.get()):
            outcome.refusal = "Nothing is loaded as 'refused'."
        for piece in (b'{"said": ', b'"text"}'):
            await send({"type": "http.response.body", "body": piece, "more_body": piece[-1:] != b"}"})

    async def ask(self, method, path, body=b"", key=None, headers=(), chunks=1, wait=0.0, gone=False):
        headers = [*headers, *([(b"authorization", f"Bearer {key}".encode())] if key else [])]
        scope = {"type": "http", "method": method, "path": path, "root_path": "", "headers": headers}
        size = -(-len(body) // chunks) or 1
        pieces = [body[i : i + size] for i in range(0, len(body), size)] or [b""]
        sent, came = [], {"read": 0}

        async def receive():
            await asyncio.sleep(wait)
            if not pieces:
                return {"type": "http.disconnect"}
            came["read"] += len(pieces[0])
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces) or gone}

        async def send(message):
            sent.append(message)

        await self.door(scope, receive, send)
        starts = [m["status"] for m in sent if m["type"] == "http.response.start"]
        assert len(starts) == 1
        return starts[0], json.loads(b"".join(m.get("body", b"") for m in sent)), came["read"]

    def __call__(self, *args, **kwargs):
        return asyncio.run(self.ask(*args, **kwargs))


def content(tmp_path, made=None):
    (made or vector()).save(tmp_path / "v")
    return (tmp_path / "v").read_bytes()


def post(path="/v1/completions", **body):
    return "POST", path, json.dumps({"prompt": "x", **body}).encode()


# ---------------------------------------------------------------- vectors come and go


def test_vectors_come_and_go(tmp_path):
    client, good = Client(), content(tmp_path)
    status, told, _ = client("PUT", "/v1/steering/love", good, chunks=7)
    assert (status, told["loaded"]) == (200, {"love": "blocks.1.hook_resid_post"})
    assert client("GET", "/v1/steering")[1] == {"loaded": told["loaded"], "layers": [1]}
    assert client("DELETE", "/v1/steering/love")[:2] == (200, {"loaded": {}, "layers": [1]})
    status, told, _ = client("DELETE", "/v1/steering/love")
    assert (status, told["error"]["code"], told["error"]["type"]) == (400, 400, "BadRequestError")
    for method, path in (("POST", "/v1/steering"), ("PUT", "/v1/steering"), ("GET", "/v1/steering/love")):
        assert client(method, path, b"{}")[0] == 405
    client.started = None
    assert client("GET", "/v1/steering")[0] == 503


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "a\n", "a\x00", "\u202eevol", "a" * 65, "é", "a b"])
def test_other_names_are_refused_before_a_body_is_read(name, tmp_path):
    status, told, read = Client()("PUT", f"/v1/steering/{name}", content(tmp_path))
    assert (status, read) == (400, 0)
    assert told["error"]["message"].isascii()
    assert told["error"]["message"].isprintable()


@pytest.mark.parametrize("bad", [b"", b"nonsense", b"\x10" + bytes(7) + b"{}", b"\xff" * 64])
def test_errors_show_no_path_of_the_server(bad):
    status, told, _ = Client()("PUT", "/v1/steering/love", bad)
    assert status == 400
    assert "the file that was sent" in told["error"]["message"].lower()
    assert not any(part in told["error"]["message"] for part in ("/tmp", ".safetensors", "/var"))


def test_a_body_is_counted_while_it_comes_and_never_held_beyond_the_limit():
    client = Client()
    most = client.started.upload_bytes
    assert most > 8 * 4 * 2 * WIDTH
    status, _, read = client("PUT", "/v1/steering/love", bytes(2 * most), chunks=64)
    assert status == 413
    assert read <= most + 2 * most // 64 + 1
    for length in (str(most + 1), "9" * 500):
        status, _, read = client("PUT", "/v1/steering/love", b"x", headers=[(b"content-length", length.encode())])
        assert (status, read) == (413, 0)
    assert client.door.uploads == 0


def test_a_body_that_is_slow_or_breaks_off_is_refused(monkeypatch):
    monkeypatch.setattr(http, "UPLOAD_SECONDS", 0.2)
    client = Client()
    status, told, _ = client("PUT", "/v1/steering/love", bytes(100), chunks=100, wait=0.02)
    assert status == 408
    assert "0.2 s" in told["error"]["message"]
    status, told, _ = client("PUT", "/v1/steering/love", bytes(10), gone=True)
    assert (status, "is cut off" in told["error"]["message"]) == (400, True)
    assert client.door.uploads == 0


def test_few_uploads_at_once(tmp_path):
    client, good = Client(rows=16), content(tmp_path)

    async def many():
        return await asyncio.gather(*(client.ask("PUT", f"/v1/steering/v{n}", good, wait=0.05) for n in range(12)))

    statuses = [status for status, _, _ in asyncio.run(many())]
    assert statuses.count(200) == http.MAX_UPLOADS
    assert statuses.count(503) == 12 - http.MAX_UPLOADS
    assert client("PUT", "/v1/steering/later", good)[0] == 200  # they end


def test_who_may_upload(tmp_path):
    good = content(tmp_path)
    nobody, keyed, admin = (
        Client(Access()),
        Client(Access(has_server_key=True)),
        Client(Access("se\u00e9cret", has_server_key=True)),
    )
    status, told, read = nobody("PUT", "/v1/steering/love", good)
    assert (status, read) == (403, 0)
    assert "--allow-uploads" in told["error"]["message"]
    assert nobody("DELETE", "/v1/steering/love")[0] == 403
    assert nobody("GET", "/v1/steering")[0] == 200
    assert keyed("PUT", "/v1/steering/love", good)[0] == 200  # vLLM has asked for its key before
    assert Client(OPEN)("PUT", "/v1/steering/love", good)[0] == 200
    for method, path in (("GET", "/v1/steering"), ("PUT", "/v1/steering/love"), ("DELETE", "/v1/steering/love")):
        for wrong in (None, "key", "se", "secret"):
            status, _, read = admin(method, path, good, key=wrong)
            assert (status, read) == (401, 0)
    right = [(b"authorization", b"Basic " + "se\u00e9cret".encode())]
    assert admin("GET", "/v1/steering", headers=right)[0] == 401
    plain = Client(Access("secret"))
    assert plain("PUT", "/v1/steering/love", good, key="secret")[0] == 200
    assert plain("GET", "/v1/steering", key="secret")[0] == 200


def test_the_admins_key_opens_what_the_servers_key_guards(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    args = SimpleNamespace(api_key=None)
    assert upload_access(args, "a", False) == Access("a", False, False)
    assert args.api_key is None  # completions stay open
    args = SimpleNamespace(api_key=["k"])
    assert upload_access(args, "a", False) == Access("a", True, False)
    assert args.api_key == ["k", "a"]
    monkeypatch.setenv("VLLM_API_KEY", "e")
    args = SimpleNamespace(api_key=None)
    assert upload_access(args, "a", True) == Access("a", True, True)
    assert args.api_key == ["e", "a"]
    args = SimpleNamespace(api_key=None)
    assert upload_access(args, None, False) == Access(None, True, False)
    assert args.api_key is None


def test_the_loop_goes_on_while_a_vector_is_loaded(tmp_path, monkeypatch):
    client, good = Client(), content(tmp_path)
    asked, call = threading.Event(), client.engine.call

    def slow(method, *args):
        assert asked.wait(10)
        return call(method, *args)

    monkeypatch.setattr(client.engine, "call", slow)

    async def both():
        upload = asyncio.create_task(client.ask("PUT", "/v1/steering/love", good))
        await asyncio.sleep(0.05)
        listed = await client.ask("GET", "/v1/steering")
        asked.set()
        return listed[0], (await upload)[0]

    assert asyncio.run(both()) == (200, 200)


# ---------------------------------------------------------------- who asks for steering is steered, or told


def test_what_is_not_ours_goes_through_as_it_came():
    client = Client()
    for body in (
        b'{"prompt": "steer the ship"}',
        b"",
        b"not JSON",
        json.dumps({"messages": [{"steer": "x"}]}).encode(),
    ):
        status, told, _ = client("POST", "/v1/chat/completions", body, chunks=3)
        assert (status, told) == (200, {"said": "text"})
        assert client.seen[-1] == body
    assert client("GET", "/health")[0] == 200
    assert client(*post(vllm_xargs={"other": 1}))[0] == 200


def test_what_is_admitted_is_answered():
    for body in ({"vllm_xargs": steering("steered")}, {"sampling_params": {"extra_args": steering("steered")}}):
        status, told, _ = Client()(*post(**body))
        assert (status, told) == (200, {"said": "text"})


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "body",
    [
        {"vllm_xargs": steering("love"), "use_beam_search": True},
        {"vllm_xargs": steering("love"), "use_beam_search": "yes"},
        {"vllm_xargs": {"steer": "love"}},
        {"vllm_xargs": {"steer_scale": 2}},
        {"sampling_params": {"extra_args": {"steer": "love"}}},
        {"steer": "love"},
        {"extra_body": {"steer": "love"}},
        {"extra_body": {"vllm_xargs": {"steer": "love"}}},
    ],
    ids=str,
)
def test_what_asks_and_is_not_steered_is_the_clients_error(body, stream):
    """Whatever path it took: the answer would be unsteered text."""
    client = Client()
    status, told, _ = client(*post(**body, stream=stream))
    assert (status, told["error"]["type"]) == (400, "BadRequestError")
    assert "vllm_xargs" in told["error"]["message"]
    escaped = post(**body)[2].replace(b"steer", b"\\u0073teer")
    for same in (escaped, post(**body)[2].decode().encode("utf-16")):
        assert client("POST", "/v1/completions", same)[0] == 400
    form = b'--x\r\ncontent-disposition: form-data; name="vllm_xargs"\r\n\r\n{"steer": "love"}\r\n--x--'
    assert client("POST", "/v1/audio/transcriptions", form)[0] == 400


def test_a_refusal_says_why_in_a_stream_too():
    status, told, _ = Client()(*post(vllm_xargs={"steer": "refused"}, stream=True))
    assert (status, told["error"]["message"]) == (400, "Nothing is loaded as 'refused'.")


def test_errors_of_the_server_stay():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b'{"error": "no such model"}'})

    status, told, _ = Client(app=app)(*post(vllm_xargs=steering("love")))
    assert (status, told) == (404, {"error": "no such model"})


def test_a_client_that_leaves_before_its_body_is_there():
    seen = []

    async def app(scope, receive, send):
        seen.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 400, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    Client(app=app)("POST", "/v1/completions", b'{"vllm_xargs": {"steer": "x"}', gone=True)
    assert seen == ["http.disconnect"]


def test_other_protocols_pass():
    passed = []

    async def app(scope, receive, send):
        passed.append(scope["type"])

    door = SteeringMiddleware(app, lambda: None)
    for scope in ({"type": "lifespan"}, {"type": "websocket", "path": "/v1/realtime"}):
        asyncio.run(door(scope, None, None))
    assert passed == ["lifespan", "websocket"]


# ---------------------------------------------------------------- vectors that requests carry


class Carrying(Client):
    """A client of a server that takes vectors with requests, which are admitted as vLLM's are."""

    def __init__(self, inline=True):
        super().__init__()
        self.engine.calls_while_admitting = False  # as in a server's event loop
        self.control.inline = inline
        self.held = []

    async def vllm(self, scope, receive, send):
        extra = json.loads((await receive())["body"])["vllm_xargs"]
        made = request(extra)
        self.control.admit(made)
        OUTCOME.get().admitted = True
        self.held.append([name in self.control.leases for name in self.control._by_name])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def test_a_request_carries_its_vector_until_it_is_answered():
    client = Carrying()
    for seed in range(8):  # four rows serve any number of requests, one after the other
        assert client(*post(vllm_xargs=steering(vector(seed), scale=2.0)))[:2] == (200, {})
        assert client.held[-1][-1]
    assert not any(name in client.control.leases for name in client.control._by_name)
    assert client("GET", "/v1/steering")[1] == {"loaded": {}, "layers": [1]}


def test_a_vector_in_a_request_that_cannot_be_is_the_clients_error():
    good, client = steering(vector())["steer_vector"], Carrying()
    for bad in ("", "nonsense", good[:-8], good * 100):
        status, told, _ = client(*post(vllm_xargs={"steer_vector": bad}))
        assert (status, told["error"]["type"]) == (400, "BadRequestError")
        assert "/tmp" not in told["error"]["message"]
    status, told, _ = Carrying(inline=False)(*post(vllm_xargs={"steer_vector": good}))
    assert (status, "--inline-vectors" in told["error"]["message"]) == (400, True)
    assert client(*post(vllm_xargs={"steer_vector": good}, use_beam_search=True))[0] == 400
    assert client.held == []


def test_a_lease_ends_with_a_request_that_breaks_off():
    client = Carrying()

    async def broken(*_):
        raise RuntimeError

    client.door.app = broken
    with pytest.raises(RuntimeError):
        client(*post(vllm_xargs=steering(vector())))
    assert not any(name in client.control.leases for name in client.control._by_name)
    assert len(client.control._by_name) == 1
