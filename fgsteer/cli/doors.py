"""What can be known before a model is loaded, and so is checked before."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import DataError, FormatError, PairingError

TOKEN_RULES = ("all", "last", "answer", "letter", "tail")


def writable(path: Path | None) -> Path | None:
    """The path, if a file can be written there: known before anything is measured. Raises DataError."""
    if path is not None:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise DataError(f"cannot write {path}", "a file in a folder that can be written to")
    return path


def new_folder(path: Path) -> Path:
    """The path, if it is free or an empty folder, and can be made. Raises FormatError, DataError."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FormatError(f"{path} exists", "a new or an empty folder", "name another, or remove it first")
    writable(path / "config.json")
    return path


def token_rule(tokens: str) -> Any:
    """The token rule of --tokens: a word, or an index. Raises DataError."""
    if tokens.lstrip("-").isdecimal():
        return int(tokens)
    if tokens not in TOKEN_RULES:
        raise DataError(f"--tokens {tokens}", f"{', '.join(TOKEN_RULES)}, or an index")
    return tokens


def hookpoints(names: Iterable[str] | None) -> list[Any] | None:
    """Hookpoints of --hookpoint: names, or blocks' numbers. Raises HookpointError for a name that is none."""
    from fgsteer.hookpoints import Hookpoint

    return None if names is None else [Hookpoint.parse(int(n) if n.isdecimal() else n) for n in names]


def check_device(device: str | None, dtype: str | None) -> None:
    """Raises DataError for a device that this machine lacks, or a dtype that is none."""
    import torch

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise DataError(f"--dtype {dtype}", "float32, bfloat16 or float16")
    if device in (None, "auto"):
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that is unknown, missing or full
        raise DataError(f"--device {device}: {error}".partition("\n")[0], "a device of this machine") from error


def check_fit(vectors: Mapping[Path, Any], model: str) -> None:
    """Refuse vectors of another model than --model by what its config tells. Raises PairingError.

    A model whose config cannot be read passes: loading it says why.
    """
    if not vectors:
        return
    from transformers import AutoConfig

    from fgsteer.models import DEFAULT, pretrained_dir
    from fgsteer.network import hub_or_cache

    folder = pretrained_dir() / "model" if model == DEFAULT else model
    try:
        with hub_or_cache(folder):
            config = AutoConfig.from_pretrained(folder).get_text_config()
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ImportError):
        return
    for path, vector in vectors.items():
        if vector.hookpoint.layer < layers and (vector.hookpoint.site == "z" or vector.d_model == width):
            continue
        made = vector.provenance.get("model")
        name = str(made.get("name") or "") if isinstance(made, Mapping) else ""
        raise PairingError(
            f"{path}, made for {name or 'another model'}: width {vector.d_model} at {vector.hookpoint}",
            f"a vector for {model!r}, the model to load, which has layers 0 to {layers - 1} of width {width}",
            f"pass the vector's model: --model {name or 'NAME'}",
        )
