"""vLLM's OpenAI-compatible server with steering: vLLM's own command line, with our worker and one endpoint plugin.

The plugin loads the vectors and runs the canary before the server listens, and puts ``SteeringMiddleware`` around
vLLM's app.

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
from fgsteer.saes.sae import SAE
from fgsteer.serving.admission import attach
from fgsteer.serving.control import Control
from fgsteer.serving.http import Access, StartedServer, SteeringMiddleware, upload_bytes
from fgsteer.serving.offline import (
    CANARY_PROMPT,
    DEFAULT_ROWS,
    DEFAULT_SLOTS,
    canary_params,
    engine_settings,
    generated_tokens,
    need_vllm,
    start_serving,
)
from fgsteer.serving.sources import stages_by_name

PLUGIN = "fgsteer"  # the name of the entry point in pyproject.toml
_GROUPS = ("general_plugins", "io_processor_plugins", "platform_plugins", "stat_logger_plugins")
T = TypeVar("T")


class _ServingEngine:
    """An ``AsyncLLM`` as ``Control`` needs it, called from other threads than that of its event loop."""

    calls_while_admitting = False  # requests are admitted in the event loop, which answers calls

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
        async def ids() -> list[str]:  # in the event loop, where requests are admitted
            return list(self.client.output_processor.request_states)

        return self._wait(ids())

    def continuations(self, extras: Sequence[Mapping[str, Any]], tokens: int) -> list[list[tuple[int, float]]]:
        async def one(number: int, extra: Mapping[str, Any]) -> Any:
            prompt = {"prompt_token_ids": list(CANARY_PROMPT)}
            outputs = self.client.generate(prompt, canary_params(extra, tokens), f"canary-{number}")
            return [output async for output in outputs]

        async def all_at_once() -> Any:
            return await asyncio.gather(*(one(number, extra) for number, extra in enumerate(extras)))

        return [generated_tokens(outputs[-1]) for outputs in self._wait(all_at_once())]


class Plugin:
    """An endpoint plugin of vLLM (group ``vllm.endpoint_plugins``)."""

    name = PLUGIN
    required_tasks = ("generate",)
    vectors: ClassVar[str | Path | None] = None  # the folder, which is set before the server starts in its process
    saes: ClassVar[tuple[SAE, ...]] = ()
    inline: ClassVar[bool] = False
    access: ClassVar[Access] = Access()

    def __init__(self) -> None:
        self.started: StartedServer | None = None

    def attach_router(self, app: Any) -> None:
        """Put the middleware around the app; vLLM's own check of keys comes before it."""
        app.add_middleware(SteeringMiddleware, started=lambda: self.started)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Admit requests, run the canary, and load the vectors of the folder."""
        settings = (engine_client.vllm_config.additional_config or {}).get("fgsteer")
        if not settings:
            raise SteeringError(
                "a server without fgsteer's worker", "a server that fgsteer has set up", "start it with fgsteer serve"
            )
        engine = _ServingEngine(engine_client, asyncio.get_running_loop())
        control = Control(engine, settings["layers"], settings["slots"], self.saes, self.inline)
        attach(engine_client, control.admit)
        await asyncio.to_thread(start_serving, control, stages_by_name(self.vectors or {}, self.saes))
        width = control.engine.config.model_config.get_hidden_size()
        self.started = StartedServer(control, self.access, upload_bytes(settings["rows"], width), engine_client)


def set_engine_options(args: Any, model: str, settings: Mapping[str, Any]) -> None:
    """Change vLLM's parsed options to those of a steering server. Raises SteeringError for options that conflict."""
    own = settings["additional_config"]["fgsteer"]
    config = dict(args.additional_config or {})
    refused = {
        "--worker-cls": args.worker_cls not in (None, "auto"),
        "fgsteer in --additional-config": "fgsteer" in config,
        "--api-server-count": args.api_server_count not in (None, 1),
        "--grpc": bool(args.grpc),
        "--data-parallel-multi-port-external-lb": bool(args.data_parallel_multi_port_external_lb),
    }
    for option, is_set in refused.items():
        if is_set:
            raise SteeringError(
                f"the option {option}",
                "other options of vLLM",
                "a steering server sets its worker itself, and only the one process that takes requests knows the "
                "vectors: leave this option out",
            )
    args.worker_cls, args.additional_config = settings["worker_cls"], config | {"fgsteer": own}
    if not args.headless:
        args.api_server_count = 1
    if not args.served_model_name:
        args.served_model_name = [model]


def upload_access(args: Any, admin_key: str | None, allow_uploads: bool) -> Access:
    """Who may load vectors. vLLM asks for its own key before, and is told to take the admin's key too."""
    keys = [key for key in args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
    if keys and admin_key:
        args.api_key = [*keys, admin_key]
    return Access(admin_key, bool(keys), allow_uploads)


def serve(
    model: str,
    vectors: str | Path | None = None,
    *,
    layers: Iterable[int] | None = None,
    rows: int = DEFAULT_ROWS,
    vectors_per_request: int = DEFAULT_SLOTS,
    saes: Sequence[SAE] = (),
    inline_vectors: bool = False,
    more: Sequence[str] = (),
    admin_key: str | None = None,
    allow_uploads: bool = False,
) -> None:
    """Run vLLM's server with our worker, until it is stopped.

    Args:
        model: "default", "smollm2", or a Hugging Face id or path.
        vectors: A folder of files named NAME.safetensors to load.
        layers: Layers to steer at besides the vectors' own, for vectors that are loaded later.
        rows: Rows of the table at each layer.
        vectors_per_request: How many steerings a request may have, one after the other.
        saes: SAEs whose features clamps in files read, and every TopK SAE whose features are clamped.
        inline_vectors: Whether requests may carry vectors, which then take rows.
        more: Options of ``vllm serve``.
        admin_key: A key for ``/v1/steering`` alone. Without it vLLM's ``--api-key`` protects these addresses too.
        allow_uploads: Whether everyone may load and unload vectors where there is no key at all.

    Raises:
        SteeringError: vLLM is not installed, there is no layer to steer at, or an option is one that fgsteer sets.
        FormatError: A file of the folder is damaged, or of another kind.
    """
    need_vllm()
    served = stages_by_name(vectors or {}, saes)
    path, _, settings = engine_settings(model, served, layers, rows, vectors_per_request, saes)
    if not any(plugin.name == PLUGIN for plugin in entry_points(group="vllm.endpoint_plugins")):
        raise SteeringError(
            "fgsteer can be imported, but is not installed, so vLLM does not find its plugin.",
            "an installed package with entry points",
            "pip install fgsteer, or pip install -e . in its repository",
        )
    # vLLM loads endpoint plugins by name only, and then no other plugin whose name is not listed too.
    listed = os.environ.get("VLLM_PLUGINS")
    others = listed.split(",") if listed else [e.name for group in _GROUPS for e in entry_points(group=f"vllm.{group}")]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*others, PLUGIN]))
    os.environ["VLLM_USE_RUST_FRONTEND"] = "0"  # the Rust frontend would not load the plugin
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([path, *more])
    set_engine_options(args, model, settings)
    Plugin.vectors, Plugin.saes, Plugin.inline = vectors, tuple(saes), inline_vectors
    Plugin.access = upload_access(args, admin_key, allow_uploads)
    configure_logging_from_args(args)
    command = ServeSubcommand()
    command.validate(args)
    command.cmd(args)
