"""Models: the embedded default, or any Hugging Face causal LM by id or path.

Nothing is wrapped: every fgsteer function takes the plain model and tokenizer.

    model, tokenizer = load_model("default")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fgsteer.errors import (
    DataError,
    FgsteerError,
    FormatError,
    MissingError,
)
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import count
from fgsteer.storage.network import describe_unreachable, hub_or_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fgsteer.models.embedded import DEFAULT, model_name, pretrained_dir

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that models compute in


# arguments of from_pretrained that say where files are and may run: what the tokenizer must be told too
_OF_BOTH = (
    "cache_dir",
    "code_revision",
    "force_download",
    "gguf_file",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def as_dtype(value: object) -> torch.dtype:
    """The dtype, or the one of a name. Raises DataError for one that no model computes in."""
    found = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype) or found not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise DataError(f"dtype {value!r:.60}", f"one of {names}")
    return found


@checked
def load_model(
    source: str | Path = DEFAULT,
    *,
    dtype: torch.dtype | str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) in eval mode: "default" for the embedded one, else a Hugging Face id or path.

    ``dtype`` defaults to float32 for the embedded model and to the checkpoint's own
    otherwise (float32 for GGUF). ``gguf_file`` names a file of llama.cpp's format in the folder or
    repository, whose weights are read into a plain model (extra ``fgsteer[gguf]``); the path of such a
    file as ``source`` says the same. Python code that a model brings runs with ``trust_remote_code=True``
    alone; nobody is asked. Other keywords go to
    ``AutoModelForCausalLM.from_pretrained``, and those of the hub (``revision``, ``token``, ``subfolder``, …)
    to the tokenizer too.
    The tokenizer pads on the left, with the end-of-text token where it has no pad token.
    Raises FormatError when the embedded default or, for GGUF, the package or the file is missing, for files
    that cannot be read or lack weights and for code that is not trusted, DataError for a dtype in which no
    model computes, MissingError (an OSError too) for another model that is not there, at once where the hub
    cannot be reached.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if gguf_file is None and Path(source).suffix.lower() == ".gguf" and Path(source).is_file():
        source, gguf_file = Path(source).parent, Path(source).name
    if gguf_file is not None:
        _check_gguf(source, gguf_file, kwargs.get("subfolder", ""))
        kwargs |= {"gguf_file": gguf_file, **_unpacked()}
    embedded = str(source) == DEFAULT
    folder = pretrained_dir() / "model" if embedded else source
    usual = torch.float32 if embedded or gguf_file else "auto"
    chosen = usual if dtype is None else dtype if dtype == "auto" else as_dtype(dtype)
    kwargs["output_loading_info"] = True
    kwargs["trust_remote_code"] = trust_remote_code  # said outright: else transformers asks on standard input
    shared = {name: value for name, value in kwargs.items() if name in _OF_BOTH}
    with hub_or_cache(folder) as reachable, _typed(gguf_file or str(source), gguf_file is not None):
        try:
            model = _whole(
                gguf_file or str(source), AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, **kwargs)
            )
            if gguf_file is not None and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
                quantizer.remove_quantization_config(model)  # of weights that are not packed any more: it can be saved
            tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
        except OSError as error:
            why = str(error).partition("\n")[0] if reachable else describe_unreachable()
            if Path(source).is_absolute() or str(source).startswith("."):
                why = "there is no such folder" if not Path(source).is_dir() else why
            raise MissingError(f"no model {str(source)!r}", '"default", a folder, or a Hugging Face id', why) from error
    if embedded:
        model.config._name_or_path = model_name()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


@contextmanager
def _typed(name: str, gguf: bool) -> Iterator[None]:
    """Raises FormatError for whatever transformers raises of files that it cannot read, or of code that they bring."""
    try:
        yield
    except (FgsteerError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # ValueError, KeyError, struct.error and many more, and Exception itself from tokenizers
        if "trust_remote_code" in str(error):
            raise FormatError(
                f"{name} brings Python code of its own, which would run on this machine",
                "a model that transformers itself has the code of",
                "read that code, and where you trust it pass trust_remote_code=True",
            ) from error
        expected = (
            "a GGUF file, of an architecture that transformers reads" if gguf else "a model that transformers reads"
        )
        raise FormatError(f"{name} cannot be read: {' '.join(str(error).split()):.400}", expected) from error


def _whole(name: str, loaded: Any) -> PreTrainedModel:
    """The model of what was loaded. Raises FormatError for weights that its files lack, which are drawn at random."""
    # a class of a model's own code may tell nothing of how it was loaded
    model, found = loaded if isinstance(loaded, tuple) else (loaded, {})
    if missing := sorted(found.get("missing_keys", ())):
        raise FormatError(
            f"{name} lacks {count(len(missing), 'weight')} of a {type(model).__name__}: {', '.join(missing[:3])}"
            + (", …" if len(missing) > 3 else ""),
            "a checkpoint of a language model, whole",
            "without them transformers would draw them at random",
        )
    whole: PreTrainedModel = model
    return whole


def _unpacked() -> dict[str, Any]:
    """What has transformers unpack quantised weights, as all its versions did before it could compute with them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _check_gguf(source: str | Path, name: str, subfolder: str) -> None:
    """Raises FormatError for a GGUF file that is not there, or cannot be read without its package."""
    folder = Path(source) / subfolder
    if str(source) == DEFAULT:
        raise FormatError(f"gguf_file={name!r} of the embedded default", "a folder or repository that holds the file")
    if folder.is_dir() and not (folder / name).is_file():
        names = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise FormatError(f"no file {name!r} in {folder}", f"one of its GGUF files: {names}")
    if find_spec("gguf") is None:
        raise FormatError(
            f"gguf_file={name!r} without the package gguf", "the package that reads it", "pip install 'fgsteer[gguf]'"
        )
