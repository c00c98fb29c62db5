"""Fingerprints: all that the results of a run depend on, noted when it begins, compared when it goes on.

Model (every weight, dtype, config), tokenizer, SAE, effects, texts and settings count by content, not by name, and
so do the full version of fgsteer and major.minor of torch, transformers and tokenizers: a patch release does not end
a run. Where a model runs, on which device and in how many processes, does not count.

    plan = {**run_fingerprint(model, tokenizer), "sae": sae_identity(sae), "texts": text_sha256(texts)}
    check_same_plan(folder, read_json(folder / "plan.json"), plan)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgsteer.errors import SteeringError
from fgsteer.models.claims import is_claimed
from fgsteer.models.pairing import model_identity
from fgsteer.storage.json_files import text_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LIBRARIES = ("torch", "transformers", "tokenizers")
# what a config holds besides how the model computes: where it came from, and what a call may set
_IGNORED_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_SOURCE_KEYS = ("name", "revision")  # of a model: the same one may be in another folder
_PROBE_TEXT = "The 12 old\u00a0kings' naïve ﬁlms:\n\tWar?! <s>[INST]</s> \u200b東京 🙂"  # tells tokenizers apart


def run_fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what every run depends on, as plain JSON. Raises SteeringError inside a steer block, which it lacks."""
    if is_claimed(model):
        raise SteeringError(
            "a model inside a steer block, whose steering a resumable run does not note",
            "a model that computes by its weights alone",
            "leave the block, or fold additions into the weights with fg.fold(model, …)",
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    content = {"dtype": ", ".join(sorted(dtypes)), "config": _config_sha256(model), "weights": weights_sha256(model)}
    return {
        "versions": {"fgsteer": _version("fgsteer"), **{name: _minor(_version(name)) for name in LIBRARIES}},
        "model": {**{key: value for key, value in model_identity(model).items() if key not in _SOURCE_KEYS}, **content},
        "tokenizer": tokenizer_sha256(tokenizer),
    }


def weights_sha256(model: nn.Module) -> str:
    """Hash all that the model's state dict holds, with names, shapes and dtypes; shared tensors are read once.

    A gigabyte takes a second or two, on as many threads as torch has. What accelerate keeps elsewhere is
    loaded, a module at a time. Nothing is cached: weights may change in ways that no counter shows.
    """
    state = dict(model.state_dict())
    if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
        state |= _offloaded(model)
    tensors: dict[tuple[Any, ...], Tensor] = {}

    def to_key(value: Any) -> Any:
        """Return a value as plain JSON, a tensor as the key under which it is hashed."""
        if isinstance(value, Tensor):
            key = (value.data_ptr(), str(value.device), *value.shape, *value.stride(), str(value.dtype))
            tensors.setdefault(key, value)
            return key
        if isinstance(value, list | tuple):
            return [to_key(entry) for entry in value]
        return value if isinstance(value, str | int | float | None) else type(value).__name__

    layout = {name: to_key(value) for name, value in state.items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        hashes = dict(zip(tensors, pool.map(stored_sha256, tensors.values()), strict=True))

    def to_hash(value: Any) -> Any:
        """Replace each key by the hash of its tensor."""
        return [to_hash(entry) for entry in value] if isinstance(value, list) else hashes.get(value, value)

    return text_sha256({name: to_hash(value) for name, value in layout.items()})


def _offloaded(model: nn.Module) -> dict[str, str]:
    """Hash, by name, what accelerate keeps on another device or on disk."""
    from accelerate.utils import align_module_device

    hashes: dict[str, str] = {}
    for prefix, module in model.named_modules():
        away = [name for name, tensor in module._parameters.items() if tensor is not None and tensor.is_meta]
        away += [name for name, tensor in module._buffers.items() if tensor is not None and tensor.is_meta]
        with align_module_device(module) if away else contextlib.nullcontext():
            hashes |= {f"{prefix}.{name}".lstrip("."): stored_sha256(getattr(module, name)) for name in away}
    return hashes


def stored_sha256(tensor: Tensor) -> str:
    """Hash a tensor's bytes, shape and dtype."""
    values = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if values.numel() and not values.is_meta:
        digest.update(values.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config_sha256(model: nn.Module) -> str:
    """Hash how the model computes: its config, and which adapters act."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _IGNORED_CONFIG}  # type: ignore[operator, union-attr]
    adapters = [
        (name, str(module.active_adapters), str(module.disable_adapters))
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters")
    ]
    return text_sha256(json.loads(json.dumps([config, adapters], default=_name)))


def _name(value: Any) -> str:
    """Name a value that JSON cannot hold, the same in every process: a dtype by its name, an object by its type."""
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash how a tokenizer turns texts into ids and ids into texts.

    Hashed are the state of a fast tokenizer without the padding and truncation of its last call, or the vocabulary
    files of a slow one; special tokens, sides and templates; and the ids of a text that tells tokenizers apart.
    """
    names = ("padding_side", "truncation_side", "chat_template", "clean_up_tokenization_spaces", "add_prefix_space")
    state: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
    state["class"] = type(tokenizer).__name__
    state["special"] = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    state["probe"] = list(tokenizer(_PROBE_TEXT)["input_ids"])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        state["core"] = {name: value for name, value in core.items() if name not in ("padding", "truncation")}
    else:
        state["core"] = _vocabulary(tokenizer)
    return text_sha256(json.loads(json.dumps(state, default=_name)))


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the hashes of a slow tokenizer's files, or its vocabulary where it writes none."""
    with TemporaryDirectory() as folder, contextlib.suppress(NotImplementedError, AttributeError):
        tokenizer.save_vocabulary(folder)
        if files := sorted(Path(folder).iterdir()):
            return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return getattr(tokenizer, "get_vocab", dict)()


def _version(name: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _minor(text: str) -> str:
    """Return the first two numbers of a version."""
    return ".".join(text.split(".")[:2])
