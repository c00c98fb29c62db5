"""``fgsteer axbench``: AxBench's protocol on its own files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.bench_setup import settings_by_method
from fgsteer.cli.loading import ModelOptions, check_device, load_effects, load_model, load_sae
from fgsteer.cli.options import (
    DeviceOption,
    DtypeOption,
    FreshOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    TrustOption,
)
from fgsteer.cli.printing import console, progress_bar, show
from fgsteer.cli.values import fillable, finite, hookpoints, writable
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.storage.ranks import Ranks


@app.command(short_help="Run AxBench's protocol on its own files.")
def axbench(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of AxBench, such as axbench/concept500/prod_2b_l10_v1.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", callback=fillable, help="The folder for vectors, answers, results and the table."),
    ],
    instructions: Annotated[
        Path | None,
        typer.Option(
            "--instructions", help="The file of instructions, alpaca_eval.json. By default the one beside the data."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="A method to compare, such as diffmean, sae_a or reps_sae; a name that is unknown lists them all. "
            "Repeat for several; by default all for which there are an SAE and effects.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, max=MAX_COUNT, help="How many concepts, the first ones.")
    ] = None,
    mode: Annotated[
        str, typer.Option("--mode", help="Whether the concept is added (steer), or asked for and removed (suppress).")
    ] = "steer",
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    hookpoint: Annotated[
        str | None,
        typer.Option(
            "--hookpoint", help="Where vectors act without an SAE, such as blocks.10.hook_resid_post, or a layer."
        ),
    ] = None,
    effects: Annotated[
        str | None,
        typer.Option("--effects", help="The SAE's effects: a file, or {shipped models} for those of its SAE."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            "--judge",
            help="What rates answers: the name of a chat model, as AxBench has gpt-4o-mini, or embedding, which works "
            "offline and on another scale. Without it there are detection, answers and perplexity.",
        ),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", help="The OpenAI-compatible address of the chat model, http://…/v1.")
    ] = None,
    judge_cache: Annotated[
        Path | None,
        typer.Option("--judge-cache", callback=writable, help="A file that keeps the chat model's ratings."),
    ] = None,
    factor: Annotated[
        list[float] | None,
        typer.Option("--factor", callback=finite, help="A factor of h + f·a_max·v. Repeat for several."),
    ] = None,
    trained_factor: Annotated[
        list[float] | None,
        typer.Option(
            "--trained-factor",
            callback=finite,
            help="A factor of vectors that are trained at factors of their own. Repeat for several.",
        ),
    ] = None,
    prompts: Annotated[
        int,
        typer.Option(
            "--prompts", min=2, max=MAX_COUNT, help="Instructions of a concept; the first half chooses the factor."
        ),
    ] = 10,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, max=MAX_COUNT, help="Tokens of an answer.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", callback=finite, help="What logits are divided by.")
    ] = 1.0,
    together: Annotated[
        int, typer.Option("--together", min=1, max=MAX_COUNT, help="Vectors that are trained in common batches.")
    ] = 8,
    batch_rows: Annotated[
        int, typer.Option("--batch-rows", min=1, max=MAX_COUNT, help="Answers that are written together.")
    ] = 32,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of a method, such as reps.epochs=6.")
    ] = None,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="Whether answers are written; else detection alone.")
    ] = True,
    seed: Annotated[int, typer.Option("--seed", min=0, max=MAX_COUNT, help="The seed of samples and training.")] = 0,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run AxBench's protocol (arXiv 2501.17148) with the methods of this package.

    Reads AxBench's files, makes a vector of each concept by each method, measures detection, writes answers at every
    factor, has them rated, and prints a table with the published figures beside it. A run that was stopped goes on when
    the same command is started again.
    """
    import fgsteer as fg
    from fgsteer.evaluation.axbench.protocol import FACTORS, TRAINED_FACTORS

    plan = fg.AxBenchPlan(
        methods=tuple(method) if method else None,
        mode=mode,  # type: ignore[arg-type]
        factors=tuple(factor or FACTORS),
        trained_factors=tuple(trained_factor or TRAINED_FACTORS),
        instructions=prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        settings=settings_by_method(settings or []) or {},
        together=together,
        batch_rows=batch_rows,
        seed=seed,
    )
    at = None if hookpoint is None else (hookpoints([hookpoint]) or [None])[0]
    data = fg.load_axbench(folder, instructions=instructions)
    rater = _rater(judge, judge_url, judge_cache)
    check_device(device, dtype)
    if Ranks.from_env().world > 1:
        raise DataError("several processes for axbench", "one process", "give each process concepts of its own")
    autoencoder = None if at is not None and sae is None else load_sae(sae, sae_id, model)
    measured = None if effects is None else load_effects(effects, sae_id)
    language_model, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
    with progress_bar("methods × concepts", None, as_json) as progress:
        result = fg.axbench(
            language_model,
            tokenizer,
            data,
            out,
            sae=autoencoder,
            effects=measured,
            hookpoint=at,
            rater=rater,
            plan=plan,
            limit=limit,
            write=write,
            fresh=fresh,
            progress=progress,
        )
    show({"out": str(out), "verdict": result.verdict, **result.content, "table": result.table}, as_json, _print_table)


def _rater(judge: str | None, url: str | None, cache: Path | None) -> Any:
    """The rater of the options. Raises DataError for options that nothing reads."""
    import fgsteer as fg

    if judge in (None, "embedding"):
        for option, value in (("--judge-url", url), ("--judge-cache", cache)):
            if value is not None:
                raise DataError(f"{option} without a chat model", "the name of one", "add --judge gpt-4o-mini")
        return None if judge is None else fg.EmbeddingRater()
    from fgsteer.evaluation.judges.chat_client import OPENAI

    return fg.EndpointRater(judge, base_url=url or OPENAI, cache=cache)


def _print_table(printed: dict[str, Any]) -> None:
    from rich.markdown import Markdown

    console().print(Markdown(printed["table"]))
