"""Options that several commands share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fgsteer.cli.choices import completion
from fgsteer.cli.values import fillable, finite, present_scope, writable
from fgsteer.data.file_kinds import CONTRAST_KINDS
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.interventions.table import describe_operations

ModelOption = Annotated[
    str, typer.Option("--model", "-m", help="The model: {shipped models}, or a Hugging Face id or path.")
]
SaeOption = Annotated[
    str | None,
    typer.Option(
        "--sae",
        help="The SAE: a folder, or a sae-lens release with --sae-id. Without it, the models {shipped models} take "
        "their own.",
    ),
]
SaeIdOption = Annotated[
    str | None, typer.Option("--sae-id", help="The id of the SAE within a release, such as layer_2.")
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", callback=writable, help="The file to write, in the safetensors format.")
]
VectorOption = Annotated[
    list[Path] | None, typer.Option("--vector", "-v", help="A vector to steer with; repeat to apply several together.")
]
CoefficientOption = Annotated[
    list[float] | None,
    typer.Option(
        "--coefficient",
        "-c",
        callback=finite,
        help="The strength of a vector: add's coefficient, affine's alpha or clamp's target; repeat for several "
        "vectors, in the same order. It is 1 where none is given.",
    ),
]
OperationOption = Annotated[
    str,
    typer.Option("--op", autocompletion=completion("operations"), help=f"What the vectors do. {describe_operations()}"),
]
SCOPE_HELP = "Which tokens are steered: {what scopes steer}."
ScopeOption = Annotated[
    str,
    typer.Option(
        "--scope",
        autocompletion=completion("scopes"),
        callback=present_scope,
        help=SCOPE_HELP,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON value, for scripts.")]
TokensOption = Annotated[
    str,
    typer.Option(
        "--tokens",
        autocompletion=completion("token rules"),
        help="Which tokens of each text are read: {token rules}, or an index such as -1. All are every token of "
        "prompt, content and chat tail, without the special token before the text. The tail is what a chat template "
        "writes after the last message.",
    ),
]
FieldOption = Annotated[
    str,
    typer.Option(
        "--field", help=f"The field or column that holds the text, where the corpus is a {CONTRAST_KINDS} file."
    ),
]
PrependBosOption = Annotated[
    bool | None,
    typer.Option(
        "--prepend-bos/--no-prepend-bos",
        help="Whether each text begins with BOS. By default as in the SAE's training, or as the tokenizer does.",
    ),
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=2, max=MAX_COUNT, help="How many tokens of each document are read.")
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option(
        "--batch-tokens",
        min=1,
        max=MAX_COUNT,
        help="How many tokens a batch has, with padding. By default what suits the device.",
    ),
]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        "--work",
        callback=fillable,
        help="A folder for finished parts, from which a run that was stopped goes on. Under torchrun it is OUT.parts "
        "if none is given.",
    ),
]
FreshOption = Annotated[
    bool,
    typer.Option("--fresh", help="Start over: remove what an earlier run, stopped or of something else, has left."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        "--device",
        help="The device: cpu, cuda, cuda:1, …, or auto, which spreads the model over all of them. By default a GPU, "
        "where there is one.",
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="The dtype of the model: float32, bfloat16, float16 or float64. By default the checkpoint's."
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="The branch, tag or commit of a model on the hub. By default main.")
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the Python code that comes with the model. Read that code first."),
]
