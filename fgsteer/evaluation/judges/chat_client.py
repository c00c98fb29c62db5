"""A client of any OpenAI-compatible chat endpoint, which asks again as long as that can help.

Errors that may pass (429, 5xx, time-outs, dropped connections) are retried with exponential back-off, jitter and the
server's Retry-After; the others are raised at once. The API key goes into the Authorization header and nowhere else:
redirects are not followed, and errors that quote the server leave it out. An answer that takes too long or is too
large is refused.

    ChatClient("gpt-4o-mini").ask("Answer with the JSON object {}.")
"""

from __future__ import annotations

import contextlib
import io
import ipaddress
import json
import os
import random
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NoReturn, TypeVar
from urllib.request import AbstractHTTPHandler, OpenerDirector, ProxyHandler, Request

from fgsteer.errors import JudgeError
from fgsteer.errors.checks import describe_value, is_number, is_whole_number
from fgsteer.errors.escaping import redact
from fgsteer.errors.wording import a
from fgsteer.storage.json_files import parse_json

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_BACKOFF_SECONDS = 60.0  # without a Retry-After
LONGEST_TIMEOUT_SECONDS = 86_400.0  # of an attempt
LONGEST_WAIT_SECONDS = 600.0  # of a Retry-After that is waited out
LARGEST_ANSWER_BYTES = 2 << 20  # with headers: a score takes some hundred, long reasoning some 100,000
LONGEST_QUOTE_CHARACTERS = 300  # of what a server says
T = TypeVar("T")


class BrokenAnswerError(Exception):
    """An answer holds no chat completion, or not the JSON that was asked for."""


class _PassingError(Exception):
    """A failure that may pass. ``wait`` is the server's Retry-After in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _RefusedError(Exception):
    """A failure that asking again does not mend. ``status`` is its HTTP status, 0 for an answer that is too large."""

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
        raise JudgeError(
            "An API key is not copied or pickled.",
            change="make the chat client anew where it is to ask, with its api_key",
        )


class _Bounded(io.RawIOBase):
    """What a socket brings until a moment, up to ``LARGEST_ANSWER_BYTES``."""

    def __init__(self, connected: socket.socket, until: float) -> None:
        self._socket, self._until, self._left = connected, until, LARGEST_ANSWER_BYTES
        self._raw = connected.makefile("rb", buffering=0)

    def makefile(self, _: str) -> io.BufferedReader:
        """The method of a socket that HTTPResponse calls."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read some bytes. Raises TimeoutError, and _RefusedError for too many."""
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(seconds)
        count = self._raw.readinto(buffer) or 0
        self._left -= count
        if self._left < 0:
            raise _RefusedError(f"with more than {LARGEST_ANSWER_BYTES >> 20} MiB")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _bounded(kind: type[HTTPConnection]) -> Callable[..., HTTPConnection]:
    """A class of connections whose answers, also those of a proxy, end after ``timeout`` seconds at the latest."""

    def connection(host: str, timeout: float, **options: Any) -> HTTPConnection:
        until = time.monotonic() + timeout
        made: Any = kind(host, timeout=timeout, **options)
        made.response_class = lambda connected, *args, **more: HTTPResponse(_Bounded(connected, until), *args, **more)  # type: ignore[arg-type]
        return made  # type: ignore[no-any-return]

    return connection


class _Http(AbstractHTTPHandler):
    """http and https by bounded connections; redirects and refusals are returned like any answer."""

    def http_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_bounded(HTTPConnection), request)

    def https_open(self, request: Request) -> HTTPResponse:
        return self.do_open(_bounded(HTTPSConnection), request)

    http_request = https_request = AbstractHTTPHandler.do_request_


class ChatClient:
    """Asks one model of a chat endpoint, at temperature 0, for a JSON object; threads may share it.

    An answer of more than 2 MiB is refused. JSON mode is left out where the endpoint refuses it.

    Args:
        model: The model's name at its address.
        base_url: The address, which ends before /chat/completions.
        api_key: The key; by default that of the environment variable OPENAI_API_KEY. Servers without keys need none.
        timeout: Seconds of each attempt, from connecting to the answer's last byte. An address of the host that does
            not connect takes as long again.
        attempts: Requests of a question, at most.
        backoff: Seconds of the first pause between attempts, which doubles.
        options: Further fields of the request, such as {"max_completion_tokens": 32}, which replace fgsteer's.

    Raises:
        JudgeError: The address or the key cannot be used, or a number is out of its range.
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
            raise JudgeError(
                "a base_url with a login, a query or a fragment",
                f"only an address, such as {OPENAI}",
                "pass a key with api_key=",
            )
        if not _is_address(base_url):
            raise JudgeError(f"base_url {base_url!r}", f"an http or https address, such as {OPENAI}")
        numbers = is_whole_number(attempts) and is_number(timeout) and is_number(backoff)
        if not numbers or attempts < 1 or not 0 < timeout <= LONGEST_TIMEOUT_SECONDS or not backoff >= 0:
            raise JudgeError(
                f"attempts = {describe_value(attempts)}, timeout = {describe_value(timeout)} and "
                f"backoff = {describe_value(backoff)}",
                f"attempts of at least 1, timeout in seconds above 0 and up to {LONGEST_TIMEOUT_SECONDS:.0f}, and "
                "backoff in seconds of at least 0",
            )
        self.model = model
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        self.options = _request_fields(options or {})
        if not isinstance(api_key, str | None):
            raise JudgeError(f"{a(type(api_key).__name__)}", "a text as the API key", 'pass api_key="..."')
        self._key = _Key((os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip())
        if not (self._key.value.isascii() and self._key.value.isprintable()):
            raise JudgeError(
                "The API key has characters that no HTTP header may have.",
                "the key alone",
                "look for a line break or quotation marks in it",
            )
        self._json_mode = "response_format" not in self.options
        self._opener = OpenerDirector()
        for handler in (ProxyHandler(), _Http()):
            self._opener.add_handler(handler)

    def ask(self, prompt: str, stop: Event | None = None) -> str:
        """The model's answer to a prompt.

        Args:
            prompt: The prompt.
            stop: When another thread sets it, pauses between attempts end.

        Raises:
            JudgeError: The endpoint refused the question, or did not answer it.
            BrokenAnswerError: The answer is not a chat completion.
        """
        stop = stop or Event()
        for attempt in range(1, self.attempts + 1):
            try:
                return self._content(self._request(prompt))
            except _PassingError as error:
                problem = error
            except _RefusedError as error:
                raise JudgeError(f"{self.url} answered {error}.", "a chat completion", _advice(error.status)) from None
            if problem.wait > LONGEST_WAIT_SECONDS:
                break
            pause = min(LONGEST_BACKOFF_SECONDS, self.backoff * 2.0 ** min(attempt - 1, 99)) * random.uniform(0.5, 1)
            if attempt < self.attempts and stop.wait(problem.wait + pause):
                break
        raise JudgeError(
            f"{self.url} gave no answer: {problem}, at attempt {attempt} of {self.attempts}.",
            change="try later; what has been answered is kept",
        )

    def _request(self, prompt: str) -> bytes:
        """Ask one question, without JSON mode where the endpoint refuses it."""
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

        They are raised after the except block: within it the error would be attached, and with it what the server said.
        """
        headers = {"Content-Type": "application/json", "User-Agent": "fgsteer"}
        request = Request(self.url, json.dumps(body).encode(), headers, method="POST")
        if self._key.value:
            request.add_unredirected_header("Authorization", f"Bearer {self._key.value}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                data = bytes(response.read(LARGEST_ANSWER_BYTES + 1))
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
        """The failure that an HTTP status stands for."""
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
        """The server's words as an error may quote them: the first 300 characters, without the API key."""
        # cut before the key is looked for, which takes time, and again after, so that no part of the key is left
        beginning = " ".join(words.split())[: 40 * LONGEST_QUOTE_CHARACTERS]
        return redact(self._key.value, beginning)[:LONGEST_QUOTE_CHARACTERS]


def ask_all(questions: Sequence[T], ask: Callable[[T, Event], None], concurrency: int) -> None:
    """Ask every question, so many at a time; after the first failure, which is raised, no new one is asked.

    ``ask`` takes a question and the event that is then set. The threads are daemons, for which an exiting process does
    not wait: Ctrl-C ends at once.
    """
    left, stop = deque(questions), Event()
    done: SimpleQueue[Exception | None] = SimpleQueue()

    def work() -> None:
        with contextlib.suppress(IndexError):  # none is left
            while not stop.is_set():
                question = left.popleft()
                try:
                    ask(question, stop)
                    done.put(None)
                except Exception as error:
                    done.put(error)
                    stop.set()

    threads: list[Thread] = []
    try:
        for _ in range(min(concurrency, len(questions))):
            threads.append(Thread(target=work, daemon=True))
            threads[-1].start()
        for _ in questions:
            if (error := done.get()) is not None:
                raise error
    except Exception:
        stop.set()
        for thread in threads:
            thread.join()
        raise
    finally:
        stop.set()


def _request_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields of a request. Raises JudgeError for what JSON cannot hold."""
    try:
        fields = dict(options)
        json.dumps(fields)
    except (TypeError, ValueError, RecursionError) as error:
        raise JudgeError(
            f"The options cannot be written as JSON: {error}.", 'fields such as {"max_completion_tokens": 32}'
        ) from None
    return fields


def _is_address(url: object) -> bool:
    """Whether a URL has a possible host, by name or as an IP address, and a possible port."""
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
    """Seconds from now of a Retry-After header, which holds seconds or a date; 0 where it holds neither."""
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
    """What to change after an HTTP status, or ""."""
    if status in (401, 403):
        return f"set the environment variable {KEY_VARIABLE}, or pass api_key="
    return "check base_url= and the model's name" if status in (301, 302, 307, 308, 404) else ""


def completion(raw: bytes) -> str | None:
    """The text of a chat completion; None for anything else."""
    try:
        content = parse_json(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return None
    return content if isinstance(content, str) else None
