"""A Hugging Face hub on the loopback: it serves a folder of repositories, takes commits, and notes every request."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

TOKEN = "secret"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """``root/{organisation}/{repository}/{path}`` at ``url``; ``requests`` lists (method, path)."""

    def __init__(self, root: Path) -> None:
        self.requests: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                self.answer(body=False)

            def do_GET(self):
                self.answer(body=True)

            def do_POST(self):
                hub.requests.append((self.command, self.path))
                given = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.reply(401, {"error": "a token, please"})
                what = self.path.split("/")
                if self.path == "/api/validate-yaml":
                    return self.reply(200, {"warnings": [], "errors": []})
                if self.path == "/api/repos/create":
                    made = json.loads(given)
                    name = f"{made.get('organization') or 'me'}/{made['name']}"
                    (root / name).mkdir(parents=True, exist_ok=True)
                    return self.reply(200, {"url": f"{hub.url}/{name}"})
                repository = root / what[3] / what[4]
                if what[5] == "preupload":
                    files = [file["path"] for file in json.loads(given)["files"]]
                    plain = {"uploadMode": "regular", "shouldIgnore": False}
                    return self.reply(200, {"files": [{"path": path, **plain} for path in files]})
                for line in given.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        value = entry["value"]
                        (repository / value["path"]).write_bytes(base64.b64decode(value["content"]))
                url = f"{hub.url}/{what[3]}/{what[4]}/commit/{COMMIT}"
                return self.reply(200, {"commitUrl": url, "commitOid": COMMIT})

            def reply(self, status, value):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def answer(self, body):
                hub.requests.append((self.command, self.path))
                repository, _, path = self.path.lstrip("/").partition("/resolve/main/")
                file = root / repository / path
                if not path or not file.is_file():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound")
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = file.read_bytes()
                self.send_response(200)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def run_script(code, url, home, *arguments, offline="0", token=""):
    """Output of a script that knows no hub but the one at ``url``."""
    env = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": offline}
    env |= {
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, env=env,
        cwd=Path(__file__).parents[2], timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
