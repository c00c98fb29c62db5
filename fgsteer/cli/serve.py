"""``fgsteer serve``: vLLM's OpenAI-compatible server, with steering."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fgsteer.cli.app import app
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    short_help="Serve a model with vLLM, steered request by request.",
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="The model: {shipped models}, or a Hugging Face id or path.")],
    vectors: Annotated[
        Path | None, typer.Option("--vectors", help="A folder of files named NAME.safetensors; each is served as NAME.")
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="Layers to steer at besides the vectors' own, such as 10,12.")
    ] = "",
    rows: Annotated[
        int,
        typer.Option(
            "--rows", min=1, max=MAX_COUNT, help="How many vectors, or features of clamps, each layer has room for."
        ),
    ] = 32,
    admin_key: Annotated[
        str | None,
        typer.Option(
            "--admin-key",
            envvar="FGSTEER_ADMIN_KEY",
            help="The key with which vectors are listed, loaded and unloaded.",
        ),
    ] = None,
    allow_uploads: Annotated[
        bool,
        typer.Option(
            "--allow-uploads", help="Let everyone load and unload vectors where the server has no key at all."
        ),
    ] = False,
) -> None:
    """Serve a model with vLLM, which steers each request as the request asks.

    All other options go to vLLM (see vllm serve --help).
    """
    from fgsteer.serving.server import serve as run

    if not re.fullmatch(r"(\d{1,9}(,|$))*", layers):
        raise DataError(
            f"--layers {layers:.100}", "numbers of layers with commas between them after --layers, such as 10,12"
        )
    run(
        model,
        vectors,
        layers=[int(layer) for layer in layers.split(",") if layer],
        rows=rows,
        more=context.args,
        admin_key=admin_key or None,
        allow_uploads=allow_uploads,
    )
