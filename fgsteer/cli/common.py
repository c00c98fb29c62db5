"""What the commands share: the application, options, loading, and how results are shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.doors import check_device, check_fit, fillable, finite, writable
from fgsteer.cli.terminal import json_text, say
from fgsteer.errors import DataError
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.wording import count
from fgsteer.storage.ranks import Ranks

app = typer.Typer(
    help="Steer language models with the features of sparse autoencoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

MOST = 2**31 - 1  # of what is counted: tokens, texts, rows
SEEDS = {"min": -(2**63), "max": 2**63 - 1}  # what torch takes

ModelOption = Annotated[str, typer.Option("--model", "-m", help='"default", or a Hugging Face id or path.')]
SaeOption = Annotated[
    str | None,
    typer.Option(
        "--sae", help='"default" (taken where the model is), a folder, or a sae-lens release (with --sae-id).'
    ),
]
SaeIdOption = Annotated[str | None, typer.Option("--sae-id", help="The id within a sae-lens release.")]


OutOption = Annotated[Path, typer.Option("--out", "-o", callback=writable, help="File to write (safetensors).")]
VectorOption = Annotated[list[Path] | None, typer.Option("--vector", "-v", help="Vectors to apply together.")]
CoefficientOption = Annotated[
    list[float] | None,
    typer.Option("--coefficient", "-c", callback=finite, help="One per vector: add's c, affine's α, clamp's t."),
]
OperationOption = Annotated[str, typer.Option("--op", help="add, affine, ablate or clamp.")]
ScopeOption = Annotated[str, typer.Option("--scope", help="all, prompt, generated or last_prompt_on.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value, for scripts.")]
TokensOption = Annotated[
    str,
    typer.Option("--tokens", help="all, last, answer, letter, tail (of a chat template), or an index."),
]
FieldOption = Annotated[
    str, typer.Option("--field", help="Field or column of the text in .jsonl, .json, .csv, .tsv and .parquet.")
]
PrependBosOption = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Put BOS before every text, or leave it away; default: as the SAE was trained, else the tokenizer.",
    ),
]
MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=2, max=MOST, help="Tokens read of each document.")]
BatchTokensOption = Annotated[
    int | None,
    typer.Option("--batch-tokens", min=1, max=MOST, help="Padded tokens in a batch; default: what suits the device."),
]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        "--work", callback=fillable, help="Folder of finished parts, to go on from; under torchrun OUT.parts."
    ),
]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Start over: remove what a killed run, or one of something else, left.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, auto …; default: cuda if any.")]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 …; default: the checkpoint's.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a model of the hub; default: main.")
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the model brings: read it before.")
]


def load_model(
    name: str, device: str | None, dtype: str | None, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model and tokenizer of the options.

    Raises DataError for an unknown dtype or device and a revision of a folder, MissingError for a model.
    """
    import torch
    from transformers.utils import logging

    import fgsteer as fg
    from fgsteer.models.embedded import DEFAULT

    logging.disable_progress_bar()  # of reading weights; downloads keep theirs
    check_device(device, dtype)
    options: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    if revision is not None:
        if name == DEFAULT or Path(name).exists():
            raise DataError(f"--revision {revision} of {name}", "a model of the hub: files have no revisions")
        options["revision"] = revision
    model, tokenizer = fg.load_model(name, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    try:
        if device != "auto":
            model = model.to(device or _own_device(torch.cuda.device_count()))
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is unknown, missing or full
        raise DataError(f"--device {device}: {error}".partition("\n")[0], "a device of this machine") from error
    return model, tokenizer


def _own_device(gpus: int) -> str:
    """A GPU where there is one: of those of this machine, the one for this process."""
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"


def documents(path: Path, field: str) -> list[str]:
    """The texts of a file. Raises DataError for none, or one that cannot be read."""
    from fgsteer.data.corpora import read_documents

    found = list(read_documents(path, field))
    if not found:
        raise DataError(f"{path} has no document", "one at least")
    return found


def work_folder(work: Path | None, out: Path) -> Path | None:
    """Where parts of the work are kept: as asked, else beside the output where several processes share the work."""
    shared = Ranks.from_env().world > 1
    return work or (out.with_name(out.name + ".parts") if shared else None)


def load_vectors(
    paths: list[Path] | None,
    coefficients: list[float] | None,
    operation: str = "add",
    model: str | None = None,
    revision: str | None = None,
) -> list[tuple[Any, float]]:
    """Vectors with their coefficients, which are 1, and said to be, where none are given.

    Raises DataError for unequal numbers of them, FormatError, PairingError for vectors of another model.
    """
    import fgsteer as fg

    paths = paths or []
    strengths = coefficients or [1.0] * len(paths)
    if len(strengths) != len(paths):
        told = f"{count(len(strengths), 'coefficient')} for {count(len(paths), 'vector')}"
        raise DataError(told, "one each, in the same order")
    loaded = [fg.SteeringVector.load(path) for path in paths]
    if model is not None:
        check_fit(dict(zip(paths, loaded, strict=True)), model, revision)
    if loaded and not coefficients and operation != "ablate":
        norms = ", ".join(f"{vector.norm:.3g}" for vector in loaded)
        say(f"note: no --coefficient given: 1 is used, of a vector of norm {norms}", err=True)
    return list(zip(loaded, strengths, strict=True))


def interventions(vectors: list[tuple[Any, float]], operation: str, scope: str, *, bos: bool = False) -> list[Any]:
    """The vectors as interventions of one operation. Raises DataError, SteeringError."""
    if operation not in ("add", "affine", "ablate", "clamp"):
        raise DataError(f"--op {operation}", "add, affine, ablate or clamp")
    return [
        getattr(vector, operation)(*(() if operation == "ablate" else (coefficient,)), scope=scope, bos=bos)
        for vector, coefficient in vectors
    ]


def sae_name(name: str | None, model: str) -> str:
    """The SAE of --sae, by default the embedded model's own. Raises DataError where none is named for another model."""
    from fgsteer.models.embedded import DEFAULT, model_name

    if name is None and model not in ("", DEFAULT, model_name()):
        raise DataError(
            f"no --sae for {model!r}: the default SAE was trained on the default model",
            "an SAE of this model",
            f"fgsteer saes --model {Path(model).name} lists them: --sae RELEASE --sae-id ID, or --sae FOLDER",
        )
    return name or DEFAULT


def model_of(about: Mapping[str, Any]) -> str:
    """The name of the model that a vector's provenance or statistics' reading remembers, or ""."""
    made = about.get("model")
    return str(made.get("name") or "") if isinstance(made, Mapping) else ""


def load_sae(name: str | None, sae_id: str | None, model: str) -> Any:
    """The SAE of the options, for the model of --model. Raises DataError where none is named for it."""
    import fgsteer as fg

    return fg.load_sae(sae_name(name, model), sae_id)


def show(value: Any, as_json: bool, text: Callable[[Any], None]) -> None:
    """Print a result as JSON or for a reader; of several processes, the first does."""
    if Ranks.from_env().rank:
        return
    if as_json:
        say(json_text(value))
    else:
        text(value)


def console(**options: Any) -> Any:
    """A terminal that prints text as it is, but control characters as escapes."""
    from rich.console import Console
    from rich.segment import Segment

    class Screen(Console):
        def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
            for text, style, control in super().render(renderable, options):
                yield Segment(text if control else escape_text(text), style, control)

    return Screen(highlight=False, markup=False, emoji=False, **options)


@contextmanager
def progress_bar(what: str, total: int | None, as_json: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; the block gets a function to report how many are done (and of how many)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    quiet = as_json or Ranks.from_env().rank > 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of=total: bar.update(task, completed=done, total=of)
