"""``fgsteer bench``: measure methods against each other."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.bench_setup import (
    COSTS,
    DISTRIBUTORS,
    GENERATORS,
    KLS,
    QUICK,
    BenchOptions,
    choose_engine,
    cost_fields,
    load_contrasts,
    make_distributor,
    make_generator,
    own_texts,
    settings_by_method,
)
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import ModelOptions
from fgsteer.cli.options import (
    DeviceOption,
    DtypeOption,
    FieldOption,
    FreshOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    SaeOption,
    TrustOption,
)
from fgsteer.cli.printing import console, progress_bar, say, show
from fgsteer.cli.values import fillable, finite, parse_settings, seed_in_range
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count

if TYPE_CHECKING:
    from fgsteer.evaluation.bench.bench import Bench


@app.command(short_help="Measure methods against CAA on generated texts.")
def bench(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", callback=fillable, help="The folder for the records, the report and the pictures."),
    ],
    concept: Annotated[
        list[str] | None,
        typer.Option(
            help="A concept to measure: a shipped contrast set or a file of one. Repeat for several; "
            "by default all shipped ones."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method to measure: {bench methods}. Repeat for several; by default all for which there are SAEs "
            "and effects.",
            autocompletion=completion("bench methods"),
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure two concepts and six methods on few prompts, for a first look.")
    ] = False,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: Annotated[
        list[str] | None, typer.Option("--sae-id", help="The id of an SAE in a release. Repeat for several layers.")
    ] = None,
    effects: Annotated[
        list[str] | None,
        typer.Option(
            help="An effect approximator: a file of one, or {shipped models} for those of its SAEs. Repeat for several "
            "layers."
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            help="What scores behavior: {judges}, or the name of a chat model with --judge-url. By default embedding "
            "where it is installed, else keyword.",
            autocompletion=completion("judges"),
        ),
    ] = None,
    coherence: Annotated[
        str,
        typer.Option(
            help="What scores coherence: {coherence judges}, or the name of a chat model with --judge-url.",
            autocompletion=completion("coherence judges"),
        ),
    ] = "unsteered",
    judge_url: Annotated[
        str | None, typer.Option(help="The OpenAI-compatible address of a chat model that judges, http://…/v1.")
    ] = None,
    ce_rise: Annotated[
        list[float] | None,
        typer.Option(
            callback=finite,
            help="A cost at which strength is set: the rise in cross-entropy of neutral text, in nats a token. Repeat "
            "for several.",
        ),
    ] = None,
    cost: Annotated[
        str | None,
        typer.Option(
            help=f"What a cost is: {' or '.join(COSTS)}. The rise in cross-entropy of neutral text in nats a token "
            "(default), or KL on the steered model's own text in nats a text, which steering that leaves neutral text "
            "alone cannot escape. Texts are then drawn with nothing cut off, and the report has what each method's "
            "texts cost against the least that its behavior can cost."
        ),
    ] = None,
    kl: Annotated[
        list[float] | None,
        typer.Option(
            callback=finite,
            help="A cost at which strength is set with --cost own-text: KL on the model's own text, in nats a text. "
            f"Repeat for several; by default {', '.join(f'{one:g}' for one in KLS)}.",
        ),
    ] = None,
    matched: Annotated[
        float | None,
        typer.Option(callback=finite, help="The one of these costs at which methods are compared besides at best."),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_COUNT, help="Number of prompts in each half. Intervals are over prompts."),
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Number of seeds in each half, for every prompt.")
    ] = None,
    own_prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts-from",
            help="A file of your own prompts. Strengths are chosen on one half of them, and measured on the other.",
        ),
    ] = None,
    neutral: Annotated[
        Path | None, typer.Option(help="A file of your own neutral texts, on which costs are measured.")
    ] = None,
    field: FieldOption = "text",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Number of tokens of each generated text.")
    ] = None,
    seed: Annotated[int | None, typer.Option(callback=seed_in_range, help="The seed of all samples.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of a method, such as fgaa.n_positive=8.")
    ] = None,
    generator: Annotated[
        str, typer.Option(help=f"What generates the texts: {' or '.join(GENERATORS)}.")
    ] = "transformers",
    distribute: Annotated[
        str | None,
        typer.Option(
            help=f"What spreads the concepts over processes: {', '.join(DISTRIBUTORS)}. By default torchrun where "
            "torchrun started this process (WORLD_SIZE is above 1), else none."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Number of processes with --distribute ray.")] = 2,
    generator_settings: Annotated[
        list[str] | None,
        typer.Option("--generator-set", help="An argument of vllm.LLM, such as max_model_len=512."),
    ] = None,
    engine: Annotated[str | None, typer.Option(hidden=True)] = None,
    engine_settings: Annotated[list[str] | None, typer.Option("--engine-set", hidden=True)] = None,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure methods against CAA: behavior, coherence and their product BCS, with intervals.

    Writes the records (bench.jsonl), a report (report.html), a table (table.md) and pictures to a folder. A run that
    was killed goes on where it ended when the same command is started again.
    """
    import fgsteer as fg

    chosen_generator, chosen_distributor = choose_engine(generator, distribute, engine)
    if engine_settings:
        say("note: --engine-set is now called --generator-set", err=True)
    plan: dict[str, Any] = {
        "methods": method and tuple(method),
        "ce_rises": ce_rise and tuple(sorted(ce_rise)),
        "matched": matched,
        "prompts": prompts,
        "seeds": seeds,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "settings": settings_by_method(settings or []),
        **own_texts(own_prompts, neutral, field, prompts),
    }
    plan |= cost_fields(cost, kl, ce_rise, matched)
    plan = {key: value for key, value in plan.items() if value is not None}
    if (ce_rise or "kls" in plan) and matched is None:
        plan["matched"] = None
    options = BenchOptions(
        out=out,
        plan=plan,
        contrasts=load_contrasts(concept or (QUICK["concepts"] if quick else fg.shipped_contrasts())),
        quick=quick,
        fresh=fresh,
        model=ModelOptions(model, device, dtype, revision, trust_remote_code),
        sae=sae,
        sae_ids=sae_id or [],
        effects=effects or [],
        judge=judge,
        coherence=coherence,
        judge_url=judge_url,
    )
    made = options.make()
    with progress_bar("concepts" if chosen_distributor == "ray" else "texts", None, as_json) as bar:
        keywords = parse_settings([*(generator_settings or []), *(engine_settings or [])])
        made.generator = make_generator(chosen_generator, made, options.model, keywords)
        distributor = make_distributor(chosen_distributor, options.make, workers)
        reports = _run(distributor, made, out, bar, fresh)
    if reports:
        show(_report(made, out), as_json, _print_table)


def _run(distributor: Any, made: Bench, out: Path, progress: Any, fresh: bool) -> bool:
    """Write the records; whether this process reports them."""
    from fgsteer.storage.targets import make_folder

    command = " ".join(map(shlex.quote, ["fgsteer", *sys.argv[1:]]))
    reports: bool = distributor.run(made, make_folder(out) / "bench.jsonl", command, progress, fresh=fresh)
    return reports


def _report(made: Bench, out: Path) -> dict[str, Any]:
    """Write table, page and pictures of the records; return what the command prints."""
    import fgsteer as fg
    from fgsteer.evaluation.runs.plots import save_all
    from fgsteer.evaluation.runs.report import markdown
    from fgsteer.storage.atomic import atomic_write

    run = fg.load_run(out / "bench.jsonl")
    table = markdown(run)
    with atomic_write(out / "table.md") as temporary:
        temporary.write_text(table, encoding="utf-8")
    layers = sorted(made.saes)
    features = partial(fg.seen_features, made.model, made.tokenizer, made.saes[layers[len(layers) // 2]])
    fg.write_report(run, out / "report.html", features=features)
    save_all(run, out)
    return {"out": str(out), "records": len(run.records), "table": table}


def _print_table(printed: dict[str, Any]) -> None:
    from rich.markdown import Markdown

    console().print(Markdown(printed["table"]))
    say(f"Records of {count(printed['records'], 'text')}, the report and the pictures are in {printed['out']}.")
