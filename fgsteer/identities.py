"""What a run is made of: all that its results depend on, noted when it begins, compared when it goes on.

Model (every weight, dtype, config), tokenizer, SAE, effects, texts and settings by content, not by name; versions of
fgsteer (whole) and of torch, transformers and tokenizers (major.minor: a patch does not part a run). Where a model
runs, on which device and in how many processes, is no part of it.

    noted = {**made_of(model, tokenizer), "sae": sae_identity(sae), "texts": text_sha256(texts)}
    check_same(folder, read_json(folder / "plan.json"), noted)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fgsteer.errors import PairingError, SteeringError
from fgsteer.escaping import escaped
from fgsteer.files import text_sha256
from fgsteer.models import identity
from fgsteer.threads import is_claimed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fgsteer.density import FeatureDensity
    from fgsteer.effects import EffectApproximator
    from fgsteer.sae import SAE

LIBRARIES = ("torch", "transformers", "tokenizers")
SHOWN = 4  # differences that an error tells
TEXT = 40  # characters of a value in it
# what a config holds besides how the model computes: where it came from, and what a call may set
_NOT_COMPUTED = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")
_SOURCE = ("name", "revision")  # of a model: the same one may lie in another folder
_PROBE = "The 12 old\u00a0kings' naïve ﬁlms:\n\tWar?! <s>[INST]</s> \u200b東京 🙂"  # that tells tokenizers apart


def made_of(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What every run depends on, as plain JSON. Raises SteeringError inside a steer block, which is not told in it."""
    if is_claimed(model):
        raise SteeringError(
            "a run that can be gone on with, of a model inside a steer block",
            "a model as its weights have it: what was steered when the run was begun is not noted",
            "leave the block; fg.fold(model, …) gives a model with additions in its weights",
        )
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    about = {"dtype": ", ".join(sorted(dtypes)), "config": _config_sha256(model), "weights": weights_sha256(model)}
    return {
        "versions": {"fgsteer": _version("fgsteer"), **{name: _minor(_version(name)) for name in LIBRARIES}},
        "model": {**{key: value for key, value in identity(model).items() if key not in _SOURCE}, **about},
        "tokenizer": tokenizer_sha256(tokenizer),
    }


def weights_sha256(model: nn.Module) -> str:
    """Hash of all that the model's state dict holds, whole, with names, shapes and dtypes; shared tensors once.

    A gigabyte takes a second or two, on as many threads as torch has. What accelerate keeps elsewhere is
    brought in, a module at a time. Nothing is remembered: weights may change in ways that no counter shows.
    """
    state = dict(model.state_dict())
    if any(isinstance(value, Tensor) and value.is_meta for value in state.values()):
        state |= _offloaded(model)
    tensors: dict[tuple[Any, ...], Tensor] = {}

    def placed(value: Any) -> Any:
        """A value as plain JSON, a tensor as the key under which it is hashed."""
        if isinstance(value, Tensor):
            key = (value.data_ptr(), str(value.device), *value.shape, *value.stride(), str(value.dtype))
            tensors.setdefault(key, value)
            return key
        if isinstance(value, list | tuple):
            return [placed(entry) for entry in value]
        return value if isinstance(value, str | int | float | None) else type(value).__name__

    layout = {name: placed(value) for name, value in state.items()}
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        hashes = dict(zip(tensors, pool.map(_sha256, tensors.values()), strict=True))

    def told(value: Any) -> Any:
        return [told(entry) for entry in value] if isinstance(value, list) else hashes.get(value, value)

    return text_sha256({name: told(value) for name, value in layout.items()})


def _offloaded(model: nn.Module) -> dict[str, str]:
    """Hashes, by name, of what accelerate keeps on another device or on disk."""
    from accelerate.utils import align_module_device

    found: dict[str, str] = {}
    for prefix, module in model.named_modules():
        away = [name for name, tensor in module._parameters.items() if tensor is not None and tensor.is_meta]
        away += [name for name, tensor in module._buffers.items() if tensor is not None and tensor.is_meta]
        with align_module_device(module) if away else contextlib.nullcontext():
            found |= {f"{prefix}.{name}".lstrip("."): _sha256(getattr(module, name)) for name in away}
    return found


def _sha256(tensor: Tensor) -> str:
    """Hash of a tensor's bytes, shape and dtype."""
    values = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    if values.numel() and not values.is_meta:
        digest.update(values.to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _config_sha256(model: nn.Module) -> str:
    """Hash of how the model computes: its config, and which adapters act."""
    config = {key: value for key, value in model.config.to_dict().items() if key not in _NOT_COMPUTED}  # type: ignore[operator, union-attr]
    adapters = [
        (name, str(module.active_adapters), str(module.disable_adapters))
        for name, module in model.named_modules()
        if hasattr(module, "active_adapters") and hasattr(module, "disable_adapters")
    ]
    return text_sha256(json.loads(json.dumps([config, adapters], default=_named)))


def _named(value: Any) -> str:
    """A value that JSON lacks, the same in every process: a dtype by its name, an object by its type's."""
    return str(value) if isinstance(value, torch.dtype) else type(value).__name__


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of how a tokenizer turns texts into ids and ids into texts.

    The state of a fast one without the padding and truncation of its last call, the vocabulary files of another,
    special tokens, sides and templates of both, and the ids of a text that tells tokenizers apart.
    """
    names = ("padding_side", "truncation_side", "chat_template", "clean_up_tokenization_spaces", "add_prefix_space")
    state: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
    state["class"] = type(tokenizer).__name__
    state["special"] = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    state["probe"] = list(tokenizer(_PROBE)["input_ids"])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        core = json.loads(backend.to_str())
        state["core"] = {name: value for name, value in core.items() if name not in ("padding", "truncation")}
    else:
        state["core"] = _vocabulary(tokenizer)
    return text_sha256(json.loads(json.dumps(state, default=_named)))


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The content of a slow tokenizer's files, or its vocabulary where it writes none."""
    with TemporaryDirectory() as folder, contextlib.suppress(NotImplementedError, AttributeError):
        tokenizer.save_vocabulary(folder)
        if files := sorted(Path(folder).iterdir()):
            return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files]
    return getattr(tokenizer, "get_vocab", dict)()


def sae_identity(sae: SAE | None) -> dict[str, Any] | None:
    """What an SAE is: its tensors as they are used, how it activates, reads and writes; its density aside."""
    if sae is None:
        return None
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", "gate_bias", "gate_scale", "W_skip")
    tensors = {name: _sha256(tensor) for name in names if (tensor := getattr(sae, name)) is not None}
    settings = {name: getattr(sae, name) for name in ("activation", "k", "input_norm", "prepend_bos")}
    places = {"hookpoint": str(sae.hookpoint), "reads": str(sae.input_hookpoint)}
    return {"sha256": text_sha256(tensors), **settings, **places}


def density_sha256(density: FeatureDensity | None) -> str | None:
    """Hash of what filters of features read."""
    if density is None:
        return None
    counts = [_sha256(getattr(density, name)) for name in ("fired", "documents", "first")]
    return text_sha256([*counts, density.tokens, density.max_density])


def effects_sha256(effects: EffectApproximator) -> str:
    """Hash of an effect approximator."""
    return text_sha256([_sha256(effects.M), _sha256(effects.b), str(effects.hookpoint)])


def check_same(where: str | Path, kept: Any, now: Mapping[str, Any]) -> None:
    """Raises PairingError, saying what differs, unless what a run noted when it began is what it would note now."""
    told = json.loads(json.dumps(now))
    if kept == told:
        return
    found = list(_differences(kept, told)) if isinstance(kept, dict) else []
    change = "start over with fresh=True, which removes what is there; or write elsewhere"
    if not isinstance(kept, dict) or ("versions" in told and "versions" not in kept):
        raise PairingError(
            f"{where} is a run of an earlier version, which noted less of what it was made of",
            "a run that says what its model, tokenizer, texts and settings were",
            change,
        )
    shown = ", ".join(f"{name} was {old} and is {new}" for name, old, new in found[:SHOWN])
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise PairingError(f"{where} holds a run of something else: {shown}{more}", "what it was begun with", change)


def _differences(kept: Any, now: Any, name: str = "") -> Iterator[tuple[str, str, str]]:
    """(name, old, new) of each value that differs, shortened; lists of one length entry by entry."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for key in sorted({*kept, *now}):
            yield from _differences(kept.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    elif isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for number, pair in enumerate(zip(kept, now, strict=True)):
            yield from _differences(*pair, f"{name}[{number}]")
    elif kept != now:
        old, new = (value if isinstance(value, str) else json.dumps(value) for value in (kept, now))
        alike = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        start = max(0, alike - TEXT // 2)
        yield f"{json.dumps(name)[1:TEXT]}".rstrip('"'), _short(old, start), _short(new, start)


def _short(text: str, start: int) -> str:
    """Some of a text from where it differs, on one line; of a hash its beginning."""
    if len(text) == 64 and not start:
        return text[:12]
    end = start + TEXT
    return ("…" if start else "") + escaped(text[start:end], keep="") + ("…" if len(text) > end else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


def _minor(text: str) -> str:
    """The first two numbers of a version."""
    return ".".join(text.split(".")[:2])
