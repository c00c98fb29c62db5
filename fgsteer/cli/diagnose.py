"""``fgsteer diagnose``: how reliable a vector will be, before anything is steered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_fit, interventions, load_model
from fgsteer.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    OperationOption,
    PrependBosOption,
    RevisionOption,
    TokensOption,
    TrustOption,
)
from fgsteer.cli.printing import console, progress_bar, say, show
from fgsteer.cli.values import finite, hookpoints, token_rule
from fgsteer.errors import DataError
from fgsteer.errors.wording import count


@app.command(short_help="Tell how reliable a vector will be before steering.")
def diagnose(
    source: Annotated[
        str,
        typer.Argument(help="A file of statistics by fgsteer collect, or a contrast set: a shipped name or a file."),
    ],
    vector: Annotated[
        Path | None,
        typer.Option("--vector", "-v", help="A file of the vector to diagnose; by default the difference of means."),
    ] = None,
    hookpoint: Annotated[
        list[str] | None,
        typer.Option(
            "--hookpoint", help="A hookpoint to diagnose at, such as blocks.2.hook_resid_post. Repeat for several."
        ),
    ] = None,
    coefficient: Annotated[
        float | None,
        typer.Option(
            "--coefficient",
            "-c",
            callback=finite,
            help="Also measure a receipt of the vector at this coefficient: its dose beside the activations, what own "
            "texts cost, inputs that move the wrong way, what is kept, drift over turns, and rerouted attention.",
        ),
    ] = None,
    operation: OperationOption = "add",
    store: Annotated[
        bool, typer.Option("--store", help="Store the receipt in the vector's file, whose model card then shows it.")
    ] = False,
    model: ModelOption = "default",
    tokens: TokensOption = "all",
    prepend_bos: PrependBosOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell how reliable a vector will be before steering: whether differences agree, and how far the sides are apart.

    Of a contrast set, activations are collected at the end of every layer; statistics have their own hookpoints. A
    vector is best diagnosed on texts that did not build it: where a contrast set has held-out texts, they are shown
    too.
    """
    import fgsteer as fg
    from fgsteer.storage.files import is_tensors

    chosen = None if vector is None else fg.SteeringVector.load(vector)
    _check_receipt(coefficient, store, chosen)
    if chosen is not None and hookpoint:
        raise DataError("both", "either --vector or --hookpoint", "leave out --hookpoint: a vector has its own")
    places_asked = hookpoints(hookpoint)
    if is_tensors(source):
        stats = {"collected": fg.ContrastStatistics.load(source)}
    else:
        if chosen is not None:
            check_fit({Path(str(vector)): chosen}, model, revision)
        if chosen is not None and prepend_bos is None:  # texts begin as those that it was built from
            prepend_bos = (chosen.provenance.get("reading") or {}).get("prepend_bos")
        reading = {"tokens": token_rule(tokens), "prepend_bos": prepend_bos}
        at = [chosen.hookpoint] if chosen else places_asked
        stats = _collect(
            fg.load_contrast(source),
            at,
            ModelOptions(model, device, dtype, revision, trust_remote_code),
            reading,
            as_json,
        )
    built_from = next(iter(stats.values()))
    places: list[Any] = [chosen.hookpoint] if chosen else (places_asked or list(built_from.residual))
    rows = []
    for at in places:
        shown = chosen or fg.caa(built_from, hookpoint=at)
        rows += [{"texts": name, **fg.diagnose(part, shown).as_dict()} for name, part in stats.items()]
    output = {"source": source, "vector": vector and str(vector), "rows": rows}
    if coefficient is not None:
        contrast = None if is_tensors(source) else source
        options = ModelOptions(model, device, dtype, revision, trust_remote_code)
        slip = _receipt(chosen, coefficient, operation, contrast, options, as_json)
        output["receipt"] = slip.as_dict()
        if store:
            slip.stored_in(chosen).save(vector)
    show(output, as_json, print_diagnosis)


def _check_receipt(coefficient: float | None, store: bool, vector: Any) -> None:
    """Raises DataError for a receipt without a vector, or to be stored without a strength."""
    if coefficient is not None and vector is None:
        raise DataError("-c without a vector", "a vector whose receipt is measured", "name its file with --vector")
    if store and coefficient is None:
        raise DataError("--store without -c", "the coefficient at which the receipt is measured", "give it with -c")


def _receipt(
    vector: Any, coefficient: float, operation: str, contrast: str | None, model: ModelOptions, as_json: bool
) -> Any:
    """The receipt of a vector."""
    import fgsteer as fg
    from fgsteer.models.chat import is_chat_model

    parts = load_model(model)
    scope = "reply" if is_chat_model(*parts) else "all"
    with progress_bar("parts of the receipt", None, as_json) as progress:
        return fg.receipt(
            *parts,
            vector,
            coefficient,
            make=lambda c: interventions([(vector, c)], operation, scope)[0],
            contrast=contrast,
            progress=progress,
        )


def _collect(
    contrast: Any,
    at: list[Any] | None,
    model: ModelOptions,
    reading: dict[str, Any],
    as_json: bool,
) -> dict[str, Any]:
    """Statistics of a contrast set, and of its held-out texts if it has any, at the hookpoints or after every layer."""
    import fgsteer as fg
    from fgsteer.models.hookpoints import blocks_of

    language_model, tokenizer = load_model(model)
    places: list[Any] = list(at or map(fg.Hookpoint, range(len(blocks_of(language_model)))))
    statistics = {}
    for name, part in (("training", contrast), ("held out", contrast.held_out)):
        if part is None:
            continue
        with progress_bar(f"collecting {name} texts", part.count(True) + part.count(False), as_json) as progress:
            statistics[name] = fg.collect(
                language_model,
                tokenizer,
                part,
                hookpoints=places,
                keep_pooled=True,
                progress=progress,
                **reading,
            )
    return statistics


def print_diagnosis(output: dict[str, Any]) -> None:
    """Print a diagnosis, and the receipt where one was measured."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    for number, heading in enumerate(("hookpoint", "texts", "examples", "norm", "agreement", "rms", "d'")):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in output["rows"]:
        examples = count(row["pairs"], "pair") if row["pairs"] else f"{row['positives']} + {row['negatives']}"
        figures = [row[key] for key in ("norm", "agreement", "rms_agreement", "d_prime")]
        table.add_row(row["hookpoint"], row["texts"], examples, *("-" if x is None else f"{x:.3f}" for x in figures))
    console().print(table)
    say("agreement: 0 where differences point every way, 1 where all point one way")
    say("d': 0 where the two sides overlap, 2 where they hardly do")
    if "receipt" in output:
        from fgsteer.receipts.record import parse_receipt

        say("")
        for name, fact in parse_receipt(output["receipt"]).facts().items():
            say(f"{name}: {fact}")
    if any(row["d_prime"] is None for row in output["rows"]):
        say("-: needs two texts of each side and their activations: run fgsteer collect without --no-pooled")
