"""What a file holds and where it came from; what is installed.

describe_file("wedding.safetensors")["provenance"]
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fgsteer.data.shipped import shipped_contrasts
from fgsteer.methods import METHODS
from fgsteer.methods.provenance import library_version
from fgsteer.models.embedded import pretrained_dir
from fgsteer.storage.files import read_tensors
from fgsteer.storage.json_files import read_json


def describe_file(path: Path) -> dict[str, Any]:
    """Header and tensor shapes of an fgsteer file. Raises FormatError."""
    tensors, header = read_tensors(path, kind=None)
    return {**header, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}


def describe_installation() -> dict[str, Any]:
    """Versions, devices, methods, and the figures of the embedded default. Raises FormatError without one."""
    folder = pretrained_dir()
    figures = read_json(folder / "figures.json")
    return {
        "versions": {"fgsteer": library_version()} | {n: version(n) for n in ("torch", "transformers", "sae-lens")},
        "cuda": torch.cuda.device_count(),
        "methods": list(METHODS),
        "contrast_sets": shipped_contrasts(),
        "default": {key: figures[key] for key in ("parameters", "training_tokens", "bits_per_byte", "saes")},
    }
