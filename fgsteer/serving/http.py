"""What stands before vLLM's HTTP server: the addresses for vectors, and a look at who asks for steering.

``GET /v1/steering`` lists, ``PUT /v1/steering/NAME`` (body: a vector's file) loads, ``DELETE /v1/steering/NAME``
unloads. A ``POST`` that asks for steering and gets none, such as a beam search, is answered with 400.

    app.add_middleware(Door, ready=lambda: plugin.ready)
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import tempfile
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fgsteer.errors import FgsteerError, SteeringError
from fgsteer.serving.control import ASKED, Asked, Control
from fgsteer.serving.request import said
from fgsteer.serving.served import check_name

PATH = "/v1/steering"
UPLOADS = 4  # at once
UPLOAD_SECONDS = 60.0  # for one body to arrive
HEADER_BYTES = 4 << 20  # of a vector's file: its features and where it came from
UNSTEERED = (
    "this request asks for steering, and was not steered; expected /v1/completions or /v1/chat/completions "
    "without beam search, the steer keys in vllm_xargs; leave the steering out, or ask in that way"
)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Who may change what is served: who has ``admin_key``, where there is one; else the server's key; else nobody."""

    admin_key: str | None = None
    keyed: bool = False  # the server has a key of its own, which it checks before
    allow_uploads: bool = False  # even without any key

    def refusal(self, method: str, authorization: str) -> tuple[int, str] | None:
        """(status, message) for a request that is not allowed."""
        if self.admin_key:
            scheme, _, token = authorization.partition(" ")
            digests = [hashlib.sha256(text.encode(errors="replace")).digest() for text in (token, self.admin_key)]
            if not secrets.compare_digest(*digests) or scheme.lower() != "bearer":
                return 401, "no admin key; expected Authorization: Bearer and the server's --admin-key"
        elif not (self.keyed or self.allow_uploads or method == "GET"):
            return 403, (
                "uploads to a server without a key; expected a server with --admin-key or --api-key; "
                "start it with one of them, or with --allow-uploads"
            )
        return None


@dataclass(frozen=True)
class Ready:
    """What the addresses need of a server that has started."""

    control: Control
    access: Access
    upload_bytes: int


def upload_bytes(rows: int, d_model: int) -> int:
    """The largest body: every row of a table in float64, and a header."""
    return 8 * rows * (2 * d_model + 3) + HEADER_BYTES


class _RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Door:
    """ASGI middleware around vLLM's app; ``ready`` gives None until the server has started."""

    def __init__(self, app: App, ready: Callable[[], Ready | None]) -> None:
        self.app, self.ready = app, ready
        self.uploads = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer what is ours, look at what is vLLM's."""
        path = str(scope.get("path", "")).removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and (path == PATH or path.startswith(f"{PATH}/")):
            try:
                told = await self._steering(scope, receive, path.removeprefix(PATH).removeprefix("/"))
            except _RefusedError as error:
                await answer(send, error.status, str(error))
            else:
                await answer(send, 200, told)
        elif scope["type"] == "http" and scope["method"] == "POST" and not path.endswith("/render"):
            await self._look(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _steering(self, scope: Message, receive: Receive, name: str) -> dict[str, Any]:
        """What is served after the request. Raises _RefusedError."""
        ready, method = self.ready(), scope["method"]
        if ready is None:
            raise _RefusedError(503, "the server starts")
        headers = {key.decode("latin-1").lower(): value.decode("latin-1") for key, value in scope["headers"]}
        if refusal := ready.access.refusal(method, headers.get("authorization", "")):
            raise _RefusedError(*refusal)
        if method not in (("PUT", "DELETE") if name else ("GET",)):
            raise _RefusedError(405, f"{method}; expected GET {PATH}, or PUT or DELETE {PATH}/NAME")
        try:
            if method == "PUT":
                check_name(name)
                await self._load(ready, name, headers.get("content-length", ""), receive)
            elif method == "DELETE":
                await asyncio.to_thread(ready.control.unload, name)
        except FgsteerError as error:
            raise _RefusedError(400, str(error)) from error
        return {"loaded": ready.control.hookpoints(), "layers": list(ready.control.layers)}

    async def _load(self, ready: Ready, name: str, length: str, receive: Receive) -> None:
        """Load a body. Raises _RefusedError for too many at once and as ``_body`` does, FgsteerError as ``load``."""
        if self.uploads >= UPLOADS:
            raise _RefusedError(503, f"{self.uploads} uploads at once; expected at most {UPLOADS}; try again")
        self.uploads += 1
        try:
            content = await _body(receive, length, ready.upload_bytes)
            await asyncio.to_thread(load, ready.control, name, content)
        finally:
            self.uploads -= 1

    async def _look(self, scope: Message, receive: Receive, send: Send) -> None:
        """Run a request; where it asks for steering and gets none, the answer is 400 in place of what comes."""
        body = bytearray()
        message: Message = {"type": "http.request", "more_body": True}
        while message["type"] == "http.request" and message.get("more_body", False):
            message = await receive()
            body += message.get("body", b"")
        given = [{**message, "body": bytes(body)} if message["type"] == "http.request" else message]

        async def again() -> Message:
            return given.pop() if given else await receive()

        asks, refusal = asking(bytes(body))
        if refusal:
            await answer(send, 400, refusal)
            return
        asked, refused = Asked(), False
        start: Message | None = None

        async def judged(message: Message) -> None:
            nonlocal start, refused
            if message["type"] == "http.response.start" and message["status"] < 400:
                start = message  # held until the body begins: by then the engine has been reached, or never will be
                return
            if start is not None and not refused:
                refused = not asked.admitted
                await (answer(send, 400, asked.refusal or UNSTEERED) if refused else send(start))
                start = None
            if not refused:
                await send(message)

        token = ASKED.set(asked)
        try:
            await self.app(scope, again, judged if asks else send)
        finally:
            ASKED.reset(token)


def asking(body: bytes) -> tuple[bool, str]:
    """(whether a POST asks for steering, why it is refused at once if it is)."""
    if not any(sign in body for sign in (b"steer", b"\\u", b"\x00")):  # plain, escaped, in UTF-16
        return False, ""
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):  # a form with a recording, or nothing that vLLM reads
        return b"steer" in body and b"vllm_xargs" in body, ""
    if not isinstance(told, Mapping):
        return False, ""
    extra = told.get("extra_body")
    if said(told) or said(extra) or (isinstance(extra, Mapping) and said(extra.get("vllm_xargs"))):
        return True, "steer keys at the top of a request; expected them in vllm_xargs"
    params = told.get("sampling_params")
    asks = bool(said(told.get("vllm_xargs")) or (isinstance(params, Mapping) and said(params.get("extra_args"))))
    return asks, UNSTEERED if asks and told.get("use_beam_search") is True else ""


async def _body(receive: Receive, length: str, most: int) -> bytes:
    """A request's body. Raises _RefusedError for one that is too long, takes too long or breaks off."""
    too_long = _RefusedError(413, f"a body over {most:,} bytes; expected a vector, or a clamp of this server's rows")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_long
    content = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            while True:
                message = await receive()
                content += message.get("body", b"")
                if message["type"] != "http.request":
                    raise _RefusedError(400, "a body that breaks off")
                if len(content) > most:
                    raise too_long
                if not message.get("more_body", False):
                    return bytes(content)
    except TimeoutError as error:
        raise _RefusedError(408, f"a body that is not there after {UPLOAD_SECONDS:g} s") from error


def load(control: Control, name: str, content: bytes) -> None:
    """Load a file's content. Raises as ``Control.load`` does, SteeringError in the words of the file's own errors."""
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        try:
            file.write(content)
            file.flush()
            control.load(name, file.name)
        except (FgsteerError, OSError) as error:  # where the file lay is nobody's business
            raise SteeringError(str(error).replace(file.name, "what was sent")) from error


async def answer(send: Send, status: int, told: object) -> None:
    """Send JSON, an error in the form of vLLM's."""
    if status != 200:
        kind = "BadRequestError" if status == 400 else HTTPStatus(status).phrase
        told = {"error": {"message": told, "type": kind, "param": None, "code": status}}
    body = json.dumps(told).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
