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
    vectors_per_request: Annotated[
        int,
        typer.Option(
            "--vectors-per-request",
            min=1,
            max=16,
            help="How many steerings a request may have, one after the other. Each costs time at every layer, used or "
            "not.",
        ),
    ] = 2,
    sae: Annotated[
        str | None,
        typer.Option(
            "--sae",
            help="The SAE whose features clamps in files read, as --sae of other commands. Of a TopK SAE the encoder "
            "is held by every worker beside the model.",
        ),
    ] = None,
    sae_id: Annotated[
        list[str] | None, typer.Option("--sae-id", help="The id of an SAE in a release. Repeat for several layers.")
    ] = None,
    inline_vectors: Annotated[
        bool,
        typer.Option(
            "--inline-vectors", help="Let requests carry vectors of their own, which take rows while they are used."
        ),
    ] = False,
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
    from fgsteer.cli.loading import load_sae
    from fgsteer.serving.server import serve as run

    if not re.fullmatch(r"(\d{1,9}(,|$))*", layers):
        raise DataError(
            f"--layers {layers:.100}", "numbers of layers with commas between them after --layers, such as 10,12"
        )
    ids: list[str | None] = [*sae_id] if sae_id else [None] if sae else []
    saes = [load_sae(sae, one, model) for one in ids]
    run(
        model,
        vectors,
        layers=[int(layer) for layer in layers.split(",") if layer],
        rows=rows,
        vectors_per_request=vectors_per_request,
        saes=saes,
        inline_vectors=inline_vectors,
        more=context.args,
        admin_key=admin_key or None,
        allow_uploads=allow_uploads,
    )
