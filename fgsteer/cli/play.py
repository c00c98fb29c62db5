"""``fgsteer play``: a page on this machine to steer on, and to see what steering did."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import ModelOptions, load_model
from fgsteer.cli.options import DeviceOption, DtypeOption, RevisionOption, SaeOption, TrustOption
from fgsteer.cli.printing import say
from fgsteer.cli.values import fillable
from fgsteer.errors import DataError


@app.command(short_help="Open a page to steer on, and to see what steering did.")
def play(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The model: {shipped models}, or a Hugging Face id or path. By default smollm2 where it is installed.",
        ),
    ] = None,
    sae: SaeOption = None,
    sae_id: Annotated[
        list[str] | None, typer.Option("--sae-id", help="The id of an SAE in a release. Repeat for several.")
    ] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            "--vectors",
            callback=fillable,
            help="A folder of vectors, which the page offers, and to which it saves.",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            help="The address of a running fgsteer serve of this model, which then writes the texts, such as "
            "http://127.0.0.1:8000.",
        ),
    ] = None,
    server_key: Annotated[
        str, typer.Option("--server-key", envvar="FGSTEER_SERVER_KEY", help="The key of that server.")
    ] = "",
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="What scores behavior: {judges}, or the name of a chat model with --judge-url.",
            autocompletion=completion("judges"),
        ),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="The OpenAI-compatible address of a chat model that judges, http://…/v1.")
    ] = None,
    concept: Annotated[
        str, typer.Option("--concept", help="The contrast set of the behavior that --judge scores.")
    ] = "sea",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="The port. 0 takes any that is free.")] = 8765,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Whether to open a browser.")] = True,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Open a page on this machine to steer on, and to see what steering did."""
    import secrets

    from fgsteer.models.shipped import DEFAULT, SHIPPED
    from fgsteer.play.served import SteeringServer
    from fgsteer.play.session import PlaySession, sae_sources
    from fgsteer.play.web import need_play, serve_page

    need_play()
    if judge is None and judge_url is not None:
        raise DataError("--judge-url without --judge", "the name of the chat model after --judge")
    served = None if server is None else SteeringServer(server, server_key)
    if model is None:
        smollm2 = SHIPPED["smollm2"]
        model = smollm2.name if _is_there(smollm2) else DEFAULT
        if model == DEFAULT:
            say("note: SmolLM2 is not installed here, so the page plays with the embedded model.", err=True)
    sources, first = sae_sources(model, sae, sae_id or [])
    parts = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    session = PlaySession(
        *parts,
        model,
        sources,
        first_sae=first,
        dtype=dtype,
        folder=vectors,
        judge=None if judge is None else _judge(judge, judge_url, concept),
        server=served,
    )
    session.sae(first)

    def ready(address: str) -> None:
        say(f"The page is at {address}")
        say("It answers this machine alone. Ctrl-C ends it.")
        if browser:
            import webbrowser

            webbrowser.open(address)

    serve_page(session, secrets.token_urlsafe(24), port, ready)


def _is_there(shipped: Any) -> bool:
    """Whether a shipped model's SAEs and weights are on this machine."""
    from importlib.util import find_spec

    return shipped.is_installed() and (shipped.weights is None or find_spec(shipped.weights.module) is not None)


def _judge(name: str, url: str | None, concept: str) -> tuple[Any, str]:
    """The judge of behavior, and its concept. Raises DataError."""
    import fgsteer as fg
    from fgsteer.evaluation.judges import table

    contrast = fg.load_contrast(concept)
    row = table.spec(name, url)
    contrasts = [contrast.hold_out() if row.learns else contrast]
    return row.load()(table.JudgeOptions(contrasts, name, url, None)), contrast.name
