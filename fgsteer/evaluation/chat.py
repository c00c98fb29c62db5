"""A client of any OpenAI-compatible chat endpoint that keeps asking while asking again can help.

Errors that pass (429, 5xx, time-outs, dropped connections) are retried with exponential
back-off, jitter and the server's Retry-After; the others are raised at once. The API key
goes into the Authorization header and nowhere else; redirects, which would carry it on,
are refused.

    ChatClient("gpt-4o-mini").ask("Answer with the JSON object {}.")
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import random
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from threading import Event
from typing import Any

from fgsteer.errors import JudgeError
from fgsteer.files import parse_json

OPENAI = "https://api.openai.com/v1"
KEY_VARIABLE = "OPENAI_API_KEY"
LONGEST_BACKOFF = 60.0  # seconds, without a Retry-After
LONGEST_WAIT = 600.0  # seconds of a Retry-After that are waited out


class BrokenAnswerError(Exception):
    """An answer arrived that holds no chat completion, or not the JSON asked for."""


class _PassingError(Exception):
    """A failure that may pass; ``wait`` is the server's Retry-After in seconds."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class _RefusedError(Exception):
    """An HTTP error that asking again does not mend."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(f"HTTP {status}: {detail}")
        self.status = status


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class ChatClient:
    """One model of a chat endpoint, asked at temperature 0 for a JSON object; safe to share among threads.

    ``base_url`` ends before /chat/completions. ``api_key`` defaults to the environment's OPENAI_API_KEY;
    servers without keys need none. ``timeout`` in seconds bounds each wait for the network, ``attempts`` the
    requests a question may take, ``backoff`` in seconds starts the doubling pause between them.
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
        if not _is_address(base_url):
            raise JudgeError(f"base_url {base_url!r}", f"an http or https address such as {OPENAI}")
        if attempts < 1 or timeout <= 0 or backoff < 0:
            raise JudgeError(f"attempts {attempts}, timeout {timeout}, backoff {backoff}", "≥ 1, > 0 and ≥ 0")
        self.model = model
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.timeout = timeout
        self.attempts = attempts
        self.backoff = backoff
        self.options = dict(options or {})
        self._key = (os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise JudgeError("the API key holds characters that no header may", "the key alone")
        self._json_mode = "response_format" not in self.options
        self._opener = urllib.request.build_opener(_NoRedirect)

    def ask(self, prompt: str, stop: Event | None = None) -> str:
        """The model's answer. Raises JudgeError when it cannot be had, BrokenAnswerError for no chat completion.

        Another thread that sets ``stop`` ends the pauses between attempts.
        """
        stop = stop or Event()
        for attempt in range(1, self.attempts + 1):
            try:
                return _content(self._request(prompt))
            except _PassingError as error:
                problem = error
            except _RefusedError as error:
                raise JudgeError(f"{self.url} answered {error}", "a chat completion", _advice(error.status)) from None
            if problem.wait > LONGEST_WAIT:
                break
            pause = min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
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
        headers = {"Content-Type": "application/json", "User-Agent": "fgsteer"}
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        if self._key:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            raise self._failure(error) from None
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise _PassingError(f"{type(reason).__name__} {reason}") from None

    def _failure(self, error: urllib.error.HTTPError) -> _PassingError | _RefusedError:
        """An HTTP error, sorted; the key is cut from what the server says."""
        detail = ""
        with error, contextlib.suppress(OSError, HTTPException):
            detail = error.read(4000).decode(errors="replace")
        if self._key:
            detail = detail.replace(self._key, "(key)")
        passing = error.code in (408, 409, 425, 429) or error.code >= 500
        if passing and "insufficient_quota" not in detail:
            wait = _seconds(error.headers.get("Retry-After"))
            return _PassingError(f"HTTP {error.code}, Retry-After {wait:.0f} s", wait)
        return _RefusedError(error.code, " ".join(detail.split())[:300])


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
    except (ValueError, TypeError):  # no date, or one without a zone
        return 0.0


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"set {KEY_VARIABLE} or pass api_key"
    return "check base_url and model" if status in (301, 302, 307, 308, 404) else ""


def _content(raw: bytes) -> str:
    """The text of a chat completion. Raises BrokenAnswerError."""
    try:
        content = parse_json(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        content = None
    if not isinstance(content, str):
        raise BrokenAnswerError(raw[:200].decode(errors="replace"))
    return content
