"""vLLM's OpenAI-compatible server, steering: its own command line with our worker and one endpoint plugin.

The plugin loads the vectors and runs the canary before the server listens, and adds
``GET /v1/steering``, ``PUT /v1/steering/NAME`` (body: a vector's file) and ``DELETE /v1/steering/NAME``.

    fgsteer serve default --vectors vectors --dtype float32 --port 8000
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from fgsteer.errors import FgsteerError, SteeringError
from fgsteer.serving.control import Control, attach
from fgsteer.serving.offline import CANARY_PROMPT, ROWS, canary_params, chosen, engine_settings, need_vllm, start
from fgsteer.serving.served import sources

PLUGIN = "fgsteer"  # the name in pyproject.toml
_VECTORS = "FGSTEER_VECTORS"  # the folder, for the process that serves
_GROUPS = ("general_plugins", "io_processor_plugins", "platform_plugins", "stat_logger_plugins")
T = TypeVar("T")


class _Serving:
    """The Engine of an ``AsyncLLM``, called from threads other than its loop's."""

    def __init__(self, client: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.client, self.loop = client, loop

    @property
    def config(self) -> Any:
        return self.client.vllm_config

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    def call(self, method: str, *args: Any) -> list[Any]:
        replies: list[Any] = self._wait(self.client.collective_rpc(method, args=args))
        return replies

    def live_requests(self) -> list[str]:
        async def ids() -> list[str]:  # in the loop, where requests are admitted
            return list(self.client.output_processor.request_states)

        return self._wait(ids())

    def continuations(self, extras: Sequence[Mapping[str, Any]], tokens: int) -> list[list[tuple[int, float]]]:
        async def one(number: int, extra: Mapping[str, Any]) -> Any:
            prompt = {"prompt_token_ids": list(CANARY_PROMPT)}
            outputs = self.client.generate(prompt, canary_params(extra, tokens), f"canary-{number}")
            return [output async for output in outputs]

        async def all_of_them() -> Any:
            return await asyncio.gather(*(one(number, extra) for number, extra in enumerate(extras)))

        return [chosen(outputs[-1]) for outputs in self._wait(all_of_them())]


class Plugin:
    """An endpoint plugin of vLLM (group ``vllm.endpoint_plugins``)."""

    name = PLUGIN
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.control: Control | None = None

    def attach_router(self, app: Any) -> None:
        """Add the routes."""
        from starlette.routing import Route

        app.router.routes.append(Route("/v1/steering", self._answer, methods=["GET"]))
        app.router.routes.append(Route("/v1/steering/{name}", self._answer, methods=["PUT", "DELETE"]))

    async def _answer(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        control, name = self.control, request.path_params.get("name", "")
        assert control is not None  # the server listens after init_state
        try:
            if request.method == "PUT":
                await asyncio.to_thread(_load, control, name, await request.body())
            elif request.method == "DELETE":
                await asyncio.to_thread(control.unload, name)
        except (FgsteerError, OSError) as error:
            return JSONResponse({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, 400)
        return JSONResponse({"loaded": control.hookpoints(), "layers": list(control.layers)})

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Attach admission, run the canary, load the folder's vectors."""
        settings = (engine_client.vllm_config.additional_config or {}).get("fgsteer")
        if not settings:
            raise SteeringError("a server without fgsteer's worker", "fgsteer serve")
        folder = os.environ.get(_VECTORS)
        control = Control(_Serving(engine_client, asyncio.get_running_loop()), settings["layers"])
        attach(engine_client, control)
        await asyncio.to_thread(start, control, sources(folder or {}))
        self.control = control


def _load(control: Control, name: str, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(content)
        file.flush()
        control.load(name, file.name)


def arguments(
    model: str, vectors: str | Path | None, layers: Iterable[int] | None, rows: int, more: Sequence[str]
) -> list[str]:
    """Arguments of ``vllm serve`` for a steering server. Raises SteeringError, and as ``sources`` does."""
    given = {option.partition("=")[0] for option in more}
    for option in ("--worker-cls", "--additional-config", "--api-server-count", "--grpc"):
        if option in given:
            raise SteeringError(option, "vLLM's other options", "leave it out")
    path, _, settings = engine_settings(model, sources(vectors or {}), layers, rows)
    own = ["--worker-cls", settings["worker_cls"], "--additional-config", json.dumps(settings["additional_config"])]
    if "--headless" not in given:  # names live in the one process that takes requests
        own += ["--api-server-count", "1"]
    if "--served-model-name" not in given:
        own += ["--served-model-name", model]
    return [path, *own, *more]


def serve(
    model: str,
    vectors: str | Path | None = None,
    *,
    layers: Iterable[int] | None = None,
    rows: int = ROWS,
    more: Sequence[str] = (),
) -> None:
    """Run vLLM's server with our worker; ``more`` are options of ``vllm serve``.

    Raises SteeringError for options that it sets itself, and as ``sources`` does.
    """
    need_vllm()
    argv = arguments(model, vectors, layers, rows, more)
    if not any(plugin.name == PLUGIN for plugin in entry_points(group="vllm.endpoint_plugins")):
        raise SteeringError("fgsteer on the path, but not installed", "its entry points", "pip install fgsteer")
    # vLLM loads endpoint plugins by name only, and then no other plugin that is not named too
    named = os.environ.get("VLLM_PLUGINS")
    others = named.split(",") if named else [e.name for group in _GROUPS for e in entry_points(group=f"vllm.{group}")]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*others, PLUGIN]))
    os.environ["VLLM_USE_RUST_FRONTEND"] = "0"  # it would not load the plugin
    if vectors:
        os.environ[_VECTORS] = str(Path(vectors).absolute())
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)
