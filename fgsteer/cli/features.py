"""``fgsteer features``: show the features of a vector, of ids, of a word, or of a contrast set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.examples import measure_excerpts
from fgsteer.cli.loading import (
    ModelOptions,
    check_device,
    check_fit,
    count_documents,
    load_effects,
    load_model,
    load_sae,
)
from fgsteer.cli.options import (
    DeviceOption,
    FieldOption,
    JsonOption,
    ModelOption,
    RevisionOption,
    SaeIdOption,
    SaeOption,
    TrustOption,
)
from fgsteer.cli.printing import console, progress_bar, say, show
from fgsteer.cli.values import check_unicode, parse_settings, writable
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT


@app.command(short_help="Show features of a vector, a word or a contrast set.")
def features(
    file: Annotated[Path | None, typer.Argument(help="A vector that fgsteer build wrote.")] = None,
    feature: Annotated[
        str | None, typer.Option("--feature", help="Ids of features, such as 12,40, instead of a vector.")
    ] = None,
    search: Annotated[
        str | None, typer.Option("--search", help="A word for which features are sought, instead of a vector.")
    ] = None,
    contrast: Annotated[
        str | None,
        typer.Option(
            "--contrast", help="A contrast set for which features are ranked, instead of a vector: a name or a file."
        ),
    ] = None,
    rank: Annotated[
        str,
        typer.Option("--rank", help="What ranks features for --contrast: {rankings}."),
    ] = "max_auc",
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the ranking, such as min_support=10; repeat for several."),
    ] = None,
    effects: Annotated[
        str | None,
        typer.Option("--effects", help="Effects for --rank causal_effect: a file, or one of {shipped models}."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Show excerpts of this corpus, a file as fgsteer examples reads it.")
    ] = None,
    field: FieldOption = "text",
    examples: Annotated[
        Path | None,
        typer.Option(help="A file of excerpts that fgsteer examples wrote. By default the one beside the SAE."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Labels of features: an export of Neuronpedia, or the folder of one.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(callback=writable, help="A file to write the features to, as one HTML page.")
    ] = None,
    top: Annotated[
        int,
        typer.Option(
            min=1,
            max=MAX_COUNT,
            help="How many features to show: those with the largest weights, or found best by --search.",
        ),
    ] = 20,
    model: ModelOption = "default",
    sae: SaeOption = None,
    sae_id: SaeIdOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the features of a vector, of ids, of a word, or of a contrast set: density, label, tokens, excerpts.

    A ranking for a contrast set chooses on one half of its texts and reports on the other. A search that finds
    nothing ends with exit status 1.
    """
    import fgsteer as fg
    from fgsteer.features.cards import print_features, write_page

    _check_sources({"a vector": file, "--feature": feature, "--search": search, "--contrast": contrast})
    if contrast is None and (settings or effects or rank != "max_auc"):
        raise DataError("--rank, --set or --effects without --contrast", "a contrast set to rank features for")
    ranked = None if contrast is None else _Ranked(contrast, rank, settings or [], effects, sae_id)
    if corpus is not None and examples is not None:
        raise DataError("both", "either --corpus or --examples", "both say where excerpts come from: leave one out")
    check_unicode(search)
    vector = None if file is None else fg.SteeringVector.load(file)
    ids = None if feature is None else _feature_ids(feature)
    if vector is not None:
        check_fit({Path(str(file)): vector}, model, revision)
    known = None if examples is None else fg.FeatureExamples.load(examples)
    if corpus is not None:
        count_documents(corpus, field)
    check_device(device, None)
    autoencoder = None
    if vector is None or vector.features:
        autoencoder = load_sae(sae, sae_id, model)
        if labels is not None:
            autoencoder = replace(autoencoder, labels=fg.load_labels(labels, autoencoder))
        for feature_id in ids or []:
            autoencoder.direction(feature_id)  # raises for an id that the SAE does not have
        known = fg.load_examples(autoencoder) if known is None else known.check(autoencoder)
    language_model, tokenizer = load_model(ModelOptions(model, device, None, revision, trust_remote_code))
    result: dict[str, Any] = {"heading": "Features" if search is None else f"Features for {search!r}"}
    if vector is not None:
        result = _describe_direction(vector, language_model, tokenizer)
    result.update(sae=None, corpus=None)
    rows = []
    if autoencoder is not None:
        parts = (language_model, tokenizer, autoencoder)
        if corpus is not None:  # for a search, ids is None: the excerpts of every feature are needed
            shown = ids if vector is None else [row.id for row in vector.top_features(top)]
            known = measure_excerpts(corpus, field, parts, as_json, features=shown)
        chosen = (vector or ids) if ranked is None else ranked.ids(*parts, top, result, as_json)
        rows = _feature_rows(chosen, search, parts, known, top)
        result.update(sae=autoencoder.source, corpus=None if known is None else known.corpus)
    result["features"] = [row.as_dict() for row in rows]
    if html is not None:
        about = {"SAE": result["sae"], "Excerpts from": (result["corpus"] or {}).get("name")}
        about |= {f"{name}:": " ".join(result[name]) for name in ("raises", "lowers") if name in result}
        write_page(html, result["heading"], rows, [f"{name} {value}" for name, value in about.items() if value])
    show(result, as_json, lambda described: print_features(described, console()))
    if search is not None and not rows:
        say(f"No feature was found for {search!r}. Try another word, --corpus or --labels.", err=True)
        raise typer.Exit(1)


def _check_sources(sources: dict[str, Any]) -> None:
    """Raises DataError unless features are asked for in one way."""
    if sum(value is not None for value in sources.values()) != 1:
        chosen = " and ".join(name for name, value in sources.items() if value is not None)
        raise DataError(
            chosen or f"neither {' nor '.join(sources)}", "one of a vector, --feature, --search and --contrast"
        )


class _Ranked:
    """A ranking that is asked for; what it is made of is loaded before the model."""

    def __init__(self, contrast: str, rank: str, settings: list[str], effects: str | None, sae_id: str | None) -> None:
        import fgsteer as fg
        from fgsteer.selection.names import RANKINGS

        if rank not in RANKINGS:
            raise DataError(f"--rank {rank:.60}", f"one of {', '.join(RANKINGS)} after --rank")
        if (rank == "causal_effect") != (effects is not None):
            raise DataError(f"--rank {rank} with{'out' if effects is None else ''} --effects", "both, or neither")
        self.contrast, self.by = fg.load_contrast(contrast), rank
        self.settings = parse_settings(settings)
        self.effects = None if effects is None else load_effects(effects, sae_id)

    def ids(self, model: Any, tokenizer: Any, sae: Any, top: int, result: dict[str, Any], as_json: bool) -> list[int]:
        """The first features; the result is told of the ranking."""
        import fgsteer as fg

        with progress_bar("reading texts", None, as_json) as progress:
            ranking = fg.rank_features(
                model,
                tokenizer,
                sae,
                self.contrast,
                by=self.by,
                effects=self.effects,
                progress=progress,
                **self.settings,
            )
        result.update(heading=ranking.about(), ranking=ranking.as_dict(top))
        return ranking[:top]


def _feature_ids(text: str) -> list[int]:
    """Parse ids such as "12,40". Raises DataError."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DataError(f"--feature {text:.80}", "ids of features after --feature, such as 12,40") from error
    if len(set(ids)) < len(ids):
        raise DataError(f"--feature {text:.80}", "each id once after --feature")
    return ids


def _describe_direction(vector: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a vector is and the tokens that its direction raises and lowers. Raises PairingError."""
    from fgsteer.models.unembedding import residual_direction, top_tokens

    vector.check(model)
    written = residual_direction(model, vector.hookpoint, vector.direction)
    method, hookpoint = vector.provenance.get("method"), str(vector.hookpoint)
    tokens = [list(top_tokens(model, tokenizer, (sign * written)[None], 10)[0]) for sign in (1.0, -1.0)]
    return {
        "heading": f"{method} at {hookpoint}",
        "method": method,
        "hookpoint": hookpoint,
        "raises": tokens[0],
        "lowers": tokens[1],
    }


def _feature_rows(chosen: Any, search: str | None, parts: tuple[Any, Any, Any], known: Any, top: int) -> list[Any]:
    """What is known of the features of a vector, of ids, or of those that a search finds."""
    import fgsteer as fg

    model, tokenizer, sae = parts
    why = {}
    if search is not None:
        hits = fg.find_features(model, tokenizer, sae, search, examples=known, top=top)
        why = {hit.id: hit.why for hit in hits}
        chosen = list(why)
    rows: list[Any] = fg.describe_features(model, tokenizer, sae, chosen, top=top, examples=known, why=why)
    return rows
