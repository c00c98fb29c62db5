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
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks


@app.command()
def collect(
    contrast: Annotated[str, typer.Argument(help="A shipped contrast set, or a .json or .jsonl file.")],
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    no_sae: Annotated[bool, typer.Option("--no-sae", help="Residual statistics only (with --hookpoint).")] = False,
    hookpoint: Annotated[
        list[str] | None, typer.Option("--hookpoint", help="More hookpoints, such as blocks.2.hook_resid_post.")
    ] = None,
    tokens: TokensOption = "all",
    bos: Annotated[bool, typer.Option("--bos", help="Read the special token before a text too.")] = False,
    prepend_bos: PrependBosOption = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", min=1, max=MAX_COUNT, help="Tokens read of each text. Default: the model's window."
        ),
    ] = None,
    pooled: Annotated[
        bool, typer.Option("--pooled/--no-pooled", help="Keep every text's mean activations, for fgsteer diagnose.")
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
    """Read both sides of a contrast through the model and the SAE; write statistics.

    Under torchrun (torchrun … -m fgsteer collect …) the processes share the texts.
    """
    import fgsteer as fg

    pairs = fg.load_contrast(contrast)
    wanted, rule = hookpoints(hookpoint), token_rule(tokens)
    if no_sae and not wanted:
        raise DataError(
            "--no-sae without --hookpoint", "a place to read", "such as --hookpoint blocks.2.hook_resid_post"
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
            hookpoints=wanted,
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
    told = {"out": str(out), "hookpoints": [str(at) for at in stats.residual], "data": [dict(d) for d in stats.data]}
    show(told, as_json, _print_collected)


def _print_collected(told: dict[str, Any]) -> None:
    positive, negative = told["data"][0]["count"]
    say(f"{told['out']}: {positive} + {count(negative, 'text')} at {', '.join(told['hookpoints'])}")
