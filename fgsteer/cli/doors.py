"""What can be known before a model is loaded, and so is checked before."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand

from fgsteer.errors import DataError, PairingError
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.targets import file_target, folder_target, make_folder, new_folder_target

TOKEN_RULES = ("all", "last", "answer", "letter", "tail")
FILLED = {"bench": "bench.jsonl", "sweep": "sweep.json"}  # commands that fill a folder, and what they hold in it
OUTPUTS = ("out", "html", "work")  # the parameters that say where a command writes
_BY_NAME = ("contrast", "source", "concept", "held_out", "model", "sae", "rows_of", "effects")  # shipped, or files


class Command(TyperCommand):
    """A command that writes to no file that it reads, and to none that another one is writing."""

    def invoke(self, ctx: Any) -> Any:
        """Run it. Raises DataError for an output that is an input too, BusyError for one that is being written."""
        hints = get_type_hints(inspect.unwrap(self.callback)) if self.callback else {}
        paths = [p for p in self.params if p.name in _BY_NAME or "Path" in str(hints.get(p.name or ""))]
        check_apart({max(p.opts, key=len): (p.name, ctx.params.get(p.name)) for p in paths})
        for output in filter(None, map(ctx.params.get, ("out", "html"))):
            if not Ranks.from_env().rank:  # of several processes, the first one writes
                ctx.with_resource(_alone(output, FILLED.get(str(self.name), "")))
        return super().invoke(ctx)


@contextlib.contextmanager
def _alone(output: Path, file: str) -> Iterator[None]:
    """A block in which no other process writes an output, of a folder the file that tells whose it is."""
    from fgsteer.storage.locks import exclusive_lock

    new = bool(file) and not output.exists()
    if new:
        make_folder(output)
    try:
        with exclusive_lock(output / file):
            yield
    finally:
        if new:  # and nothing was written after all
            with contextlib.suppress(OSError):
                output.rmdir()


def check_apart(paths: Mapping[str, tuple[str, Any]]) -> None:
    """Refuse an output that is an input too, by another name or link as well, or two that are one.

    ``paths`` is {option: (parameter, path or paths or None)} of those that may name files. Raises DataError.
    """
    outputs = {option: Path(value) for option, (name, value) in paths.items() if name in OUTPUTS and value is not None}
    for option, (name, value) in paths.items():
        for given in value if isinstance(value, list | tuple) else [value]:
            for other, output in outputs.items():
                if option == other or given is None or not _one(given, output, name in OUTPUTS):
                    continue
                if name not in _BY_NAME or not _is_shipped(str(given)):
                    raise DataError(
                        f"{option} {given} and {other} {output} are one file",
                        "another one to write: what is read stays as it is",
                    )


def _one(first: str | Path, second: Path, outputs: bool) -> bool:
    """Whether two paths are one file, which two outputs may be that are not there yet."""
    with contextlib.suppress(OSError, ValueError):
        return os.path.samefile(first, second)
    return outputs and os.path.realpath(first) == os.path.realpath(second)


def _is_shipped(name: str) -> bool:
    from fgsteer.data.shipped import shipped_contrasts
    from fgsteer.models.embedded import DEFAULT

    return name == DEFAULT or name in shipped_contrasts()


def writable(path: Path | None) -> Path | None:
    """The path, if a file can be written there. Raises FormatError."""
    if path is not None:
        file_target(path)
    return path


def unused(path: Path) -> Path:
    """The path, if a new folder can be written there. Raises FormatError."""
    new_folder_target(path)
    return path


def fillable(path: Path | None) -> Path | None:
    """The path, if it is a folder that can be written to, or can be made in one. Raises FormatError."""
    if path is not None:
        folder_target(path)
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
    from fgsteer.models.hookpoints import Hookpoint

    return None if names is None else [Hookpoint.parse(int(n) if re.fullmatch(r"\d{1,9}", n) else n) for n in names]


def finite(option: typer.CallbackParam, value: Any) -> Any:
    """The number or numbers of an option. Raises BadParameter for nan and inf."""
    if value is None and getattr(option, "multiple", False):
        return []  # of which typer makes None again; its oldest version makes nothing of None
    for number in value if isinstance(value, list | tuple) else [value]:
        if number is not None and not math.isfinite(number):
            raise typer.BadParameter(f"{number} is not a finite number")
    return value


def texts(*given: str | None) -> None:
    """Raises DataError for a text that is not Unicode: bytes that the terminal's encoding has no characters for."""
    from fgsteer.data.chat import check_text

    for text in given:
        if text is not None:
            check_text(text, "a text of the command line", empty=True)


def check_device(device: str | None, dtype: str | None) -> None:
    """Raises DataError for a device that this machine lacks or that keeps no numbers, or a dtype that is none."""
    import torch

    from fgsteer.models.loading import as_dtype

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

    from fgsteer.models.embedded import DEFAULT, pretrained_dir
    from fgsteer.storage.network import hub_or_cache

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
