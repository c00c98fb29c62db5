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


@app.command()
def effects(
    out: OutOption,
    model: ModelOption = "default",
    sae: SaeOption = "default",
    sae_id: SaeIdOption = None,
    vectors: Annotated[int | None, typer.Option(help="Decoder rows to measure, drawn by seed; default: all.")] = None,
    rows_of: Annotated[str | None, typer.Option("--rows-of", help="Another SAE whose decoder rows to measure.")] = None,
    rows_of_id: Annotated[str | None, typer.Option("--rows-of-id", help="Its id within a sae-lens release.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Prompts, one a line; default: shipped neutral ones.")] = None,
    texts: Annotated[Path | None, typer.Option(help="Texts that set the strength; default: shipped neutral.")] = None,
    n_texts: Annotated[int, typer.Option(help="How many of the texts to use.")] = 8,
    rollouts: Annotated[int, typer.Option(help="Continuations of each prompt per vector; even.")] = 4,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 32,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Of sampling.")] = 50,
    top_p: Annotated[float, typer.Option(help="Of sampling; 0.3 in SAE-TS.")] = 0.3,
    ce_rise: Annotated[float, typer.Option(help="Nats a token that each vector may cost the texts.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of vectors and sampling.")] = 0,
    rows: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 512,
    work: Annotated[
        Path | None, typer.Option(help="Folder of measured parts, to go on from; default: OUT.parts.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how vectors move features of generated text, fit the linear effect approximator, write it.

    A killed run goes on where it stopped, to the same result: say the same command again.
    """
    import fgsteer as fg
    from fgsteer.data import read_documents
    from fgsteer.measuring import decoder_directions
    from fgsteer.rollouts import Sampling

    language_model, tokenizer = _load_model(model, device, dtype)
    autoencoder = _load_sae(sae, sae_id)
    source = _load_sae(rows_of, rows_of_id) if rows_of is not None else autoencoder
    directions = decoder_directions(source, vectors, seed)
    neutral, starts = fg.load_neutral()
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    with _progress("measuring effects", len(directions), as_json) as progress:
        measured = fg.EffectApproximator.measure(
            language_model,
            tokenizer,
            autoencoder,
            vectors=directions,
            prompts=list(read_documents(prompts)) if prompts else starts,
            texts=(list(read_documents(texts)) if texts else neutral)[:n_texts],
            rollouts=rollouts,
            sampling=sampling,
            target_ce_rise=ce_rise,
            rows=rows,
            work=work or out.with_name(out.name + ".parts"),
            progress=progress,
        )
    measured.save(out)
    _show({"out": str(out), **measured.about}, as_json, _print_effects)


def _print_effects(told: dict[str, Any]) -> None:
    typer.echo(
        f"{told['out']}: {told['vectors']} vectors, {told['skipped']} left out; "
        f"λ = {told['ridge_in_mean_eigenvalues']:.3g} mean eigenvalues"
    )
    typer.echo(f"on {told['held_out_vectors']} vectors held out, R² about the mean effect")
    rows = (
        ("fit", told["r2"]),
        ("bias only", 0.0),
        ("fit to shuffled effects", told["shuffled"]),
        ("ceiling set by sampling noise", told["ceiling"]),
    )
    for name, value in rows:
        typer.echo(f"  {name:<30} {value:6.3f}")
    typer.echo(
        f"share of all squared effect: fit {told['explained']:.3f}, bias only {told['explained_by_bias']:.3f}; "
        f"mean cosine of M's columns to decoder rows {told['cosine_to_decoder']:.3f}"
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


@app.command()
def features(
    file: Annotated[Path, typer.Argument(help="A vector written by fgsteer build.")],
    top: Annotated[int, typer.Option(help="How many features, by absolute weight.")] = 20,
    model: ModelOption = "default",
    sae: SaeOption = "default",
    sae_id: SaeIdOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a vector is made of: feature ids, weights, density, and the tokens they raise."""
    import fgsteer as fg
    from fgsteer.reading import describe_features, top_tokens

    vector = fg.SteeringVector.load(file)
    language_model, tokenizer = _load_model(model, "cpu", None)
    vector.check(language_model)
    raised, lowered = (
        top_tokens(language_model, tokenizer, (sign * vector.direction)[None], 10)[0] for sign in (1.0, -1.0)
    )
    rows = []
    if vector.features:
        rows = describe_features(vector, language_model, tokenizer, _load_sae(sae, sae_id), top=top)
    told = {
        "method": vector.provenance.get("method"),
        "hookpoint": str(vector.hookpoint),
        "raises": list(raised),
        "lowers": list(lowered),
        "features": [row.as_dict() for row in rows],
    }
    _show(told, as_json, _print_features)


def _print_features(told: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    console = _console()
    console.print(Text(f"{told['method']} at {told['hookpoint']}"))
    console.print(Text(f"  raises  {' '.join(told['raises'])}\n  lowers  {' '.join(told['lowers'])}"))
    if not told["features"]:
        console.print("  no features: this method works on residual means")
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("feature", "weight", "density"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("tokens its weight pushes towards")
    labelled = any(row["label"] for row in told["features"])
    if labelled:
        table.add_column("label")
    for row in told["features"]:
        share = "?" if row["density"] is None else f"{row['density']:.3%}"
        label = [Text(row["label"])] if labelled else []
        table.add_row(str(row["id"]), f"{row['weight']:.4f}", share, Text(" ".join(row["tokens"])), *label)
    console.print(table)


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


@app.command()
def saes(
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only SAEs of this model.")] = None,
    layer: Annotated[int | None, typer.Option("--layer", help="Only SAEs of this 0-based layer.")] = None,
    search: Annotated[str, typer.Option("--search", help="Words that release, id or hookpoint must have.")] = "",
    as_json: JsonOption = False,
) -> None:
    """List the pretrained SAEs of sae-lens's registry, for --sae RELEASE --sae-id ID."""
    from fgsteer.registry import registry

    _show([row.as_dict() for row in registry(model, layer, search)], as_json, _print_saes)


def _print_saes(rows: list[dict[str, Any]]) -> None:
    """A block per release, a line per SAE, never folded: ids are there to be copied."""
    from itertools import groupby

    if not rows:
        typer.echo("none in the registry of the installed sae-lens; --search takes words of its releases")
    for (release, model), members in groupby(rows, key=lambda row: (row["release"], row["model"])):
        lines = [
            (r["sae_id"], r["hookpoint"], r["width"], "" if r["l0"] is None else f"L0 {r['l0']:g}", r["neuronpedia"])
            for r in members
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        typer.echo(f"{release}  ({model})")
        for line in lines:
            typer.echo("  " + "  ".join(map(str.ljust, line, widths)).rstrip())


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
