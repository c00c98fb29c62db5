"""Models: the embedded default, or any Hugging Face causal LM by id or path.

Nothing is wrapped: every fgsteer function takes the plain model and tokenizer.

    model, tokenizer = load_model("default")
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fgsteer.errors import DataError, FgsteerWarning, FormatError, HookpointError, PairingError, PairingWarning
from fgsteer.hookpoints import Hookpoint, blocks_of, decoder_of, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "default"
FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "final_norm",
    "norm_f",
    "embedding_norm",  # LFM 2
    "layer_norm",
)


def pretrained_dir() -> Path:
    """Folder of the embedded default: inside the package, or in a checkout beside it.

    Raises FormatError when neither exists.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_pretrained" / DEFAULT, package.parent / "pretrained" / DEFAULT):
        if (folder / "index.json").is_file():
            return folder
    raise FormatError(
        "the embedded default is not installed",
        "fgsteer/_pretrained/default in the package or pretrained/default in a checkout",
        "reinstall fgsteer, or run pretrained/build.py",
    )


def load_model(
    source: str | Path = DEFAULT, *, dtype: torch.dtype | str | None = None, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) in eval mode: "default" for the embedded one, else a Hugging Face id or path.

    ``dtype`` defaults to float32 for the embedded model and to the checkpoint's own
    otherwise; ``device_map`` and the like go to ``AutoModelForCausalLM.from_pretrained``.
    The tokenizer pads on the left, with the end-of-text token where it has no pad token.
    Raises FormatError when the embedded default is missing; OSError from transformers.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    embedded = str(source) == DEFAULT
    folder = pretrained_dir() / "model" if embedded else source
    chosen = dtype if dtype is not None else (torch.float32 if embedded else "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=chosen, **kwargs)
    revision = kwargs.get("revision")
    tokenizer = AutoTokenizer.from_pretrained(folder, **({"revision": revision} if revision else {}))
    if embedded:
        model.config._name_or_path = model_name()
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def model_name() -> str:
    """The name that the embedded default carries in vectors and SAEs."""
    return "fgsteer/default"


def identity(model: nn.Module) -> dict[str, Any]:
    """What a vector remembers of its model: name, revision, type, d_model, layers."""
    config = getattr(model, "config", None)
    return {
        "name": str(getattr(config, "_name_or_path", "") or ""),
        "revision": getattr(config, "_commit_hash", None),
        "type": str(getattr(config, "model_type", type(model).__name__)),
        "d_model": d_model(model),
        "layers": len(blocks_of(model)),
    }


def d_model(model: nn.Module) -> int:
    """Width of the residual stream."""
    return int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr, operator]


def input_device(model: nn.Module) -> torch.device:
    """Device that token ids go to: that of the input embedding, wherever the blocks are."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    if weight.device.type != "meta":
        return torch.device(weight.device)
    placed = [p.device for p in model.parameters() if p.device.type != "meta"]
    return placed[0] if placed else torch.device("cpu")


def warn_of_dropout(model: nn.Module) -> None:
    """Warn FgsteerWarning of a model in train mode whose dropout is not zero: its activations are random."""
    if not model.training:
        return
    config = getattr(model, "config", None)
    settings = config.get_text_config().to_dict() if config is not None else {}
    active = re.compile(r"(?!classifier|summary).*(?:drop|jitter)")  # no rate of a head that language models lack
    rates = [rate for name, rate in settings.items() if active.match(name) and isinstance(rate, float)]
    if any(rates) or any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        message = "the model is in train mode and drops activations at random; call model.eval() first"
        warnings.warn(message, FgsteerWarning, stacklevel=4)


def check_pairing(model: nn.Module, hookpoint: Hookpoint, width: int, made_for: str, what: str) -> None:
    """Refuse a vector, SAE or intervention that cannot belong to the model; warn by name of one that may not.

    Raises HookpointError for a place the model lacks, PairingError for another d_model;
    warns PairingWarning when it was made for a model of another name.
    """
    resolve(model, hookpoint)
    name = str(getattr(model.config, "_name_or_path", "") or "")
    if width != d_model(model):
        raise PairingError(
            f"a {what} of d_model {width}{f' made for {made_for}' if made_for else ''}",
            f"{d_model(model)}, the width of {name or type(model).__name__}",
        )
    if made_for and name and _last_part(made_for) != _last_part(name):
        warnings.warn(f"the {what} was made for {made_for!r} and the model is {name!r}", PairingWarning, stacklevel=3)


def _last_part(name: str) -> str:
    """A model name without its organisation or folder, in lower case."""
    return name.rstrip("/").rsplit("/", 1)[-1].lower()


@torch.no_grad()
def logit_lens(model: nn.Module, directions: torch.Tensor) -> torch.Tensor:
    """Logits (n, vocabulary) that directions (n, d_model) add, read through final norm and head.

    ``U(norm(v) − norm(0))``: the norm's gain acts, its bias does not. Raises DataError
    for a wrong width, HookpointError for a decoder whose final norm is not known.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    if directions.ndim != 2 or directions.shape[1] != d_model(model):
        raise DataError(f"directions of shape {tuple(directions.shape)}", f"(n, {d_model(model)})")
    decoder = decoder_of(model)
    named = [name for name in FINAL_NORMS if hasattr(decoder, name)]
    if not named:
        raise HookpointError(f"decoder {type(decoder).__name__}", f"a final norm named {', '.join(FINAL_NORMS)}")
    norm = getattr(decoder, named[0])  # None in OPT-350m
    weight: torch.Tensor = head.weight
    rows: torch.Tensor = directions.to(weight.device, weight.dtype)
    if norm is not None:
        rows = norm(rows) - norm(torch.zeros_like(rows))
    if isinstance(narrow := getattr(decoder, "project_out", None), nn.Module):  # OPT-350m
        rows = narrow(rows)
    return (rows @ weight.T).float()
