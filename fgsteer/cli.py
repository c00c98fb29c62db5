"""The command line: one subcommand per stage, composing through files.

    fgsteer collect wedding -o stats.safetensors
    fgsteer build fgaa --stats stats.safetensors -o wedding.safetensors
    fgsteer features wedding.safetensors
    fgsteer generate "I think" --vector wedding.safetensors --coefficient 8

Nothing heavy is imported before a command runs: ``fgsteer --help`` needs no torch.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.errors import DataError, FgsteerError, FgsteerWarning

app = typer.Typer(
    help="Steer language models with the features of sparse autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelOption = Annotated[str, typer.Option("--model", "-m", help='"default", or a Hugging Face id or path.')]
SaeOption = Annotated[str, typer.Option("--sae", help='"default", a folder, or a sae-lens release (with --sae-id).')]
SaeIdOption = Annotated[str | None, typer.Option("--sae-id", help="The id within a sae-lens release.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="File to write (safetensors).")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value, for scripts.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, auto …; default: cuda if any.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 …; default: the checkpoint's.")]


def _load_model(name: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """Model and tokenizer of the options. Raises DataError for an unknown dtype."""
    import torch

    import fgsteer as fg

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise DataError(f"--dtype {dtype}", "float32, bfloat16 or float16")
    options = {"device_map": "auto"} if device == "auto" else {}
    model, tokenizer = fg.load_model(name, dtype=getattr(torch, dtype) if dtype else None, **options)
    if device != "auto":
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model, tokenizer


def _load_sae(name: str, sae_id: str | None) -> Any:
    import fgsteer as fg

    return fg.load_sae(name, sae_id)


def _show(value: Any, as_json: bool, text: Callable[[Any], None]) -> None:
    """Print a result as JSON or for a reader."""
    if as_json:
        typer.echo(json.dumps(value, ensure_ascii=False))
    else:
        text(value)


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


@contextmanager
def _progress(what: str, total: int | None, as_json: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; the block gets a function to report how many are done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=as_json, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@app.command()
def demo(
    concepts: Annotated[list[str] | None, typer.Argument(help="Shipped concepts; two by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Steer the embedded default towards two concepts by four methods, side by side."""
    from fgsteer.demo import CONCEPTS, run

    result = run(_console(), concepts or CONCEPTS, as_json=as_json)
    _show(result, as_json, lambda _: None)


@app.command()
def collect(
    contrast: Annotated[str, typer.Argument(help="A shipped contrast set, or a .json or .jsonl file.")],
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = "default",
    sae_id: SaeIdOption = None,
    no_sae: Annotated[bool, typer.Option("--no-sae", help="Residual statistics only (with --hookpoint).")] = False,
    hookpoint: Annotated[
        list[str] | None, typer.Option("--hookpoint", help="More hookpoints, such as blocks.2.hook_resid_post.")
    ] = None,
    tokens: Annotated[str, typer.Option(help="all, last, answer, letter, or an index.")] = "all",
    bos: Annotated[bool, typer.Option("--bos", help="Read position 0 too.")] = False,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in a batch.")] = 8192,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read both sides of a contrast through the model and the SAE; write statistics."""
    import fgsteer as fg

    pairs = fg.load_contrast(contrast)
    language_model, tokenizer = _load_model(model, device, dtype)
    autoencoder = None if no_sae else _load_sae(sae, sae_id)
    rule: Any = tokens
    with suppress(ValueError):
        rule = int(tokens)
    total = pairs.count(True) + pairs.count(False)
    with _progress("collecting", total, as_json) as progress:
        stats = fg.collect(
            language_model,
            tokenizer,
            pairs,
            sae=autoencoder,
            hookpoints=hookpoint,
            tokens=rule,
            bos=bos,
            batch_tokens=batch_tokens,
            progress=progress,
        )
    stats.save(out)
    told = {"out": str(out), "hookpoints": [str(at) for at in stats.residual], "data": [dict(d) for d in stats.data]}
    _show(told, as_json, lambda v: typer.echo(f"{v['out']}: {v['data'][0]['count']} texts at {v['hookpoints']}"))


@app.command()
def density(
    corpus: Annotated[Path, typer.Argument(help='Text file, a document a line, or JSONL with a field "text".')],
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = "default",
    sae_id: SaeIdOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens read of each document.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in a batch.")] = 8192,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure on which share of a corpus's tokens each feature fires; write it beside the SAE.

    A file density.safetensors in an SAE's folder is loaded with it.
    """
    import fgsteer as fg
    from fgsteer.data import read_documents

    total = sum(1 for _ in read_documents(corpus))
    if not total:
        raise DataError(f"{corpus} has no document", "one a line")
    language_model, tokenizer = _load_model(model, device, dtype)
    autoencoder = _load_sae(sae, sae_id)
    with _progress("measuring density", total, as_json) as progress:
        measured = fg.measure_density(
            language_model,
            tokenizer,
            read_documents(corpus),
            autoencoder,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            corpus={"name": corpus.name, "texts": total},
            progress=progress,
        )
    measured.save(out)
    shares = measured.density
    told = {
        "out": str(out),
        "tokens": measured.tokens,
        "l0": float(shares.sum()),
        "dead": int((shares == 0).sum()),
        "bos_features": measured.bos_features().nonzero()[:, 0].tolist(),
    }
    _show(
        told,
        as_json,
        lambda v: typer.echo(
            f"{v['out']}: {v['tokens']} tokens, L0 {v['l0']:.1f}, {v['dead']} features never fired, "
            f"{len(v['bos_features'])} only on position 0"
        ),
    )


def _settings(pairs: list[str]) -> dict[str, Any]:
    """key=value options as Python values (JSON where it parses). Raises DataError."""
    settings = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key.isidentifier():
            raise DataError(f"--set {pair}", "key=value, such as --set n_positive=8")
        try:
            settings[key] = json.loads(value)
        except json.JSONDecodeError:
            settings[key] = value
    return settings


def _feature_weights(text: str) -> dict[int, float]:
    """{id: weight} of "12:1.5,40". Raises DataError."""
    weights = {}
    for part in text.split(","):
        feature, _, weight = part.partition(":")
        try:
            weights[int(feature)] = float(weight or 1.0)
        except ValueError as error:
            raise DataError(f"--features {text}", "ids with optional weights, such as 12:1.5,40") from error
    return weights


@app.command()
def build(
    method: Annotated[str, typer.Argument(help="caa, ace, sta, fgaa, sae_ts or from_features.")],
    out: OutOption,
    stats: Annotated[Path | None, typer.Option(help="Statistics written by fgsteer collect.")] = None,
    sae: SaeOption = "default",
    sae_id: SaeIdOption = None,
    effects: Annotated[str | None, typer.Option(help='Effect approximator: a file, or "default".')] = None,
    density: Annotated[Path | None, typer.Option(help="Density of the SAE, if not in its folder.")] = None,
    features: Annotated[str | None, typer.Option(help="Feature ids with weights, such as 12:1.5,40.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter of the method, such as n_positive=8.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Build a steering vector by a method's name; write it."""
    import fgsteer as fg

    inputs: dict[str, Any] = _settings(settings or [])
    if stats is not None:
        inputs["stats"] = fg.ContrastStatistics.load(stats)
    if method not in ("caa", "ace"):
        inputs["sae"] = _load_sae(sae, sae_id)
    if effects is not None:
        inputs["effects"] = fg.load_effects(effects)
    if density is not None:
        inputs["density"] = fg.FeatureDensity.load(density)
    if features is not None:
        inputs["features"] = _feature_weights(features)
    vector = fg.build(method, **inputs)
    vector.save(out)
    told = {
        "out": str(out),
        "method": method,
        "hookpoint": str(vector.hookpoint),
        "norm": vector.norm,
        "features": len(vector.features),
    }
    _show(
        told,
        as_json,
        lambda v: typer.echo(
            f"{v['out']}: {v['method']} at {v['hookpoint']}, norm {v['norm']:.3f}, {v['features']} features"
        ),
    )


def _measure_examples(corpus: Path, parts: tuple[Any, Any, Any], as_json: bool, **options: Any) -> Any:
    """Excerpts of a corpus file, with a progress bar. Raises DataError for one without documents."""
    import fgsteer as fg
    from fgsteer.data import read_documents

    total = sum(1 for _ in read_documents(corpus))
    if not total:
        raise DataError(f"{corpus} has no document", "one a line")
    model, tokenizer, sae = parts
    about = {"name": corpus.name, "texts": total}
    with _progress("measuring excerpts", total, as_json) as progress:
        return fg.measure_examples(
            model, tokenizer, read_documents(corpus), sae, corpus=about, progress=progress, **options
        )


@app.command()
def examples(
    corpus: Annotated[Path, typer.Argument(help='Text file, a document a line, or JSONL with a field "text".')],
    out: OutOption,
    top: Annotated[int, typer.Option(help="Excerpts kept of each feature.")] = 8,
    window: Annotated[int, typer.Option(help="Tokens kept on either side of a peak.")] = 12,
    model: ModelOption = "default",
    sae: SaeOption = "default",
    sae_id: SaeIdOption = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens read of each document.")] = 256,
    batch_tokens: Annotated[int, typer.Option(help="Padded tokens in a batch.")] = 8192,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find where in a corpus each feature fires most; write the excerpts for fgsteer features --examples."""
    parts = (*_load_model(model, device, dtype), _load_sae(sae, sae_id))
    measured = _measure_examples(
        corpus, parts, as_json, top=top, window=window, max_tokens=max_tokens, batch_tokens=batch_tokens
    )
    measured.save(out)
    fired = int((measured.documents >= 0).any(1).sum())
    told = {"out": str(out), "texts": measured.corpus["texts"], "features": len(measured.features), "fired": fired}
    _show(
        told,
        as_json,
        lambda v: typer.echo(f"{v['out']}: {v['fired']} of {v['features']} features fired in {v['texts']} texts"),
    )


def _feature_ids(text: str) -> list[int]:
    """Ids of "12,40". Raises DataError."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise DataError(f"--feature {text}", "ids, such as 12,40") from error


@app.command()
def features(
    file: Annotated[Path | None, typer.Argument(help="A vector written by fgsteer build.")] = None,
    feature: Annotated[str | None, typer.Option("--feature", help="Ids such as 12,40 instead of a vector.")] = None,
    search: Annotated[str | None, typer.Option("--search", help="A word, to find features for it.")] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Show excerpts of this text file (a document a line) or JSONL.")
    ] = None,
    examples: Annotated[Path | None, typer.Option(help="Excerpts written by fgsteer examples.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Labels: a Neuronpedia export or its folder.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write feature cards as one HTML page.")] = None,
    top: Annotated[int, typer.Option(help="How many features, by absolute weight or by --search's score.")] = 20,
    model: ModelOption = "default",
    sae: SaeOption = "default",
    sae_id: SaeIdOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show features, of a vector, by id or for a word: density, label, the tokens they raise, excerpts.

    A search that finds nothing ends with exit status 1.
    """
    import fgsteer as fg
    from fgsteer.cards import print_features, write_page

    if sum(given is not None for given in (file, feature, search)) != 1:
        raise DataError("none or several of a vector file, --feature and --search", "one of them")
    if corpus is not None and examples is not None:
        raise DataError("--corpus and --examples", "one of them")
    vector = None if file is None else fg.SteeringVector.load(file)
    ids = None if feature is None else _feature_ids(feature)
    language_model, tokenizer = _load_model(model, device, None)
    told: dict[str, Any] = {"heading": "Features" if search is None else f"Features for {search!r}"}
    if vector is not None:
        told = _describe_direction(vector, language_model, tokenizer)
    told.update(sae=None, corpus=None)
    rows = []
    if vector is None or vector.features:
        autoencoder = _load_sae(sae, sae_id)
        if labels is not None:
            autoencoder = replace(autoencoder, labels=fg.load_labels(labels, autoencoder))
        parts = (language_model, tokenizer, autoencoder)
        known = None if examples is None else fg.FeatureExamples.load(examples)
        if corpus is not None:  # a search reads the excerpts of every feature
            shown = ids if vector is None else [row.id for row in vector.top_features(top)]
            known = _measure_examples(corpus, parts, as_json, features=shown)
        rows = _feature_rows(vector or ids, search, parts, known, top)
        told.update(sae=autoencoder.source, corpus=None if known is None else known.corpus)
    told["features"] = [row.as_dict() for row in rows]
    if html is not None:
        about = {"SAE": told["sae"], "Excerpts from": (told["corpus"] or {}).get("name")}
        about |= {f"{name}:": " ".join(told[name]) for name in ("raises", "lowers") if name in told}
        write_page(html, told["heading"], rows, [f"{name} {value}" for name, value in about.items() if value])
    _show(told, as_json, print_features)
    if search is not None and not rows:
        typer.echo(f"no feature found for {search!r}: try another word, --corpus or --labels", err=True)
        raise typer.Exit(1)


def _describe_direction(vector: Any, model: Any, tokenizer: Any) -> dict[str, Any]:
    """What a vector is and the tokens that its direction raises and lowers. Raises PairingError."""
    from fgsteer.reading import top_tokens

    vector.check(model)
    method, hookpoint = vector.provenance.get("method"), str(vector.hookpoint)
    tokens = [list(top_tokens(model, tokenizer, (sign * vector.direction)[None], 10)[0]) for sign in (1.0, -1.0)]
    return {
        "heading": f"{method} at {hookpoint}",
        "method": method,
        "hookpoint": hookpoint,
        "raises": tokens[0],
        "lowers": tokens[1],
    }


def _feature_rows(chosen: Any, search: str | None, parts: tuple[Any, Any, Any], known: Any, top: int) -> list[Any]:
    """Facts on the features of a vector, on ids, or on what a search finds."""
    import fgsteer as fg

    model, tokenizer, sae = parts
    why = {}
    if search is not None:
        found = fg.find_features(search, sae, model, tokenizer, examples=known, top=top)
        why = {entry.id: entry.why for entry in found}
        chosen = list(why)
    rows: list[Any] = fg.describe_features(chosen, model, tokenizer, sae, top=top, examples=known, why=why)
    return rows


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    vector: Annotated[list[Path] | None, typer.Option("--vector", "-v", help="Vectors to apply together.")] = None,
    coefficient: Annotated[
        list[float] | None, typer.Option("--coefficient", "-c", help="One per vector: add's c, affine's α, clamp's t.")
    ] = None,
    operation: Annotated[str, typer.Option("--op", help="add, affine, ablate or clamp.")] = "add",
    scope: Annotated[str, typer.Option(help="all, prompt, generated or last_prompt_on.")] = "all",
    model: ModelOption = "default",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 48,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue prompts, unsteered and steered side by side."""
    import torch

    import fgsteer as fg

    paths = vector or []
    strengths = coefficient or [1.0] * len(paths)
    if operation not in ("add", "affine", "ablate", "clamp"):
        raise DataError(f"--op {operation}", "add, affine, ablate or clamp")
    if len(strengths) != len(paths):
        raise DataError(f"{len(strengths)} coefficients for {len(paths)} vectors", "one each, in the same order")
    language_model, tokenizer = _load_model(model, device, dtype)
    loaded = [fg.SteeringVector.load(path) for path in paths]
    arguments = [() if operation == "ablate" else (c,) for c in strengths]
    steering = [
        getattr(loaded_vector, operation)(*given, scope=scope)
        for loaded_vector, given in zip(loaded, arguments, strict=True)
    ]
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}

    def run(entries: Any) -> list[str]:
        torch.manual_seed(seed)
        texts: list[str] = fg.generate(
            language_model, tokenizer, prompts, steering=entries, max_new_tokens=max_new_tokens, **sampling
        )
        return texts

    told = {"prompts": prompts, "unsteered": run(None)}
    if steering:
        told["steered"] = run([steering] * len(prompts))
    _show(told, as_json, _print_texts)


def _print_texts(told: dict[str, Any]) -> None:
    from rich.text import Text

    console = _console()
    for number, prompt in enumerate(told["prompts"]):
        for name in ("unsteered", "steered"):
            if name in told:
                console.print(Text.assemble((f"{name}: ", "dim"), prompt, (told[name][number], "bold")))


@app.command()
def info(
    file: Annotated[
        Path | None, typer.Argument(help="Any file that fgsteer wrote; nothing: this installation.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a file holds and where it came from, or what is installed."""
    from fgsteer.info import describe_file, describe_installation

    told = describe_file(file) if file is not None else describe_installation()
    _show(told, as_json, lambda v: typer.echo(json.dumps(v, indent=2, ensure_ascii=False)))


def main() -> None:
    """Run the command line; fgsteer's own errors end with one line and exit status 2."""

    def note(message: Any, category: Any, *_: Any, **__: Any) -> None:
        if issubclass(category, FgsteerWarning):
            typer.echo(f"note: {message}", err=True)

    warnings.showwarning = note
    try:
        app()
    except FgsteerError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
