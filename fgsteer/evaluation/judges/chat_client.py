"""A client of any OpenAI-compatible chat endpoint that keeps asking while asking again can help.

Errors that pass (429, 5xx, time-outs, dropped connections) are retried with exponential
back-off, jitter and the server's Retry-After; the others are raised at once. The API key
goes into the Authorization header and nowhere else: redirects are not followed, and what an
error quotes of the server is without it. An answer ends in time and in size, or it is none.

    ChatClient("gpt-4o-mini").ask("Answer with the JSON object {}.")
"""

from __future__ import annotations

import io
import ipaddress
import json
import os
import random
import re
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from threading import Event
from typing import Any, NoReturn
from urllib.request import AbstractHTTPHandler, OpenerDirector, ProxyHandler, Request

from fgsteer.errors import JudgeError
from fgsteer.errors.checks import describe_value, is_number, is_whole_number
from fgsteer.errors.escaping import redact
from fgsteer.errors.wording import a
from fgsteer.storage.json_files import parse_json

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_BACKOFF = 60.0  # seconds, without a Retry-After
LONGEST_TIMEOUT = 86_400.0  # seconds of an attempt
LONGEST_WAIT = 600.0  # seconds of a Retry-After that are waited out
LARGEST_ANSWER = 2 << 20  # bytes, headers too: a score takes some hundred, long reasoning some 100,000
LONGEST_QUOTE = 300  # characters of what a server says


class BrokenAnswerError(Exception):
    """An answer arrived that holds no chat completion, or not the JSON asked for."""


class _PassingError(Exception):
    """A failure that may pass; ``wait`` is the server's Retry-After in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _RefusedError(Exception):
    """An answer that asking again does not mend, by its HTTP status, or 0 for one that is too large."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status = status


class _Key:
    """An API key that shows in no repr and goes into no pickle."""

    __slots__ = ("value",)

    def __init__(self, value: str) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "(key)" if self.value else "(no key)"

    def __reduce__(self) -> NoReturn:
        raise JudgeError("a copy or pickle of an API key", "a chat client made where it asks", "make it anew there")


class _Bounded(io.RawIOBase):
    """What a socket brings until a moment, and up to ``LARGEST_ANSWER`` bytes."""

    def __init__(self, connected: socket.socket, until: float) -> None:
        self._socket, self._until, self._left = connected, until, LARGEST_ANSWER
        self._raw = connected.makefile("rb", buffering=0)

    def makefile(self, _: str) -> io.BufferedReader:
        """What HTTPResponse asks of a socket."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Some bytes. Raises TimeoutError, _RefusedError for too many."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(seconds)
        count = self._raw.readinto(buffer) or 0
        self._left -= count
        if self._left < 0:
            raise _RefusedError(f"with more than {LARGEST_ANSWER >> 20} MiB")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _bounded(kind: type[HTTPConnection]) -> Callable[..., HTTPConnection]:
    """Connections whose answers, and those of a proxy on the way, end ``timeout`` seconds from now at the latest."""

    def connection(host: str, timeout: float, **options: Any) -> HTTPConnection:
        until = time.monotonic() + timeout
        made: Any = kind(host, timeout=timeout, **options)
        made.response_class = lambda connected, *args, **more: HTTPResponse(_Bounded(connected, until), *args, **more)  # type: ignore[arg-type]
        return made  # type: ignore[no-any-return]

    return connection


class _Http(AbstractHTTPHandler):
    """http and https by bounded connections, redirects and refusals returned like any answer."""

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_bounded(HTTPConnection), request)

    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_bounded(HTTPSConnection), request)

    http_request = https_request = AbstractHTTPHandler.do_request_


class ChatClient:
    """One model of a chat endpoint, asked at temperature 0 for a JSON object; safe to share among threads.

    ``base_url`` ends before /chat/completions. ``api_key`` defaults to the environment's OPENAI_API_KEY;
    servers without keys need none. ``timeout`` in seconds bounds each attempt, from connecting to the answer's last
    byte (an address of the host that does not connect takes as long again), ``attempts`` the requests a
    question may take, ``backoff`` in seconds starts the doubling pause between them. An answer of more than 2 MiB
    is refused.
    ``options`` are further fields of the request, such as {"max_completion_tokens": 32}, and win over ours.
    JSON mode is left out where the endpoint refuses it. Raises JudgeError for an unusable URL or key.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = OPENAI,
        api_key: str | None = None,
        timeout: float = 60.0,
        attempts: int = 6,
        backoff: float = 1.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if re.search(r"[?#]|//[^/]*@", str(base_url)):  # which may hold a secret, so it is not shown
            raise JudgeError("a base_url with a login, a query or a fragment", f"an address alone, such as {OPENAI}")
        if not _is_address(base_url):
            raise JudgeError(f"base_url {base_url!r}", f"an http or https address such as {OPENAI}")
        numbers = is_whole_number(attempts) and is_number(timeout) and is_number(backoff)
        if not numbers or attempts < 1 or not 0 < timeout <= LONGEST_TIMEOUT or not backoff >= 0:
            raise JudgeError(
                f"attempts {describe_value(attempts)}, timeout {describe_value(timeout)}, "
                f"backoff {describe_value(backoff)}",
                f"a whole number ≥ 1, seconds above 0 up to {LONGEST_TIMEOUT:.0f}, and seconds ≥ 0",
            )
        self.model = model
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        self.options = _request_fields(options or {})
        if not isinstance(api_key, str | None):
            raise JudgeError(f"an API key that is {a(type(api_key).__name__)}", "a text")
        self._key = _Key((os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip())
        if not (self._key.value.isascii() and self._key.value.isprintable()):
            raise JudgeError("the API key holds characters that no header may", "the key alone")
        self._json_mode = "response_format" not in self.options
        self._opener = OpenerDirector()
        for handler in (ProxyHandler(), _Http()):
            self._opener.add_handler(handler)

    def ask(self, prompt: str, stop: Event | None = None) -> str:
        """The model's answer. Raises JudgeError when it cannot be had, BrokenAnswerError for no chat completion.

        Another thread that sets ``stop`` ends the pauses between attempts.
        """
        stop = stop or Event()
        for attempt in range(1, self.attempts + 1):
            try:
                return self._content(self._request(prompt))
            except _PassingError as error:
                problem = error
            except _RefusedError as error:
                raise JudgeError(f"{self.url} answered {error}", "a chat completion", _advice(error.status)) from None
            if problem.wait > LONGEST_WAIT:
                break
            pause = min(LONGEST_BACKOFF, self.backoff * 2.0 ** min(attempt - 1, 99)) * random.uniform(0.5, 1)
            if attempt < self.attempts and stop.wait(problem.wait + pause):
                break
        raise JudgeError(f"{self.url}: {problem} at attempt {attempt} of {self.attempts}", "an answer", "try later")

    def _request(self, prompt: str) -> bytes:
        """One question, without JSON mode where the endpoint refuses it."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        body.update(self.options)
        if self._json_mode:
            try:
                return self._post({**body, "response_format": {"type": "json_object"}})
            except _RefusedError as error:
                if error.status not in (400, 422):
                    raise
        answer = self._post(body)
        self._json_mode = False  # what was refused with it was answered without
        return answer

    def _post(self, body: Mapping[str, Any]) -> bytes:
        """The body of a successful answer. Raises _PassingError, _RefusedError.

        They are raised after the except block: in one, the error would go along, and with it what the server said.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "fgsteer"}
        request = Request(self.url, json.dumps(body).encode(), headers, method="POST")
        if self._key.value:
            request.add_unredirected_header("Authorization", f"Bearer {self._key.value}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                data = bytes(response.read(LARGEST_ANSWER + 1))
                status, wait, missing = response.status, response.headers.get("Retry-After"), response.length
            problem = _PassingError(f"an answer without its last {missing} bytes") if missing else None
        except (OSError, HTTPException, ValueError) as error:  # ValueError: sizes that are none
            reason = getattr(error, "reason", error)
            problem = _PassingError(f"{type(reason).__name__} {self.quote(str(reason))}")
        if problem is not None:
            raise problem
        if not 200 <= status < 300:
            raise self._failure(status, wait, data)
        return data

    def _failure(self, status: int, retry_after: str | None, data: bytes) -> _PassingError | _RefusedError:
        """An HTTP error, sorted."""
        passing = status in (408, 409, 425, 429) or status >= 500
        if passing and b"insufficient_quota" not in data:
            wait = _seconds(retry_after)
            return _PassingError(f"HTTP {status}, Retry-After {wait:.0f} s", wait)
        return _RefusedError(f"HTTP {status}: {self.quote(data.decode(errors='replace'))}", status)

    def _content(self, raw: bytes) -> str:
        """The text of a chat completion. Raises BrokenAnswerError."""
        content = completion(raw)
        if content is None:
            raise BrokenAnswerError(self.quote(raw.decode(errors="replace")))
        return content

    def quote(self, words: str) -> str:
        """The server's words as an error may tell them: the first 300 characters, nothing of the API key in them."""
        # cut before the key is looked for, which takes time, and after: not in the middle of it
        return redact(self._key.value, " ".join(words.split())[: 40 * LONGEST_QUOTE])[:LONGEST_QUOTE]


def _request_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields of a request. Raises JudgeError for what JSON cannot hold."""
    try:
        fields = dict(options)
        json.dumps(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise JudgeError(f"options that are no JSON: {error}", 'fields such as {"max_completion_tokens": 32}') from None
    return fields


def _is_address(url: object) -> bool:
    """Whether a URL has a host that can be asked for, by name or as an IP address, and a port that can be."""
    parts = re.fullmatch(r"https?://(?:([\w.-]+)|\[([\w:.]+)\])(?::(\d{1,5}))?(?:/[!-~]*)?", str(url), re.ASCII)
    if parts is None:
        return False
    try:
        (parts[1] or "").encode("idna")  # refuses a label that is empty or too long
        if parts[2]:
            ipaddress.IPv6Address(parts[2])
    except ValueError:
        return False
    return int(parts[3] or 80) < 65536


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, in seconds or as a date, as seconds from now; 0 where there is none to read."""
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(retry_after or "")
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # no date, or one without a zone
        return 0.0


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"set {KEY_VARIABLE} or pass api_key"
    return "check base_url and model" if status in (301, 302, 307, 308, 404) else ""


def completion(raw: bytes) -> str | None:
    """The text of a chat completion, None for anything else."""
    try:
        content = parse_json(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return content if isinstance(content, str) else None
