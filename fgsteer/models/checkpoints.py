"""Read a model and its tokenizer with transformers, whole or not at all, and say in our errors what is wrong.

model, tokenizer = read_checkpoint("path/to/folder", "my model", dtype="auto")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fgsteer.errors import FgsteerError, FormatError
from fgsteer.errors.wording import a, count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# arguments of from_pretrained about where files are and what may run, which the tokenizer is loaded with too
_SHARED_WITH_TOKENIZER = (
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


def read_checkpoint(
    source: str | Path,
    name: str,
    *,
    dtype: torch.dtype | str,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a model and its tokenizer.

    Args:
        source: A Hugging Face id or a folder.
        name: What the model is called in errors.
        dtype: The dtype of the weights, or "auto" for the checkpoint's own.
        gguf_file: The name of a file of llama.cpp's format there, whose weights are unpacked.
        trust_remote_code: Whether Python code that a model brings may run. Nobody is asked on the way.
        kwargs: Other keywords of ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        FormatError: Files cannot be read or lack weights, the package that reads GGUF is missing, or the model brings
            code that is not trusted.
        OSError: There are no such files.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if gguf_file is not None:
        _check_gguf(source, gguf_file, kwargs.get("subfolder", ""))
        kwargs |= {"gguf_file": gguf_file, **_unpacking_options()}
    kwargs["output_loading_info"] = True
    kwargs["trust_remote_code"] = trust_remote_code  # always passed: without it transformers asks on standard input
    shared = {key: value for key, value in kwargs.items() if key in _SHARED_WITH_TOKENIZER}
    with _as_format_errors(name, gguf_file is not None):
        model = _check_complete(name, AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs))
        if gguf_file is not None and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
            quantizer.remove_quantization_config(model)  # the weights are not packed any more, and can be saved
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    return model, tokenizer


@contextmanager
def _as_format_errors(name: str, gguf: bool) -> Iterator[None]:
    """Raise FormatError for whatever transformers raises of files that it cannot read, or of code that they bring."""
    try:
        yield
    except (FgsteerError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # ValueError, KeyError, struct.error and many more, and Exception itself from tokenizers
        if "trust_remote_code" in str(error):
            raise FormatError(
                f"{name}, which brings Python code of its own that would run on this machine",
                "a model whose code is part of transformers",
                "read that code, and if you trust it pass trust_remote_code=True",
            ) from error
        expected = (
            "a GGUF file, of an architecture that transformers reads" if gguf else "a model that transformers reads"
        )
        reason = " ".join(str(error).split())[:400].removesuffix(".")
        raise FormatError(f"{name} cannot be read: {reason}.", expected) from error


def _check_complete(name: str, loaded: Any) -> PreTrainedModel:
    """Return the model that was loaded. Raises FormatError for weights that its files lack, which would be random."""
    # a class that comes with a model may not report how it was loaded
    model, report = loaded if isinstance(loaded, tuple) else (loaded, {})
    if missing := sorted(report.get("missing_keys", ())):
        listed = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise FormatError(
            f"{name} lacks {count(len(missing), 'weight')} of {a(type(model).__name__)}: {listed}.",
            "a complete checkpoint of a language model",
            "get the files again; transformers would draw what is missing at random",
        )
    complete: PreTrainedModel = model
    return complete


def _unpacking_options() -> dict[str, Any]:
    """Return the options under which transformers unpacks quantised weights, as its earlier versions always did."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _check_gguf(source: str | Path, name: str, subfolder: str) -> None:
    """Raise FormatError for a GGUF file that is not there, or cannot be read without its package."""
    folder = Path(source) / subfolder
    if folder.is_dir() and not (folder / name).is_file():
        names = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise FormatError(f"There is no file {name!r} in {folder}.", f"one of its GGUF files: {names}")
    if find_spec("gguf") is None:
        raise FormatError(
            f"{name} needs the package gguf, which is not installed.",
            change="install it with pip install 'fgsteer[gguf]'",
        )
