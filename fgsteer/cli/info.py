"""``fgsteer info``: what a file holds and where it came from, or what is installed.

describe_file("wedding.safetensors")["provenance"]
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fgsteer.cli.app import app
from fgsteer.cli.options import JsonOption
from fgsteer.cli.printing import json_text, say, show


@app.command()
def info(
    file: Annotated[
        Path | None, typer.Argument(help="Any file that fgsteer wrote; nothing: this installation.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a file holds and where it came from, or what is installed."""
    told = describe_file(file) if file is not None else describe_installation()
    show(told, as_json, _print_info)


def _print_info(told: dict[str, Any]) -> None:
    shapes = {name: " x ".join(map(str, shape)) for name, shape in told.get("tensors", {}).items()}
    say(json_text({**told, "tensors": shapes} if shapes else told, indent=2))


def describe_file(path: Path) -> dict[str, Any]:
    """Header and tensor shapes of an fgsteer file. Raises FormatError."""
    from fgsteer.storage.files import read_tensors

    tensors, header = read_tensors(path, kind=None)
    return {**header, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}


def describe_installation() -> dict[str, Any]:
    """Versions, devices, methods, and the figures of the embedded default. Raises FormatError without one."""
    from importlib.metadata import version

    import torch

    from fgsteer.data.shipped import shipped_contrasts
    from fgsteer.methods import METHODS
    from fgsteer.methods.provenance import library_version
    from fgsteer.models.embedded import pretrained_dir
    from fgsteer.storage.json_files import read_json

    folder = pretrained_dir()
    figures = read_json(folder / "figures.json")
    return {
        "versions": {"fgsteer": library_version()} | {n: version(n) for n in ("torch", "transformers", "sae-lens")},
        "cuda": torch.cuda.device_count(),
        "methods": list(METHODS),
        "contrast_sets": shipped_contrasts(),
        "default": {key: figures[key] for key in ("parameters", "training_tokens", "bits_per_byte", "saes")},
    }
