"""``fgsteer collect``: read a contrast through a model, write statistics."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, load_model, load_sae, work_folder
from fgsteer.cli.options import (
    BatchTokensOption,
    DeviceOption,
    DtypeOption,
    FreshOption,
    JsonOption,
    ModelOption,
    OutOption,
    PrependBosOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    TokensOption,
    TrustOption,
    WorkOption,
)
from fgsteer.cli.printing import progress_bar, say, show
from fgsteer.cli.values import hookpoints, token_rule
from fgsteer.data.file_kinds import CONTRAST_KINDS
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks


@app.command(short_help="Collect statistics of both sides of a contrast.")
def collect(
    contrast: Annotated[
        str, typer.Argument(help=f"The contrast: the name of a shipped contrast set, or a {CONTRAST_KINDS} file.")
    ],
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    no_sae: Annotated[
        bool, typer.Option("--no-sae", help="Collect without an SAE, at the hookpoints of --hookpoint.")
    ] = False,
    hookpoint: Annotated[
        list[str] | None,
        typer.Option("--hookpoint", help="A hookpoint besides the SAE's, such as blocks.2.hook_resid_post; repeat."),
    ] = None,
    tokens: TokensOption = "all",
    bos: Annotated[bool, typer.Option("--bos", help="Also read the special token that begins a text.")] = False,
    prepend_bos: PrependBosOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            min=1,
            max=MAX_COUNT,
            help="How many tokens of each text are read. By default as many as fit in the model's window.",
        ),
    ] = None,
    pooled: Annotated[
        bool,
        typer.Option(
            "--pooled/--no-pooled",
            help="Whether to keep the mean activation of every text, which fgsteer diagnose needs.",
        ),
    ] = True,
    work: WorkOption = None,
    fresh: FreshOption = False,
    batch_tokens: BatchTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read both sides of a contrast through the model and the SAE, and write the statistics of their activations.

    Under torchrun (torchrun … -m fgsteer collect …) the processes share the texts.
    """
    import fgsteer as fg

    pairs = fg.load_contrast(contrast)
    at_hookpoints, rule = hookpoints(hookpoint), token_rule(tokens)
    if no_sae and not at_hookpoints:
        raise DataError(
            "--no-sae without --hookpoint",
            "a hookpoint to collect at",
            "add one, such as --hookpoint blocks.2.hook_resid_post",
        )
    check_device(device, dtype)
    autoencoder = None if no_sae else load_sae(sae, sae_id, model)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    total = pairs.count(True) + pairs.count(False)
    with progress_bar("collecting", total, as_json) as progress:
        stats = fg.collect(
            language_model,
            tokenizer,
            pairs,
            sae=autoencoder,
            hookpoints=at_hookpoints,
            tokens=rule,
            bos=bos,
            prepend_bos=prepend_bos,
            max_tokens=max_tokens,
            keep_pooled=pooled,
            batch_tokens=batch_tokens,
            work=work_folder(work, out),
            fresh=fresh,
            progress=progress,
        )
    if not Ranks.from_env().rank:
        stats.save(out)
    result = {"out": str(out), "hookpoints": [str(at) for at in stats.residual], "data": [dict(d) for d in stats.data]}
    show(result, as_json, _print_collected)


def _print_collected(result: dict[str, Any]) -> None:
    positive, negative = result["data"][0]["count"]
    texts = f"{positive} positive and {count(negative, 'negative text')}"
    say(f"{result['out']}: {texts} at {', '.join(result['hookpoints'])}")
