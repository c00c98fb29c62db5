"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fgsteer.cli.choices import completion
from fgsteer.cli.values import fillable, finite, writable
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.table import describe_operations

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
OperationOption = Annotated[
    str,
    typer.Option("--op", autocompletion=completion("operations"), help=f"How the vectors act. {describe_operations()}"),
]
ScopeOption = Annotated[
    str, typer.Option("--scope", autocompletion=completion("scopes"), help="all, prompt, generated or last_prompt_on.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value, for scripts.")]
TokensOption = Annotated[
    str,
    typer.Option(
        "--tokens",
        autocompletion=completion("token rules"),
        help="all, last, answer, letter, tail (of a chat template), or an index.",
    ),
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
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=2, max=MAX_COUNT, help="Tokens read of each document.")
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens", min=1, max=MAX_COUNT, help="Padded tokens in a batch; default: what suits the device."
    ),
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
