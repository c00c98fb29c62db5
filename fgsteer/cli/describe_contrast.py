"""``fgsteer describe-contrast``: contrast data of a behavior that is described in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.loading import ModelOptions, check_device, documents, load_model
from fgsteer.cli.options import (
    DeviceOption,
    DtypeOption,
    FieldOption,
    FreshOption,
    JsonOption,
    RevisionOption,
    TrustOption,
)
from fgsteer.cli.printing import progress_bar, say, show
from fgsteer.cli.values import check_unicode, seed_in_range, writable
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.storage.ranks import Ranks


@app.command(short_help="Write contrast data from a description of a behavior.")
def describe_contrast(
    description: Annotated[
        str, typer.Argument(help='The behavior, as it completes "an assistant who …", such as "speaks like a pirate".')
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", callback=writable, help="The file to write, which ends in .json.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="The chat model: {shipped models}, a Hugging Face id or path, or a name at --url."
        ),
    ] = "smollm2",
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            help="The address of an OpenAI-compatible endpoint with the model, which ends before /chat/completions. "
            "Its key is read from the environment variable OPENAI_API_KEY.",
        ),
    ] = None,
    number: Annotated[int, typer.Option("--number", "-n", min=1, max=MAX_COUNT, help="How many pairs to write.")] = 80,
    name: Annotated[
        str | None, typer.Option("--name", help="What the set is called. By default after the description.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="A file of the user's messages. By default shipped questions."),
    ] = None,
    field: FieldOption = "text",
    system: Annotated[
        str | None,
        typer.Option("--system", help="The system prompt of a local model, with {description} in it."),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", min=1, max=1000, help="The tokens of an answer of a local model, at most."),
    ] = 48,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, callback=seed_in_range, help="The seed of the prompts.")
    ] = 0,
    work: Annotated[
        Path | None,
        typer.Option("--work", callback=writable, help="A file of answers, from which a stopped run goes on."),
    ] = None,
    fresh: FreshOption = False,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    revision: RevisionOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write contrast data: answers to the same questions, with a behavior that is described and without it.

    A local chat model answers each question under a system prompt, and by itself. With --url an endpoint is asked for
    both answers. What may be wrong with the data is then said, as fgsteer lint does.
    """
    import fgsteer as fg

    check_unicode(description, name, system)
    if out.suffix.lower() != ".json":
        raise DataError(f"--out {out}", "a file that ends in .json after --out")
    if Ranks.from_env().world > 1:
        raise DataError("several processes for describe-contrast", "one process")
    options: dict[str, Any] = {} if system is None else {"system": system}
    if prompts is not None:
        options["prompts"] = documents(prompts, field)
    from fgsteer.authoring.describing import draw_prompts

    draw_prompts(options.get("prompts"), number, seed)  # raises for too few before a model is loaded
    if url is None:
        check_device(device, dtype)
        loaded, tokenizer = load_model(ModelOptions(model, device, dtype, revision, trust_remote_code))
        options |= {"model": loaded, "tokenizer": tokenizer, "max_new_tokens": max_new_tokens}
    else:
        options |= {"model": model, "base_url": url}
    with progress_bar("writing pairs", number, as_json) as progress:
        contrast = fg.describe_contrast(
            description, n=number, name=name, seed=seed, work=work, fresh=fresh, progress=progress, **options
        )
    fg.save_contrast(contrast, out)
    advice = fg.lint_contrast(contrast)
    result = {
        "out": str(out),
        "name": contrast.name,
        "pairs": len(contrast.pairs),
        "example": {key: getattr(contrast.pairs[0], key) for key in ("prompt", "positive", "negative")},
        "advice": [one.as_dict() for one in advice],
    }

    def print_result(told: dict[str, Any]) -> None:
        say(f"{told['out']}: {told['pairs']} pairs, such as")
        say(f"  asked:   {told['example']['prompt'][-1]['content']}")
        say(f"  with:    {told['example']['positive']}")
        say(f"  without: {told['example']['negative']}")
        for one in advice:
            say(f"- {'Serious. ' if one.serious else ''}{one}")

    show(result, as_json, print_result)
