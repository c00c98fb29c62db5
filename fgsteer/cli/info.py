"""``fgsteer info``: what a file holds and where it came from, or what is installed.

describe_file("wedding.safetensors")["provenance"]
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.options import JsonOption
from fgsteer.cli.printing import say, show
from fgsteer.errors.escaping import escape_text
from fgsteer.errors.wording import count

MAX_CHARACTERS = 88  # of a value in a summary
MAX_TENSORS = 8  # that a summary lists


@app.command(short_help="Say what a file holds and where it came from.")
def info(
    file: Annotated[
        Path | None, typer.Argument(help="A file that fgsteer wrote. Without one, this installation is described.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a file holds and where it came from, or what is installed; --json tells everything."""
    if file is None:
        show(describe_installation(), as_json, _print_installation)
    else:
        show(describe_file(file), as_json, lambda description: _print_file(file, description))


def _print_installation(description: dict[str, Any]) -> None:
    """Print what is installed on one screen."""
    gpus = description["cuda"]
    for name, version in description["versions"].items():
        say(f"{name:<14}{version or 'not installed'}")
    say(f"{'device':<14}{count(gpus, 'CUDA device') if gpus else 'CPU, no CUDA device'}")
    say(f"{'methods':<14}{', '.join(description['methods'])}")
    say(f"{'contrasts':<14}{', '.join(description['contrast_sets'])}")
    for name, model in description["models"].items():
        saes = "SAEs " + ", ".join(model["saes"]) if model["saes"] else f"SAEs not installed: {model['install']}"
        say(f"{name:<14}{model['description']}, {saes}")
    say("fgsteer info FILE says what a file holds; fgsteer --help lists the commands.")


def _print_file(path: Path, description: dict[str, Any]) -> None:
    """Print what a file holds on one screen: what it is, where it came from, its tensors."""
    facts = {key: value for key, value in description.items() if key != "tensors"}
    facts |= facts.pop("provenance", {})
    tensors = description["tensors"]
    say(escape_text(f"{path}: {facts.pop('kind', 'tensors')}, written by fgsteer", keep=""))
    rows = [
        (escape_text(name, keep=""), escape_text(_summarize(value), keep=""))
        for name, value in facts.items()
        if value not in (None, "", {}, [])
    ]
    rows += [
        (escape_text(name, keep=""), " x ".join(map(str, shape)) or "one number")
        for name, shape in [*tensors.items()][:MAX_TENSORS]
    ]
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        say(f"  {name:<{width}}  {text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS].rstrip(' ,') + ' …'}")
    more = len(tensors) - MAX_TENSORS
    say(f"{f'and {more} more tensors; ' if more > 0 else ''}fgsteer info {path} --json tells everything")


def _summarize(value: Any) -> str:
    """A value in plain words on one line: numbers rounded, the largest of many first, hashes cut."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        entries = list(value.items())
        if len(entries) > 1 and all(isinstance(number, float) for number in value.values()):
            entries.sort(key=lambda entry: -abs(entry[1]))
        return ", ".join(f"{name}: {_summarize(entry)}" for name, entry in entries if entry is not None)
    if isinstance(value, list):
        return "; ".join(map(_summarize, value))
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else str(value)


def describe_file(path: Path) -> dict[str, Any]:
    """Header and tensor shapes of an fgsteer file. Raises FormatError."""
    from fgsteer.storage.files import read_tensors

    tensors, header = read_tensors(path, kind=None)
    return {**header, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}


def describe_installation() -> dict[str, Any]:
    """Versions, devices, methods, shipped models, and the figures of the embedded default.

    Raises FormatError without the embedded default.
    """
    from importlib.metadata import version

    import torch

    from fgsteer.data.shipped import shipped_contrasts
    from fgsteer.methods import METHODS
    from fgsteer.models.shipped import DEFAULT, SHIPPED
    from fgsteer.storage.json_files import read_json
    from fgsteer.storage.version import library_version

    figures = read_json(SHIPPED[DEFAULT].folder() / "figures.json")
    models = {
        name: {
            "description": shipped.description,
            "saes": shipped.sae_ids() if shipped.is_installed() else [],
            "install": shipped.install,
        }
        for name, shipped in SHIPPED.items()
    }
    return {
        "versions": {"fgsteer": library_version()} | {n: version(n) for n in ("torch", "transformers", "sae-lens")},
        "cuda": torch.cuda.device_count(),
        "methods": list(METHODS),
        "contrast_sets": shipped_contrasts() + shipped_contrasts(chat=True),
        "models": models,
        "default": {key: figures[key] for key in ("parameters", "training_tokens", "bits_per_byte", "saes")},
    }
