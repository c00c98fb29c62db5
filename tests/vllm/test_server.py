"""``fgsteer serve`` over HTTP on the loopback: compiled, all cases at once, vectors coming and going."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fgsteer as fg
from fgsteer.serving import save_clamp, steering
from tests.vllm.cases import PROMPTS, TOKENS, Continuation, cases, check, continue_with_hooks, ids, served

pytestmark = pytest.mark.vllm
START_SECONDS = 600


def call(url, body=None, method=None, key="secret"):
    """(status, JSON) of a request."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, json.loads(response.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vectors")
    for name, item in served().items():
        path = folder / f"{name}.safetensors"
        save_clamp(item, path) if isinstance(item, fg.ClampFeature) else item.save(path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "fgsteer"), "serve", "default", "--vectors", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--api-key", "secret", "--dtype", "float32"]
    command += ["--max-num-seqs", "16", "--kv-cache-memory-bytes", str(64 << 20)]
    log = folder.parent / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while True:
            assert server.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline, log.read_text()[-4000:]
            try:
                if call(f"{address}/health")[0] == 200:
                    break
            except OSError:
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def complete(url, prompt, extra, tokens=TOKENS):
    body = {"model": "default", "prompt": list(ids(prompt)), "max_tokens": tokens, "temperature": 0}
    body |= {"ignore_eos": True, "logprobs": 0, "return_token_ids": True, "vllm_xargs": extra or None}
    status, reply = call(f"{url}/v1/completions", body)
    assert status == 200, reply
    choice = reply["choices"][0]
    return Continuation(choice["token_ids"], choice["logprobs"]["token_logprobs"])


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
    assert call(f"{url}/v1/steering", key="wrong")[0] == 401
    assert call(f"{url}/v1/steering/new", content, "PUT", key="wrong")[0] == 401
    status, told = call(f"{url}/v1/steering/new", content, "PUT")
    assert (status, told["loaded"]["new"]) == (200, "blocks.2.hook_resid_post")
    found = complete(url, PROMPTS[0], steering("new", scale=1.0), 8).tokens
    assert found == continue_with_hooks(PROMPTS[0], vector.add(1.0), 8).tokens
    assert call(f"{url}/v1/steering/bad", b"nonsense", "PUT")[0] == 400
    assert call(f"{url}/v1/steering/new", method="DELETE")[0] == 200
    assert call(f"{url}/v1/steering/new", method="DELETE")[0] == 400
    assert sorted(call(f"{url}/v1/steering")[1]["loaded"]) == sorted(served())
