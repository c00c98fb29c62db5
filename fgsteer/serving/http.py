"""Middleware around vLLM's HTTP server: addresses to load vectors, and a check that requests for steering are steered.

``GET /v1/steering`` lists what is loaded, ``PUT /v1/steering/NAME`` (body: a vector's file) loads, ``DELETE
/v1/steering/NAME`` unloads, and ``POST /v1/steering/trace`` writes a text with its trace. Any other ``POST`` that asks
for steering but would not be steered, such as a beam search, is answered with status 400.

    app.add_middleware(SteeringMiddleware, started=lambda: plugin.started)
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple, TypeVar

from fgsteer.errors import FgsteerError, SteeringError
from fgsteer.serving.admission import OUTCOME, SteeringOutcome
from fgsteer.serving.control import Control
from fgsteer.serving.inline import inline_chars
from fgsteer.serving.request import steering_keys
from fgsteer.serving.rows import check_name
from fgsteer.serving.tracing import MAX_TRACED_CHARS, parse_trace_request, trace_request

PATH = "/v1/steering"
TRACE_PATH = f"{PATH}/trace"
MAX_UPLOADS = 4
"""How many uploads may be under way at the same time."""
MAX_TRACES = 2
"""How many traces may be under way at the same time."""
UPLOAD_SECONDS = 60.0
"""How long the body of an upload may take to arrive."""
MAX_HEADER_BYTES = 4 << 20
"""The largest header of a vector's file: its features and its provenance."""
UPLOADED = "the file of a vector, or of a clamp with no more features than a table of this server has rows (--rows)"
UNSTEERED = (
    "This request asks for steering but was not steered. Expected a request to /v1/completions or /v1/chat/completions "
    "without beam search, with the steer keys in vllm_xargs. Send such a request, or leave the steer keys out."
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
T = TypeVar("T")


@dataclass(frozen=True)
class Access:
    """Who may list, load and unload vectors.

    Where there is an admin key, who has it. Else, where the server has a key, who has that one, which vLLM checks. Else
    everyone may list, and nobody may load and unload unless ``allow_uploads`` says so.
    """

    admin_key: str | None = None
    has_server_key: bool = False
    allow_uploads: bool = False

    def refusal(self, method: str, authorization: str) -> tuple[int, str] | None:
        """The status and the message for a request that is not allowed, None for one that is."""
        if self.admin_key:
            scheme, _, token = authorization.partition(" ")
            digests = [hashlib.sha256(text.encode(errors="replace")).digest() for text in (token, self.admin_key)]
            if not secrets.compare_digest(*digests) or scheme.lower() != "bearer":
                return 401, (
                    "This request has no valid admin key. Send the header Authorization: Bearer KEY, with the key of "
                    "the server's --admin-key."
                )
        elif not (self.has_server_key or self.allow_uploads or method == "GET"):
            return 403, (
                "This server has no key, so nobody may load or unload vectors. Start it with --admin-key or --api-key, "
                "or with --allow-uploads to let everyone do so."
            )
        return None


@dataclass(frozen=True)
class StartedServer:
    """What the middleware needs of a server that has started."""

    control: Control
    access: Access
    upload_bytes: int
    client: Any = None
    """The engine's client, which writes traces."""


def upload_bytes(rows: int, d_model: int) -> int:
    """The size of the largest upload that can be loaded: every row of a table in float64, and a header."""
    return 8 * rows * (2 * d_model + 3) + MAX_HEADER_BYTES


def trace_bytes(d_model: int) -> int:
    """The size of the largest request for a trace: a vector in it, and a prompt with every character as an escape."""
    return inline_chars(d_model) + 16 * MAX_TRACED_CHARS


class _RefusedError(Exception):
    """A request is answered with another status than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class SteeringMiddleware:
    """ASGI middleware around vLLM's app; ``started`` returns None until the server has started."""

    def __init__(self, app: App, started: Callable[[], StartedServer | None]) -> None:
        self.app, self.started = app, started
        self.uploads = self.traces = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer requests for vectors, check the answers to requests for steering, and pass on everything else."""
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and (path == PATH or path.startswith(f"{PATH}/")):
            try:
                if (scope["method"], path) == ("POST", TRACE_PATH):
                    content = await self._trace(scope, receive)
                else:
                    content = await self._answer(scope, receive, path.removeprefix(PATH).removeprefix("/"))
            except _RefusedError as error:
                await send_json(send, error.status, str(error))
            else:
                await send_json(send, 200, content)
        elif scope["type"] == "http" and scope["method"] == "POST" and not path.endswith("/render"):
            await self._check_steered(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _answer(self, scope: Message, receive: Receive, name: str) -> dict[str, Any]:
        """Do what a request for vectors asks, and return what is then loaded. Raises _RefusedError."""
        started, method, headers = self._started(), scope["method"], headers_of(scope)
        if refusal := started.access.refusal(method, headers.get("authorization", "")):
            raise _RefusedError(*refusal)
        if method not in (("PUT", "DELETE") if name else ("GET",)):
            expected = f"GET {PATH}, PUT {PATH}/NAME, DELETE {PATH}/NAME or POST {TRACE_PATH}"
            raise _RefusedError(405, f"Expected {expected}, got the method {method} for this address.")
        try:
            if method == "PUT":
                check_name(name)
                await self._load(started, name, headers.get("content-length", ""), receive)
            elif method == "DELETE":
                await asyncio.to_thread(started.control.unload, name)
        except FgsteerError as error:
            raise _RefusedError(400, str(error)) from error
        return {"loaded": started.control.hookpoints(), "layers": list(started.control.layers)}

    def _started(self) -> StartedServer:
        """The server, once it has started. Raises _RefusedError before."""
        if (started := self.started()) is None:
            raise _RefusedError(503, "The server has not started yet. Try again.")
        return started

    async def _trace(self, scope: Message, receive: Receive) -> dict[str, Any]:
        """The trace that a request asks for. A client that leaves ends it.

        It needs no more than a completion does: the server's key, where it has one, which vLLM has checked before.

        Raises _RefusedError for what makes no sense or is not loaded, and for too many at a time.
        """
        started = self._started()
        most = trace_bytes(started.control.engine.config.model_config.get_hidden_size())
        if self.traces >= MAX_TRACES:
            raise _RefusedError(503, f"{self.traces} traces are under way, and no more can be. Try again later.")
        self.traces += 1
        try:
            length = headers_of(scope).get("content-length", "")
            asked = parse_trace_request(await read_body(receive, length, most, "a prompt and steer keys"))
            async with self._leased(asked.steering.get("steer_vector")):
                return await _while_there(receive, trace_request(started.client, started.control, asked))
        except FgsteerError as error:
            raise _RefusedError(400, str(error)) from error
        finally:
            self.traces -= 1

    @asynccontextmanager
    async def _leased(self, vector: str | None) -> AsyncIterator[None]:
        """Keep the vector that a request carries, if it does, loaded. Raises _RefusedError where it does not load."""
        name, refusal = ("", "") if vector is None else await self._lease(vector)
        if refusal:
            raise _RefusedError(400, refusal)
        try:
            yield
        finally:
            if name and (started := self.started()):
                started.control.leases.give_back(name)

    async def _load(self, started: StartedServer, name: str, length: str, receive: Receive) -> None:
        """Load the body of a request. Raises _RefusedError as ``read_body`` does, and for too many at a time."""
        if self.uploads >= MAX_UPLOADS:
            raise _RefusedError(503, f"{self.uploads} uploads are under way, and no more can be. Try again later.")
        self.uploads += 1
        try:
            content = await read_body(receive, length, started.upload_bytes, UPLOADED)
            await asyncio.to_thread(load_upload, started.control, name, content)
        finally:
            self.uploads -= 1

    async def _check_steered(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on; where it asks for steering and is not steered, answer with 400 instead of what comes."""
        body = bytearray()
        message: Message = {"type": "http.request", "more_body": True}
        while message["type"] == "http.request" and message.get("more_body", False):
            message = await receive()
            body += message.get("body", b"")
        unread = [{**message, "body": bytes(body)} if message["type"] == "http.request" else message]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        asks, refusal, vector = asks_for_steering(bytes(body))
        name, refusal = ("", refusal) if refusal or vector is None else await self._lease(vector)
        if refusal:
            await send_json(send, 400, refusal)
            return
        outcome, refused = SteeringOutcome(), False
        start: Message | None = None

        async def send_if_steered(message: Message) -> None:
            nonlocal start, refused
            if message["type"] == "http.response.start" and message["status"] < 400:
                start = message  # held until the body begins: by then the engine has been reached, or never will be
                return
            if start is not None and not refused:
                refused = not outcome.admitted
                await (send_json(send, 400, outcome.refusal or UNSTEERED) if refused else send(start))
                start = None
            if not refused:
                await send(message)

        token = OUTCOME.set(outcome)
        try:
            await self.app(scope, receive_again, send_if_steered if asks else send)
        finally:
            OUTCOME.reset(token)
            if name and (started := self.started()):
                started.control.leases.give_back(name)

    async def _lease(self, vector: str) -> tuple[str, str]:
        """Load the vector that a request carries, until it is answered: its name, or why it is refused."""
        started = self.started()
        if started is None:
            return "", "The server has not started yet. Try again."
        try:
            return await asyncio.to_thread(started.control.load_inline, vector, lease=True), ""
        except FgsteerError as error:
            return "", str(error)


async def _while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What some work gives. A client that leaves meanwhile cancels it. Raises _RefusedError then."""

    async def leave() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(work)
    tasks = (working, asyncio.ensure_future(leave()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _RefusedError(400, "The client closed the connection.")
        return working.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Asked(NamedTuple):
    """Whether the body of a POST asks for steering, why it is refused at once, if it is, and the vector in it."""

    asks: bool = False
    refusal: str = ""
    vector: str | None = None


def asks_for_steering(body: bytes) -> Asked:
    """What the body of a POST asks for."""
    if not any(mark in body for mark in (b"steer", b"\\u", b"\x00")):  # the word as it is, escaped, or in UTF-16
        return Asked()
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):  # a form with a recording, or nothing that vLLM reads
        return Asked(b"steer" in body and b"vllm_xargs" in body)
    if not isinstance(request, Mapping):
        return Asked()
    extra = request.get("extra_body")
    misplaced = steering_keys(request) or steering_keys(extra)
    if misplaced or (isinstance(extra, Mapping) and steering_keys(extra.get("vllm_xargs"))):
        return Asked(
            True,
            "Expected the steer keys in vllm_xargs, got them in another part of the request. "
            'Send {"vllm_xargs": {"steer": …}} at the top of the request.',
        )
    params = request.get("sampling_params")
    places = [request.get("vllm_xargs"), params.get("extra_args") if isinstance(params, Mapping) else None]
    asked = [place for place in places if isinstance(place, Mapping) and steering_keys(place)]
    vectors = [vector for place in asked if isinstance(vector := place.get("steer_vector"), str)]
    refused = asked and request.get("use_beam_search") is True
    return Asked(bool(asked), UNSTEERED if refused else "", vectors[0] if vectors else None)


def headers_of(scope: Message) -> dict[str, str]:
    """The headers of a request, by their names in small letters."""
    return {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}


async def read_body(receive: Receive, length: str, max_bytes: int, expected: str) -> bytes:
    """The body of a request. Raises _RefusedError for one that is too long, takes too long or is cut off."""
    too_long = _RefusedError(413, f"The body has more than {max_bytes:,} bytes. Expected {expected}.")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_long
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            while True:
                message = await receive()
                content += message.get("body", b"")
                if message["type"] != "http.request":
                    raise _RefusedError(400, "The body is cut off: the client closed the connection.")
                if len(content) > max_bytes:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(content)
    except TimeoutError as error:
        raise _RefusedError(408, f"The body has not arrived within {UPLOAD_SECONDS:g} s.") from error


def load_upload(control: Control, name: str, content: bytes) -> None:
    """Load the content of a file under a name. Raises SteeringError, whatever is wrong with it."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        try:
            file.write(content)
            file.flush()
            control.load(name, file.name)
        except (FgsteerError, OSError) as error:  # clients need not know where the server keeps files
            message = str(error).replace(file.name, "the file that was sent").rstrip(".")
            raise SteeringError(f"{message[:1].upper()}{message[1:]}.") from error


async def send_json(send: Send, status: int, content: object) -> None:
    """Answer with JSON; with another status than 200, ``content`` is the message of an error in vLLM's form."""
    if status != 200:
        kind = "BadRequestError" if status == 400 else HTTPStatus(status).phrase
        content = {"error": {"message": content, "type": kind, "param": None, "code": status}}
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
