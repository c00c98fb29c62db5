"""Load models: the embedded default, or any Hugging Face causal LM by id or path.

Nothing is wrapped: every function of fgsteer accepts the plain model and tokenizer.

    model, tokenizer = load_model("default")
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fgsteer.errors import DataError, FgsteerError, FormatError, MissingError
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import a, count
from fgsteer.models.devices import place
from fgsteer.models.embedded import DEFAULT, embedded_model_name, pretrained_dir
from fgsteer.storage.network import describe_unreachable, hub_or_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that models compute in
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


def as_dtype(value: object) -> torch.dtype:
    """Return a dtype, given it or its name. Raises DataError for one that no model computes in."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise DataError(f"dtype = {value!r:.60}", f"one of {names}")
    return dtype


@checked
def load_model(
    source: str | Path = DEFAULT,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, in eval mode, and its tokenizer.

    Args:
        source: "default" for the embedded model; else a Hugging Face id, a folder, or the path of a GGUF file.
        dtype: By default float32 for the embedded model and for GGUF, and otherwise the checkpoint's own.
        device: Where the model is put, such as "cpu" or "cuda:1"; "auto" spreads it over all GPUs. By default a GPU,
            where there is one (of the processes of torchrun each takes another), unless a ``device_map`` is passed.
            Inputs of your own go where it is: ``tokenizer(text, return_tensors="pt").to(model.device)``.
        gguf_file: The name of a file of llama.cpp's format in the folder or repository, whose weights are read into
            a plain model. It needs ``fgsteer[gguf]``.
        trust_remote_code: Whether Python code that a model brings may run. Nobody is asked on the way.
        kwargs: Other keywords of ``AutoModelForCausalLM.from_pretrained``. Those of the hub (``revision``, ``token``,
            ``subfolder``, …) go to the tokenizer too.

    Returns:
        The model and the tokenizer, which pads on the left, with the end-of-text token where it has no pad token.

    Raises:
        FormatError: The embedded default, or for GGUF the package or the file, is missing; files cannot be read or
            lack weights; or the model brings code that is not trusted.
        DataError: No model computes in this dtype, or the device cannot be used.
        MissingError: The model is not there (an OSError too), at once where the hub cannot be reached.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if device == "auto":
        kwargs["device_map"] = "auto"
    if gguf_file is None and Path(source).suffix.lower() == ".gguf" and Path(source).is_file():
        source, gguf_file = Path(source).parent, Path(source).name
    if gguf_file is not None:
        _check_gguf(source, gguf_file, kwargs.get("subfolder", ""))
        kwargs |= {"gguf_file": gguf_file, **_unpacking_options()}
    embedded = str(source) == DEFAULT
    folder = pretrained_dir() / "model" if embedded else source
    default_dtype = torch.float32 if embedded or gguf_file else "auto"
    chosen_dtype = default_dtype if dtype is None else dtype if dtype == "auto" else as_dtype(dtype)
    kwargs["output_loading_info"] = True
    kwargs["trust_remote_code"] = trust_remote_code  # always passed: without it transformers asks on standard input
    shared = {name: value for name, value in kwargs.items() if name in _SHARED_WITH_TOKENIZER}
    name = gguf_file or str(source)
    with hub_or_cache(folder) as reachable, _as_format_errors(name, gguf_file is not None):
        try:
            model = _check_complete(name, AutoModelForCausalLM.from_pretrained(folder, dtype=chosen_dtype, **kwargs))
            if gguf_file is not None and (quantizer := getattr(model, "hf_quantizer", None)) is not None:
                quantizer.remove_quantization_config(model)  # the weights are not packed any more, and can be saved
            tokenizer = AutoTokenizer.from_pretrained(folder, **shared)
        except OSError as error:
            reason = str(error).partition("\n")[0] if reachable else describe_unreachable()
            if (Path(source).is_absolute() or str(source).startswith(".")) and not Path(source).is_dir():
                reason = "there is no such folder"
            raise MissingError(
                f"There is no model {str(source)!r}.", '"default", a folder, or a Hugging Face id', reason
            ) from error
    if embedded:
        model.config._name_or_path = embedded_model_name()
    if "device_map" not in kwargs:
        model = place(model, device)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


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
    if str(source) == DEFAULT:
        raise FormatError(
            f"gguf_file = {name!r} for the embedded default", "a folder or repository that holds the file"
        )
    if folder.is_dir() and not (folder / name).is_file():
        names = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise FormatError(f"There is no file {name!r} in {folder}.", f"one of its GGUF files: {names}")
    if find_spec("gguf") is None:
        raise FormatError(
            f"{name} needs the package gguf, which is not installed.",
            change="install it with pip install 'fgsteer[gguf]'",
        )
