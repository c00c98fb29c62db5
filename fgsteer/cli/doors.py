"""What can be known before a model is loaded, and so is checked before."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

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
    if re.fullmatch(r"-?\d{1,9}", tokens):
        return int(tokens)
    if tokens not in TOKEN_RULES:
        raise DataError(f"--tokens {tokens:.100}", f"{', '.join(TOKEN_RULES)}, or an index")
    return tokens


def hookpoints(names: Iterable[str] | None) -> list[Any] | None:
    """Hookpoints of --hookpoint: names, or blocks' numbers. Raises HookpointError for a name that is none."""
    from fgsteer.hookpoints import Hookpoint

    return None if names is None else [Hookpoint.parse(int(n) if re.fullmatch(r"\d{1,9}", n) else n) for n in names]


def finite(value: Any) -> Any:
    """The number or numbers of an option. Raises BadParameter for nan and inf."""
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
    return value


def texts(*given: str | None) -> None:
    """Raises DataError for a text that is not Unicode: bytes that the terminal's encoding has no characters for."""
    from fgsteer.data import check_text

    for text in given:
        if text is not None:
            check_text(text, "a text of the command line", empty=True)


def check_device(device: str | None, dtype: str | None) -> None:
    """Raises DataError for a device that this machine lacks or that keeps no numbers, or a dtype that is none."""
    import torch

    from fgsteer.models import as_dtype

    try:
        if dtype is not None:
            as_dtype(dtype)
    except DataError as error:
        raise DataError(f"--dtype {dtype:.100}", error.expected) from error
    if device in (None, "auto"):
        return
    try:
        kept = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError, ImportError) as error:  # unknown, missing, full, or no text
        raise DataError(f"--device {device:.100}: {error}".partition("\n")[0], "a device of this machine") from error
    if kept.type == "meta":
        raise DataError(f"--device {device}, which keeps no numbers", "a device of this machine")


def check_fit(vectors: Mapping[Path, Any], model: str, revision: str | None = None) -> None:
    """Refuse vectors of another model than --model by what its config tells. Raises PairingError.

    A model whose config cannot be read, or not without running code of its own, passes: loading it says why.
    """
    if not vectors:
        return
    from transformers import AutoConfig

    from fgsteer.models import DEFAULT, pretrained_dir
    from fgsteer.network import hub_or_cache

    folder = pretrained_dir() / "model" if model == DEFAULT else model
    try:
        with hub_or_cache(folder):
            config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False).get_text_config()
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
