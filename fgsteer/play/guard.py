"""The guard before every request: this machine's address, this page's origin, the token, a body of bounded size.

app = Guard(app, token="…", hosts={"127.0.0.1:8765", "localhost:8765"})

A page of another site cannot ask (its origin differs), nor one that points its own name at this machine (its host
differs), nor can another user of this machine (who lacks the token). Answers forbid the page to load or run anything
from elsewhere, and to be framed.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 8 << 20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Guard:
    """Lets requests through that carry the token and come from the page itself, or from no page.

    Args:
        app: What answers them.
        token: The token: in the page's address (``?token=``), then in a cookie, or as a bearer.
        hosts: The values of the header Host that are answered.
    """

    def __init__(self, app: App, token: str, hosts: set[str]) -> None:
        self.app, self.token, self.hosts = app, token, hosts
        ports = {host.rpartition(":")[2] for host in hosts}
        self.cookie = f"fgsteer-play-{min(ports)}"  # cookies do not tell ports apart

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no web sockets
            return
        headers = {bytes(k).decode("latin-1").lower(): bytes(v).decode("latin-1") for k, v in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        fresh = self._in_address(scope)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = dict(HEADERS)
                if fresh:
                    added["Set-Cookie"] = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
                pairs = [(k.lower().encode(), v.encode()) for k, v in added.items()]
                message["headers"] = [*message.get("headers", []), *pairs]
            await send(message)

        await self.app(scope, _bounded(receive), guarded)

    def _refusal(self, scope: Message, headers: dict[str, str]) -> tuple[int, str] | None:
        """The status and the reason of a refusal; None for a request that is answered."""
        host = headers.get("host", "").lower()
        if host not in self.hosts:
            return 403, "This address is not that of fgsteer play."
        origin = headers.get("origin")
        if origin is not None and origin.lower() != f"http://{host}":
            return 403, "Another site may not ask fgsteer play."
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope["method"] != "GET":
            return 403, "Another site may not ask fgsteer play."
        if scope["method"] not in ("GET", "POST"):
            return 405, "fgsteer play answers GET and POST."
        by_bearer = self._is_token(headers.get("authorization", "").removeprefix("Bearer "))
        by_cookie = any(map(self._is_token, _cookies(headers.get("cookie", ""), self.cookie)))
        if not (by_bearer or by_cookie or (self._in_address(scope) and scope["method"] == "GET")):
            return 401, "Open the address that fgsteer play printed, with its token."
        if scope["method"] == "POST":
            if not by_bearer and origin is None:
                return 403, "A request by cookie needs the header Origin."
            if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
                return 415, "Requests are JSON."
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > MAX_BODY_BYTES:
                return 413, f"A request has at most {MAX_BODY_BYTES:,} bytes."
        return None

    def _in_address(self, scope: Message) -> bool:
        given = parse_qs(bytes(scope.get("query_string", b"")).decode("latin-1")).get("token", [""])
        return self._is_token(given[0])

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def _cookies(header: str, name: str) -> list[str]:
    """The values of a cookie, whatever stands beside it: other programs at this address set cookies of any form."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return [value for key, _, value in pairs if key == name]


def _bounded(receive: Receive) -> Receive:
    """The same, that ends a body which is longer than its header said it may be."""
    received = 0

    async def bounded() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        return {"type": "http.disconnect"} if received > MAX_BODY_BYTES else message

    return bounded


async def _answer(send: Send, status: int, reason: str) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
    headers.append((b"content-type", b"text/plain; charset=utf-8"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
