"""The command that serves: vLLM's OpenAI-compatible server, steering."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from fgsteer.cli.app import app
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help='"default", or a Hugging Face id or path.')],
    vectors: Annotated[Path | None, typer.Option("--vectors", help="Folder of NAME.safetensors to load.")] = None,
    layers: Annotated[str, typer.Option("--layers", help="More layers to steer at, such as 10,12.")] = "",
    rows: Annotated[int, typer.Option("--rows", min=1, max=MAX_COUNT, help="Room for vectors at each layer.")] = 32,
    admin_key: Annotated[
        str | None,
        typer.Option("--admin-key", envvar="FGSTEER_ADMIN_KEY", help="Key to list, load and unload vectors with."),
    ] = None,
    allow_uploads: Annotated[
        bool, typer.Option("--allow-uploads", help="Let anyone load vectors where there is no key at all.")
    ] = False,
) -> None:
    """Serve with vLLM, each request steered as it asks. Other options go to vLLM (vllm serve --help)."""
    from fgsteer.serving.server import serve as run

    if not re.fullmatch(r"(\d{1,9}(,|$))*", layers):
        raise DataError(f"--layers {layers:.100}", "layer numbers with commas between")
    run(
        model,
        vectors,
        layers=[int(layer) for layer in layers.split(",") if layer],
        rows=rows,
        more=context.args,
        admin_key=admin_key or None,
        allow_uploads=allow_uploads,
    )
