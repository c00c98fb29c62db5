"""``fgsteer serve`` over HTTP on the loopback: compiled, all cases at once, vectors coming and going, strangers."""

from __future__ import annotations

import json
import random
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

import fgsteer as fg
from fgsteer.play.plan import Plan
from fgsteer.play.served import SteeringServer
from fgsteer.serving import steering
from tests.vllm import hostile
from tests.vllm.cases import PROMPTS, cases, check, continue_with_hooks, model, served
from tests.vllm.server import ADMIN, KEY, call, complete, completion, save_served, serving
from tests.vllm.soak import Soak

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = save_served(tmp_path_factory.mktemp("vectors"))
    template = folder.parent / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    options = ("--enable-scale-out", "--chat-template", str(template))
    with serving(folder, folder.parent / "server.log", *options) as (address, _):
        yield address


def test_a_soak_in_short(url, tmp_path):
    """That it runs, and that it would tell of steering that is lost."""
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    soak, broken = Soak(url, tmp_path / "good"), Soak(url, tmp_path / "bad", unsteered=True)
    soak.run(20, 8)
    assert (soak.wrong, soak.broken) == ([], [])
    assert {kind.partition(":")[0] for kind in soak.counts} >= {"honest", "uploaded", "hostile request", "hostile file"}
    broken.run(5, 8)
    assert broken.wrong


def test_mixed_requests_at_once(url):
    with ThreadPoolExecutor(len(cases())) as pool:
        check(list(pool.map(lambda case: complete(url, case.prompt, case.extra), cases())))


def test_a_request_that_cannot_be_is_the_clients_error(url):
    for extra in (
        {"steer": "nothing"},
        {"steer": "middle", "steer_scope": "some"},
        {"steer": "last", "steer_op": "affine"},
    ):
        body = {"model": "default", "prompt": "The next day", "max_tokens": 4, "vllm_xargs": extra}
        status, reply = call(f"{url}/v1/completions", body)
        assert status == 400, reply
    assert "one of" in reply["error"]["message"] or "reference" in reply["error"]["message"]
    assert complete(url, PROMPTS[1], {}, 4).tokens == continue_with_hooks(PROMPTS[1], None, 4).tokens


def test_vectors_come_and_go(url, tmp_path):
    vector = served()["middle"] * -1.0
    vector.save(tmp_path / "v.safetensors")
    content = (tmp_path / "v.safetensors").read_bytes()
    for wrong in ("wrong", "secret"):  # the key of completions is not the admin's
        assert call(f"{url}/v1/steering", key=wrong)[0] == 401
        assert call(f"{url}/v1/steering/new", content, "PUT", key=wrong)[0] == 401
    status, told = call(f"{url}/v1/steering/new", content, "PUT", key=ADMIN)
    assert (status, told["loaded"]["new"]) == (200, "blocks.2.hook_resid_post")
    found = complete(url, PROMPTS[0], steering("new", scale=1.0), 8).tokens
    assert found == continue_with_hooks(PROMPTS[0], vector.add(1.0), 8).tokens
    status, told = call(f"{url}/v1/steering/bad", b"nonsense", "PUT", key=ADMIN)
    assert (status, "/tmp" in told["error"]["message"]) == (400, False)
    for name in ("%2e%2e", "a%0ab", "a%2fb", "%E2%80%AEevol", "x" * 65):
        assert call(f"{url}/v1/steering/{name}", content, "PUT", key=ADMIN)[0] == 400
    assert call(f"{url}/v1/steering/new", method="DELETE", key=ADMIN)[0] == 200
    assert call(f"{url}/v1/steering/new", method="DELETE", key=ADMIN)[0] == 400
    assert sorted(call(f"{url}/v1/steering", key=ADMIN)[1]["loaded"]) == sorted(served())


def test_requests_carry_their_vectors(url):
    """Equal ones and others at once, more of them than there are rows, and one that streams."""
    vectors = [served()["middle"] * scale for scale in (1.0, -1.0, 1.5)]
    wanted = [continue_with_hooks(PROMPTS[0], vector.add(1.0), 8).tokens for vector in vectors]
    with ThreadPoolExecutor(9) as pool:
        found = list(pool.map(lambda vector: complete(url, PROMPTS[0], steering(vector), 8).tokens, vectors * 3))
    assert found == wanted * 3
    for number in range(40):
        complete(url, PROMPTS[0], steering(served()["first"] * (1 + number / 10)), 1)
    status, reply = call(f"{url}/v1/completions", completion(PROMPTS[0], steering(vectors[1]), 8, stream=True))
    assert status == 200
    assert re.search(r"^data: \[DONE\]", reply, re.M)
    good = steering(vectors[0])["steer_vector"]
    for bad in ("", "nonsense", good[:-8], good * 20):
        status, reply = call(f"{url}/v1/completions", completion(PROMPTS[0], {"steer_vector": bad}, 4))
        assert (status, "/tmp" in str(reply)) == (400, False)
    assert sorted(call(f"{url}/v1/steering", key=ADMIN)[1]["loaded"]) == sorted(served())


def test_a_body_beyond_any_vector_is_refused_before_it_is_sent(url):
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port)) as wire:
        head = f"PUT /v1/steering/big HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n"
        wire.sendall(f"{head}Content-Length: {1 << 30}\r\n\r\n".encode())
        assert wire.recv(1 << 16).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/v1/completions", {"use_beam_search": True, "n": 2, "vllm_xargs": steering("middle")}),
        ("/v1/completions", {"use_beam_search": 1, "n": 2, "vllm_xargs": steering("middle")}),
        ("/v1/completions", {"use_beam_search": True, "vllm_xargs": {"steer": "nothing"}}),
        ("/v1/completions", {"stream": True, "vllm_xargs": {"steer": "nothing"}}),
        ("/v1/completions", {"steer": "middle"}),
        ("/v1/completions", {"extra_body": {"vllm_xargs": steering("middle")}}),
        ("/v1/completions", {"vllm_xargs": {"steer": "middle", "steer_op": ["add"]}}),
        ("/v1/completions", {"vllm_xargs": {"steer": ["middle"]}}),
        ("/v1/completions", {"vllm_xargs": {"steer": "[]"}}),
        ("/v1/completions", {"vllm_xargs": {"steer": '[{"name": "middle"}, {"name": "nothing"}]'}}),
        ("/v1/completions", {"vllm_xargs": steering([{"name": "middle"}] * 4)}),
        ("/v1/completions", {"use_beam_search": True, "vllm_xargs": {"steer_vector": "nonsense"}}),
        ("/tokenize", {"vllm_xargs": {"steer_vector": "nonsense"}}),
        ("/v1/completions", {"vllm_xargs": {"steer": "middle", "steer_scale": 1e39}}),
        ("/v1/completions", {"n": 2, "temperature": 1.0, "vllm_xargs": {"steer": "middle", "steer_scale": 1e39}}),
        ("/v1/chat/completions", {"use_beam_search": True, "n": 2, "vllm_xargs": steering("middle")}),
        ("/v1/chat/completions", {"vllm_xargs": {"steer": "nothing"}}),
        ("/v1/chat/completions", {"stream": True, "vllm_xargs": {"steer": "nothing"}}),
        ("/v1/responses", {"input": "hello", "max_output_tokens": 4, "vllm_xargs": {"steer": "nothing"}}),
        ("/tokenize", {"vllm_xargs": steering("middle")}),
        ("/inference/v1/generate", {"sampling_params": {"max_tokens": 2, "extra_args": {"steer": "nothing"}}}),
    ],
    ids=str,
)
def test_what_asks_for_steering_is_steered_or_refused(url, path, more):
    body = completion(PROMPTS[0], None, 4)
    body.pop("logprobs")
    if "chat" in path:
        body |= {"messages": [{"role": "user", "content": "hello"}]}
    if "inference" in path:
        body = {"token_ids": body["prompt"]}
    status, reply = call(f"{url}{path}", body | more)
    assert status == 400, reply
    assert complete(url, PROMPTS[0], {}, 4).tokens == continue_with_hooks(PROMPTS[0], None, 4).tokens


def test_other_ways_in_are_steered(url):
    case = next(c for c in cases() if c.label == "add")
    wanted = continue_with_hooks(case.prompt, case.item, 8).tokens
    body = completion(case.prompt, None)
    params = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, "extra_args": case.extra}
    status, reply = call(f"{url}/inference/v1/generate", {"token_ids": body["prompt"], "sampling_params": params})
    assert (status, reply["choices"][0]["token_ids"]) == (200, wanted)
    several = completion(case.prompt, case.extra, 8) | {"prompt": [body["prompt"]] * 3}
    status, reply = call(f"{url}/v1/completions", several)
    assert [choice["token_ids"] for choice in reply["choices"]] == [wanted] * 3
    several_texts = [choice["text"] for choice in reply["choices"]]
    status, reply = call(f"{url}/v1/completions", completion(case.prompt, case.extra, 8, stream=True))
    *pieces, end = re.findall(r"^data: (.*)$", reply, re.M)  # a slow reader may get several tokens in one piece
    assert (status, end) == (200, "[DONE]")
    assert "".join(json.loads(piece)["choices"][0]["text"] for piece in pieces) == several_texts[0]


def test_chat_and_responses_are_steered(url):
    """As a completion of the same tokens is."""
    case = next(c for c in cases() if c.label == "add")
    body = completion("", case.extra, 8)
    body |= {"messages": [{"role": "user", "content": case.prompt}], "max_tokens": 8, "logprobs": True}
    status, reply = call(f"{url}/v1/chat/completions", {key: body[key] for key in body if key != "prompt"})
    assert status == 200, reply
    same = completion(case.prompt, case.extra, 8) | {"prompt": reply["prompt_token_ids"]}
    status, told = call(f"{url}/v1/completions", same)
    assert reply["choices"][0]["token_ids"] == told["choices"][0]["token_ids"]
    assert (
        told["choices"][0]["token_ids"]
        != call(f"{url}/v1/completions", same | {"vllm_xargs": None})[1]["choices"][0]["token_ids"]
    )
    texts = []
    for extra in (case.extra, None):
        asked = {"input": case.prompt, "max_output_tokens": 8, "temperature": 0, "vllm_xargs": extra}
        status, reply = call(f"{url}/v1/responses", asked | {"model": "default"})
        assert status == 200, reply
        texts.append(reply["output"][0]["content"][0]["text"])
    assert texts[0].strip() == told["choices"][0]["text"].strip() != texts[1].strip()


@pytest.mark.parametrize("label", ["add", "generated", "a file of several", "gated"])
def test_a_trace_is_that_of_the_library(url, label):
    case = next(c for c in cases() if c.label == label)
    asked = {"prompt": case.prompt, "max_tokens": 12, "vllm_xargs": case.extra}
    status, answer = call(f"{url}/v1/steering/trace", asked)
    assert status == 200, answer
    found = fg.Trace.from_dict(answer)
    expected = fg.trace(*model(), case.prompt, case.item, max_new_tokens=12, do_sample=False).texts[0]
    (text,) = found.texts
    assert [token.id for token in text.tokens] == [token.id for token in expected.tokens]
    assert [token.text for token in text.tokens] == [token.text for token in expected.tokens]
    assert (text.completion, text.prompt_tokens) == (expected.completion, expected.prompt_tokens)
    for ours, theirs in zip(text.tokens[1:], expected.tokens[1:], strict=True):
        for name in ("before", "after"):
            # as ``check``: float32's rounding over 5 layers, in kernels of other sums
            assert abs(getattr(ours, f"log_probability_{name}") - getattr(theirs, f"log_probability_{name}")) < 2e-4
            likely, likely_too = getattr(ours, f"top_{name}"), getattr(theirs, f"top_{name}")
            for one, other in zip(likely, likely_too, strict=True):  # ranks of near ties may change, not their values
                assert abs(one.log_probability - other.log_probability) < 2e-4
            assert likely[0].text == likely_too[0].text
    assert abs(text.log_ratio - expected.log_ratio) < len(text.written) * 4e-4 < abs(text.log_ratio)
    assert "<table>" in found.page()


def test_what_makes_no_trace_is_refused_and_a_client_that_leaves_ends_its_own(url):
    good = {"prompt": PROMPTS[0], "max_tokens": 200, "vllm_xargs": steering("middle")}
    for change, word in (
        ({"vllm_xargs": {"steer": "nothing"}}, "one of"),
        ({"vllm_xargs": {"steer": "middle", "steer_scale": 1e39}}, "overflow"),
        ({"vllm_xargs": None}, "steer keys"),
        ({"max_tokens": 1000}, "tokens"),
        ({"prompt": [10**6]}, "token id"),
        ({"logprobs": 5}, "keys among"),
    ):
        status, told = call(f"{url}/v1/steering/trace", good | change)
        assert (status, word in told["error"]["message"]) == (400, True), told
    assert call(f"{url}/v1/steering/trace", good, key="wrong")[0] == 401
    where, body = urlsplit(url), json.dumps(good).encode()
    head = f"POST /v1/steering/trace HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    for _ in range(4):
        with socket.create_connection((where.hostname, where.port)) as wire:
            wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            time.sleep(0.2)
    for _ in range(50):
        status, told = call(f"{url}/v1/steering/trace", good | {"max_tokens": 4})
        if status == 200:
            break
        time.sleep(0.1)
    assert status == 200, told
    carried = good | {"max_tokens": 4, "vllm_xargs": steering(served()["middle"])}
    assert call(f"{url}/v1/steering/trace", carried)[1]["texts"] == told["texts"]


def test_the_page_of_play_is_written_by_the_server(url):
    server, item = SteeringServer(url, ADMIN), served()["middle"].add(1.0)
    for temperature, seed in ((0.0, 0), (0.8, 3)):
        plan = Plan(prompt=PROMPTS[1], max_new_tokens=12, temperature=temperature)
        texts = [[text for text, _ in server.pieces(plan, entry, seed)][-1] for entry in ([item], [])]
        body = {"model": "default", "prompt": plan.prompt, "max_tokens": 12, "temperature": temperature, "seed": seed}
        asked = [body | {"vllm_xargs": steering("middle")}, body]
        told = [call(f"{url}/v1/completions", one)[1]["choices"][0]["text"] for one in asked]
        assert texts == told
        assert texts[0] != texts[1]
    chat = Plan(prompt=PROMPTS[1], chat=True, max_new_tokens=8)
    assert [text for text, _ in server.pieces(chat, [item], 0)][-1]
    with pytest.raises(fg.FgsteerError, match="401"):
        list(SteeringServer(url, "wrong").pieces(plan, [item], 0))
    with pytest.raises(fg.FgsteerError, match="layer 1"):  # at which this server has no table
        list(server.pieces(plan, [fg.SteeringVector(item.direction, fg.Hookpoint(1)).add(1.0)], 0))


def test_no_accepted_request_changes_an_unsteered_one(url, tmp_path):
    """Files and requests of any size, then unsteered ones: tokens and log-probabilities as before, to the bit."""
    before = [complete(url, prompt, {}) for prompt in PROMPTS]
    rng, counts = random.Random(0), {}
    for path in hostile.files(tmp_path / "hostile"):
        status, _ = call(f"{url}/v1/steering/{path.name}", path.read_bytes(), "PUT", key=ADMIN)
        assert status in (200, 400)
        names = tuple(served()) + ((path.name,) if status == 200 else ())
        for _ in range(6):
            body = completion(rng.choice(PROMPTS), hostile.extra(rng, names), 8)
            status, _ = call(f"{url}/v1/completions", body)
            counts[status] = counts.get(status, 0) + 1
        if path.name in names:
            assert call(f"{url}/v1/steering/{path.name}", method="DELETE", key=ADMIN)[0] == 200
    assert set(counts) == {200, 400}
    for _ in range(3):
        assert [complete(url, prompt, {}) for prompt in PROMPTS] == before
    test_mixed_requests_at_once(url)
