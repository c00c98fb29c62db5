"""A served model that writes the texts: a running ``fgsteer serve``, steered request by request.

server = SteeringServer("http://127.0.0.1:8000", key="KEY")
for text, ids in server.pieces(plan, steering, seed): ...
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import tempfile
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fgsteer.errors import DataError, SteeringError
from fgsteer.errors.escaping import redact
from fgsteer.interventions import Intervention
from fgsteer.interventions.files import save_steering
from fgsteer.play.plan import Plan
from fgsteer.serving.request import steering as request_of
from fgsteer.storage.json_files import parse_json

TIMEOUT_SECONDS = 120.0
MAX_ANSWER_BYTES = 2 << 20
MAX_LINE_BYTES = 1 << 16
MAX_REASON_CHARS = 500
MAX_LOADED = 8
"""The most steerings that stay loaded on the server; the oldest is unloaded then."""


@dataclass
class SteeringServer:
    """A running ``fgsteer serve``.

    Args:
        url: Its address, such as http://127.0.0.1:8000.
        key: The key of completions and of loading steering, "" without one.
        model: The name of the model there; the first that the server lists by default.

    Raises:
        DataError: The address is none, or holds a login, a query or a fragment.
    """

    url: str
    key: str = field(default="", repr=False)
    model: str = ""
    _loaded: list[str] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            good = parts.scheme in ("http", "https") and parts.hostname and parts.path in ("", "/") and parts.port != 0
        except ValueError:
            parts, good = urlsplit(""), False
        if not good or parts.username or parts.query or parts.fragment:
            raise DataError(
                "an address that cannot be used", "the address of fgsteer serve, such as http://127.0.0.1:8000"
            )
        if self.key and parts.scheme == "http" and not _is_loopback(str(parts.hostname)):
            raise DataError(
                f"a key for {parts.hostname} over http", "https, or a server on this machine", "a key would be readable"
            )

    def start(self) -> None:
        """Ask for the model's name, unless it is known. Raises SteeringError where the server does not answer."""
        if not self.model:
            listed = parse_json(self._ask("GET", "/v1/models"))
            try:
                self.model = str(listed["data"][0]["id"])
            except (LookupError, TypeError) as error:
                raise SteeringError("a server that lists no model", "a running fgsteer serve") from error

    def pieces(self, plan: Plan, steering: Sequence[Intervention], seed: int) -> Generator[tuple[str, tuple[int, ...]]]:
        """All of one text so far, whenever the server has sent more. Token ids stay with the server.

        Closing it ends the connection, on which the server ends generation.
        """
        self.start()
        body: dict[str, Any] = {"model": self.model, "stream": True, "max_tokens": plan.max_new_tokens}
        body |= {"temperature": plan.temperature, "seed": seed}
        body |= {"messages": plan.text} if plan.chat else {"prompt": plan.prompt}
        name = self._load(steering) if steering else ""
        body |= {"vllm_xargs": request_of(name)} if name else {}
        text = ""
        try:
            with closing(self._events("/v1/chat/completions" if plan.chat else "/v1/completions", body)) as events:
                for event in events:
                    text += _new_text(event, self.key)
                    yield text, ()
        except SteeringError:  # a server that was started anew has nothing loaded: the next request loads it again
            self._loaded = [loaded for loaded in self._loaded if loaded != name]
            raise

    def _load(self, steering: Sequence[Intervention]) -> str:
        """Load interventions on the server, under a name that is made of what they are; return the name."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "steering.safetensors"
            save_steering(path, list(steering))
            content = path.read_bytes()
        name = "play-" + hashlib.sha256(content).hexdigest()[:24]
        if name not in self._loaded:
            self._ask("PUT", f"/v1/steering/{name}", content)
            self._loaded.append(name)
            while len(self._loaded) > MAX_LOADED:
                self._ask("DELETE", f"/v1/steering/{self._loaded.pop(0)}")
        return name

    def _connect(self, method: str, path: str, body: bytes | None) -> tuple[HTTPConnection, HTTPResponse]:
        """A connection with the beginning of its answer. Raises SteeringError without one, or for a refusal."""
        parts = urlsplit(self.url)
        kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=TIMEOUT_SECONDS)
        headers = {"User-Agent": "fgsteer", "Content-Type": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            refused = b"" if 200 <= answer.status < 300 else answer.read(MAX_LINE_BYTES)
        except (OSError, HTTPException, ValueError) as error:
            connection.close()
            reason = redact(self.key, f"{type(error).__name__} {error}")[:200]
            raise SteeringError(
                f"no answer from {parts.hostname}:{parts.port}: {reason}",
                "a running fgsteer serve",
                "start it, or leave --server out",
            ) from None
        if not 200 <= answer.status < 300:  # redirects too, which are not followed
            connection.close()
            said = redact(self.key, _reason(refused))[:MAX_REASON_CHARS].rstrip(".")
            keys = "pass the key of its --admin-key, or else of its --api-key, as --server-key"
            hint = keys if answer.status in (401, 403) else ""
            raise SteeringError(f"The server refused with status {answer.status}: {said}.", "", hint)
        return connection, answer

    def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        connection, answer = self._connect(method, path, body)
        with closing(connection):
            return bytes(answer.read(MAX_ANSWER_BYTES))

    def _events(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any]]:
        """The JSON of each event that the server sends."""
        connection, answer = self._connect("POST", path, json.dumps(body).encode())
        with closing(connection):
            for _ in range(MAX_ANSWER_BYTES // 8):
                line = answer.readline(MAX_LINE_BYTES)
                if not line or line.strip() == b"data: [DONE]":
                    return
                if line.startswith(b"data: "):
                    try:
                        event = parse_json(line[6:])
                    except ValueError as error:
                        raise SteeringError("an event that is no JSON", "events of fgsteer serve") from error
                    if not isinstance(event, dict):
                        raise SteeringError("an event that is no object", "events of fgsteer serve")
                    yield event


def _reason(content: bytes) -> str:
    """What a server says of an error: the message in its JSON, or else all of it."""
    try:
        said = parse_json(content)["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, LookupError, TypeError):
        return content.decode(errors="replace")


def _new_text(event: dict[str, Any], key: str) -> str:
    """What an event adds to the text. Raises SteeringError for an event that says what went wrong."""
    if "error" in event:
        said = redact(key, _reason(json.dumps(event).encode()))[:MAX_REASON_CHARS]
        raise SteeringError(f"The server broke off: {said}")
    try:
        choice = (event.get("choices") or [{}])[0]
        delta = choice.get("delta")
        text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
    except (AttributeError, LookupError, TypeError) as error:
        raise SteeringError("an event without choices", "events of fgsteer serve") from error
    return text if isinstance(text, str) else ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
