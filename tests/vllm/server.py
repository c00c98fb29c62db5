"""``fgsteer serve`` as a process on the loopback, and what its clients send."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fgsteer as fg
from fgsteer.serving import save_clamp
from tests.vllm.cases import TOKENS, Continuation, ids, served

START_SECONDS = 600
KEY, ADMIN = "secret", "admin"


def call(
    url: str, body: Any = None, method: str | None = None, key: str = KEY, seconds: float = 300
) -> tuple[int, Any]:
    """(status, JSON) of a request; the status of a connection that the server closed is 0."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    request = urllib.request.Request(url, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            content, status = response.read(), response.status
    except urllib.error.HTTPError as error:
        content, status = error.read(), error.code
    try:
        return status, json.loads(content or b"null")
    except ValueError:
        return status, content.decode(errors="replace")


def save_served(folder: Path) -> Path:
    """The vectors of the cases as files."""
    folder.mkdir(exist_ok=True)
    for name, item in served().items():
        path = folder / f"{name}.safetensors"
        if isinstance(item, fg.SteeringVector):
            item.save(path)
        elif isinstance(item, fg.ClampFeature):
            save_clamp(item, path)
        else:
            fg.save_steering(path, item)
    return folder


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """(address, process) of a server with the vectors of a folder, with a key for completions and one for vectors."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "fgsteer"), "serve", "default", "--vectors", str(folder)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--api-key",
        KEY,
        "--admin-key",
        ADMIN,
        "--dtype",
        "float32",
    ]
    command += [
        "--sae",
        "default",
        "--vectors-per-request",
        "3",
        "--inline-vectors",
        "--max-num-seqs",
        "32",
        "--kv-cache-memory-bytes",
        str(64 << 20),
        *options,
    ]
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
        yield address, server
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def completion(prompt: str, extra: Any, tokens: int = TOKENS, **more: Any) -> dict[str, Any]:
    """The body of a greedy request with log-probabilities."""
    body = {"model": "default", "prompt": list(ids(prompt)), "max_tokens": tokens, "temperature": 0}
    return body | {"ignore_eos": True, "logprobs": 0, "return_token_ids": True, "vllm_xargs": extra or None} | more


def complete(url: str, prompt: str, extra: Any, tokens: int = TOKENS) -> Continuation:
    status, reply = call(f"{url}/v1/completions", completion(prompt, extra, tokens))
    assert status == 200, reply
    choice = reply["choices"][0]
    return Continuation(choice["token_ids"], choice["logprobs"]["token_logprobs"])
