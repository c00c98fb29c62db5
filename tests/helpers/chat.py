"""A chat endpoint on the loopback that answers as it is told to, misbehaves included, and notes what it saw."""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread


@dataclass
class Reply:
    """What to send: ``content`` of a chat completion, or a raw ``body``, after ``delay`` seconds.

    ``drop`` closes the connection without a byte, ``cut`` after half of the body. ``raw``: pieces of bytes to send
    instead of all that, from the status line on; ``sent`` counts them.
    """

    content: str | None = '{"score": 7}'
    status: int = 200
    body: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    cut: bool = False
    raw: Iterable[bytes] | None = None
    sent: int = 0

    @property
    def data(self) -> bytes:
        completion = {"choices": [{"message": {"role": "assistant", "content": self.content}}]}
        return (json.dumps(completion) if self.body is None else self.body).encode()


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_):  # a client that gave up is part of the test
        pass


class Chat:
    """``reply(text, n)``: the Reply to the n-th request (from 1) about the text in its last line.

    ``requests``: (time, path, headers, body, text) of each; ``most_open``: the most that were open at a time.
    """

    def __init__(self, reply, host="127.0.0.1"):
        self.requests, self.most_open = [], 0
        seen, lock, chat = Counter(), Lock(), self
        self.open = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                text = json.loads(prompt.rpartition("\n")[2])["text"]
                with lock:
                    seen[text] += 1
                    number = seen[text]
                    chat.requests.append((time.monotonic(), self.path, dict(self.headers), body, text))
                    chat.open += 1
                    chat.most_open = max(chat.most_open, chat.open)
                try:
                    answer = reply(text, number)
                    time.sleep(answer.delay)
                finally:  # before a byte goes out: with the last one the client may open its next
                    with lock:
                        chat.open -= 1
                self.send(answer)

            def send(self, reply):
                if reply.drop:
                    self.close_connection = True
                    return
                if reply.raw is not None:
                    self.close_connection = True
                    for piece in reply.raw:
                        self.wfile.write(piece)
                        reply.sent += len(piece)
                    return
                data = reply.data
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if reply.cut else data)

            def do_GET(self):
                chat.requests.append((time.monotonic(), self.path, dict(self.headers), None, None))
                self.send(Reply())

            def log_message(self, *_):
                pass

        six = ":" in host
        server = type("Server", (Server,), {"address_family": socket.AF_INET6 if six else socket.AF_INET})
        self.server = server((host, 0), Handler)
        self.url = f"http://{f'[{host}]' if six else host}:{self.server.server_port}/v1"

    def __enter__(self):
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
