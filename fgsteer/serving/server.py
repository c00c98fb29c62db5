"""vLLM's OpenAI-compatible server, steering: its own command line with our worker and one endpoint plugin.

The plugin loads the vectors and runs the canary before the server listens, and puts ``http.Door`` around vLLM's app.

    fgsteer serve default --vectors vectors --dtype float32 --port 8000
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fgsteer.errors import SteeringError
from fgsteer.serving.control import Control, attach
from fgsteer.serving.http import Access, Door, Ready, upload_bytes
from fgsteer.serving.offline import CANARY_PROMPT, ROWS, canary_params, chosen, engine_settings, need_vllm, start
from fgsteer.serving.served import sources

PLUGIN = "fgsteer"  # the name in pyproject.toml
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
    vectors: ClassVar[str | Path | None] = None  # the folder; set before the server starts, in its process
    access: ClassVar[Access] = Access()

    def __init__(self) -> None:
        self.ready: Ready | None = None

    def attach_router(self, app: Any) -> None:
        """Stand around the app, within vLLM's own check of keys."""
        app.add_middleware(Door, ready=lambda: self.ready)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Attach admission, run the canary, load the folder's vectors."""
        settings = (engine_client.vllm_config.additional_config or {}).get("fgsteer")
        if not settings:
            raise SteeringError("a server without fgsteer's worker", "fgsteer serve")
        control = Control(_Serving(engine_client, asyncio.get_running_loop()), settings["layers"])
        attach(engine_client, control)
        await asyncio.to_thread(start, control, sources(self.vectors or {}))
        width = control.engine.config.model_config.get_hidden_size()
        self.ready = Ready(control, self.access, upload_bytes(settings["rows"], width))


def settle(args: Any, model: str, settings: Mapping[str, Any]) -> None:
    """Make vLLM's parsed options those of a steering server. Raises SteeringError for options that cannot be."""
    own = settings["additional_config"]["fgsteer"]
    given = dict(args.additional_config or {})
    refused = {
        "--worker-cls": args.worker_cls not in (None, "auto"),
        "fgsteer in --additional-config": "fgsteer" in given,
        "--api-server-count": args.api_server_count not in (None, 1),
        "--grpc": bool(args.grpc),
        "--data-parallel-multi-port-external-lb": bool(args.data_parallel_multi_port_external_lb),
    }
    for option, there in refused.items():
        if there:
            raise SteeringError(option, "vLLM's other options: one process takes requests, and knows the vectors")
    args.worker_cls, args.additional_config = settings["worker_cls"], given | {"fgsteer": own}
    if not args.headless:
        args.api_server_count = 1
    if not args.served_model_name:
        args.served_model_name = [model]


def admit_keys(args: Any, admin_key: str | None, allow_uploads: bool) -> Access:
    """Who may upload; vLLM, which asks for its own key first, takes the admin's too."""
    keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    if keys and admin_key:
        args.api_key = [*keys, admin_key]
    return Access(admin_key, bool(keys), allow_uploads)


def serve(
    model: str,
    vectors: str | Path | None = None,
    *,
    layers: Iterable[int] | None = None,
    rows: int = ROWS,
    more: Sequence[str] = (),
    admin_key: str | None = None,
    allow_uploads: bool = False,
) -> None:
    """Run vLLM's server with our worker; ``more`` are options of ``vllm serve``.

    ``admin_key`` is a key for ``/v1/steering`` alone. Without it vLLM's ``--api-key`` stands before it too; without
    either nothing can be uploaded unless ``allow_uploads``. Raises SteeringError for options that it sets
    itself, and as ``sources`` does.
    """
    need_vllm()
    path, _, settings = engine_settings(model, sources(vectors or {}), layers, rows)
    if not any(plugin.name == PLUGIN for plugin in entry_points(group="vllm.endpoint_plugins")):
        raise SteeringError("fgsteer on the path, but not installed", "its entry points", "pip install fgsteer")
    # vLLM loads endpoint plugins by name only, and then no other plugin that is not named too
    named = os.environ.get("VLLM_PLUGINS")
    others = named.split(",") if named else [e.name for group in _GROUPS for e in entry_points(group=f"vllm.{group}")]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*others, PLUGIN]))
    os.environ["VLLM_USE_RUST_FRONTEND"] = "0"  # it would not load the plugin
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([path, *more])
    settle(args, model, settings)
    Plugin.vectors, Plugin.access = vectors, admit_keys(args, admin_key, allow_uploads)
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)
