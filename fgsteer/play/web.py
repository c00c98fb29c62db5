"""The web application: the page and its files, and the actions that the page asks for, as events.

app = make_app(PlaySession.load("default"), token="…", port=8765)

``POST /api/NAME`` with a JSON object answers with server-sent events: places in the queue, the action's own events, and
at the end ``{"event": "end"}`` or ``{"event": "error", "message": …}``.
"""

from __future__ import annotations

import logging
import math
import socket
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.errors import DataError, FgsteerError, FgsteerWarning
from fgsteer.errors.escaping import escape_text, json_text
from fgsteer.play.actions import ACTIONS
from fgsteer.play.guard import Guard
from fgsteer.play.session import PlaySession
from fgsteer.play.turns import Event, Events, Turns, error_event
from fgsteer.storage.json_files import parse_json

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

STATIC = Path(__file__).parent / "static"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
HOST = "127.0.0.1"
log = logging.getLogger("fgsteer.play")


def need_play() -> None:
    """Raises DataError where the extra is not installed."""
    from importlib.util import find_spec

    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise DataError(
            f"no {' and no '.join(missing)}", "the packages of the extra play", "pip install 'fgsteer[play]'"
        )


def make_app(session: PlaySession, token: str, port: int) -> Guard:
    """The application, behind its guard, for a server at this port of the loopback."""
    from starlette.applications import Starlette
    from starlette.responses import Response, StreamingResponse
    from starlette.routing import Route

    turns = Turns()
    files = {path.name: path for path in STATIC.iterdir() if path.suffix in TYPES}

    async def page(_: Request) -> Response:
        return _file(files["index.html"], Response)

    async def static(request: Request) -> Response:
        path = files.get(request.path_params["name"])
        return Response("There is no such file.\n", 404) if path is None else _file(path, Response)

    async def act(request: Request) -> Response:
        action = ACTIONS.get(request.path_params["name"])
        if action is None:
            return Response("There is no such action.\n", 404)
        try:
            body = parse_json(await request.body())
            if not isinstance(body, dict):
                raise DataError("a body that is no object", "a JSON object")
        except (ValueError, DataError) as error:
            return Response(f"{str(error)[:200]}\n", 400)
        events = _events(turns, lambda: _with_notes(action(session, body)))

        class EventStream(StreamingResponse):  # type: ignore[misc]
            async def __call__(self, *given: Any) -> None:
                async with aclosing(events):  # also where the reader has left in the middle of a send
                    await super().__call__(*given)

        return EventStream(events, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    routes = [
        Route("/", page),
        Route("/static/{name}", static),
        Route("/api/{name}", act, methods=["POST"]),
    ]
    return Guard(Starlette(routes=routes), token, {f"{name}:{port}" for name in (HOST, "localhost")})


def _file(path: Path, response: type[Response]) -> Response:
    return response(path.read_bytes(), media_type=f"{TYPES[path.suffix]}; charset=utf-8")


def _with_notes(events: Events) -> Events:
    """The events of an action, and each of fgsteer's warnings that comes up meanwhile, as a note."""
    with closing(events), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FgsteerWarning)
        for event in events:
            yield event
            while caught:
                yield _note(caught.pop(0))
        yield from map(_note, caught)


def _note(caught: warnings.WarningMessage) -> Event:
    ours = issubclass(caught.category, FgsteerWarning)
    return {"event": "note", "message": escape_text(str(caught.message)) if ours else ""}


async def _events(turns: Turns, work: Callable[[], Any]) -> AsyncGenerator[str]:
    """The events of an action as lines of server-sent events. A reader that leaves ends the action."""
    try:
        async with aclosing(turns.take(work)) as events:
            async for event in events:
                yield _line(event)
    except FgsteerError as error:
        yield _line(error_event(error))
    except Exception as error:
        log.exception("An action of the page failed.")
        yield _line(error_event(error))
    else:
        yield _line({"event": "end"})


def _line(event: Event) -> str:
    return f"data: {json_text(_plain(event), allow_nan=False)}\n\n"


def _plain(value: Any) -> Any:
    """A value for JSON: tuples as lists, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def serve_page(session: PlaySession, token: str, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page on the loopback until the process is interrupted.

    Args:
        session: What the page plays with.
        token: The token of its address.
        port: The port; 0 takes a free one.
        ready: Called with the page's address, when it answers.

    Raises:
        DataError: The port is taken.
    """
    import uvicorn

    try:
        listener = socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise DataError(f"--port {port}: {error}", "a free port", "leave --port out for any that is free") from error
    with listener:
        actual = listener.getsockname()[1]
        config = uvicorn.Config(
            make_app(session, token, actual), log_level="warning", access_log=False, server_header=False, ws="none"
        )
        server = _announcing(config, lambda: ready(f"http://{HOST}:{actual}/?token={token}"))
        server.run(sockets=[listener])


def _announcing(config: Any, ready: Callable[[], None]) -> Any:
    """A server that says when it answers."""
    import uvicorn

    class Announcing(uvicorn.Server):  # type: ignore[misc]
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            ready()

    return Announcing(config)
