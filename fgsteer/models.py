"""Models: the embedded default, or any Hugging Face causal LM by id or path.

Nothing is wrapped: every fgsteer function takes the plain model and tokenizer.

    model, tokenizer = load_model("default")
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fgsteer.checks import checked, warn
from fgsteer.errors import (
    DataError,
    FgsteerError,
    FgsteerWarning,
    FormatError,
    HookpointError,
    MissingError,
    PairingError,
    PairingWarning,
)
from fgsteer.files import read_json
from fgsteer.hookpoints import Hookpoint, blocks_of, decoder_of, resolve
from fgsteer.network import hub_or_cache, unreachable
from fgsteer.sae_registry import bare_name
from fgsteer.wording import a, count

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT = "default"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that models compute in
LEARNED_POSITIONS = ("wpe", "positions_embed", "embed_positions", "position_embeddings")
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


def embedded_sae_dir(sae_id: str | None = None) -> Path:
    """Folder of an embedded SAE, such as layer_2; the default one without an id.

    Raises FormatError that names those there are.
    """
    folder = pretrained_dir()
    name = sae_id or str(read_json(folder / "index.json")["sae"])
    known = sorted(path.parent.name for path in (folder / "sae").glob("*/cfg.json"))
    if name not in known:
        raise FormatError(f"no embedded SAE {name!r}", f"one of {', '.join(known)}")
    return folder / "sae" / name


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
            why = str(error).partition("\n")[0] if reachable else unreachable()
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


def context_window(model: nn.Module) -> int | None:
    """The most tokens of a text that the model was made for, None where its config sets no limit."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    window = getattr(config, "max_position_embeddings", None)
    return window - virtual_tokens(model) if isinstance(window, int) and window > 0 else None


def check_window(model: nn.Module, tokens: int, what: str) -> None:
    """Raises DataError for more tokens than a model with learned positions has; others run on beyond their window."""
    window = context_window(model)
    if window is None or tokens <= window:
        return
    decoder = decoder_of(model)
    if any(isinstance(getattr(decoder, name, None), nn.Embedding) for name in LEARNED_POSITIONS):
        raise DataError(
            f"{what} of {tokens} tokens", f"at most {window}, as many positions as the model has", "shorten it"
        )


def input_device(model: nn.Module) -> torch.device:
    """Device that token ids go to: that of the input embedding, wherever the blocks are."""
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    if weight.device.type != "meta":
        return torch.device(weight.device)
    placed = [p.device for p in model.parameters() if p.device.type != "meta"]
    return placed[0] if placed else torch.device("cpu")


def start_ids(model: nn.Module) -> frozenset[int]:
    """Ids of the tokens that may stand before a text: BOS and EOS of the model's and its generation config."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    return ids_of_ends(config, text, getattr(model, "generation_config", None))


def ids_of_ends(*configs: Any) -> frozenset[int]:
    """Ids of BOS and EOS that any of these configs, objects or dicts, names."""
    found: list[Any] = []
    for config in configs:
        for name in ("bos_token_id", "eos_token_id"):
            value = config.get(name) if isinstance(config, dict) else getattr(config, name, None)
            value = value.flatten().tolist() if isinstance(value, torch.Tensor) else value
            found.extend(value if isinstance(value, list | tuple) else [value])
    return frozenset(i for i in found if isinstance(i, int))


def start_marker(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that tells which of ids (batch, tokens), or of embeddings (batch, tokens, width), are start tokens.

    An embedding is a start token's where it equals that token's row of the model's input embedding.
    """
    ids = torch.tensor(sorted(start_ids(model)), dtype=torch.long, device=input_device(model))
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]

    @torch.no_grad()
    def mark(tokens: torch.Tensor) -> torch.Tensor:
        if not tokens.is_floating_point():
            return (tokens[..., None] == ids.to(tokens.device)).any(-1)
        known = ids[(ids >= 0) & (ids < len(embedding.weight))]  # type: ignore[arg-type]
        rows: torch.Tensor = embedding(known).to(tokens.device)
        return (tokens[..., None, :] == rows).all(-1).any(-1)

    return mark


def virtual_tokens(model: nn.Module) -> int:
    """Number of tokens that a model with prompt, p- or prefix tuning (PEFT) puts before every text; 0 for others.

    Raises HookpointError for prompt learning that differs by task.
    """
    config = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False) or getattr(model, "_adapters_disabled", False):
        return 0
    kind = str(getattr(config.peft_type, "value", config.peft_type))  # type: ignore[union-attr]
    if kind == "MULTITASK_PROMPT_TUNING":
        raise HookpointError(
            f"a model with {kind}, whose virtual tokens differ by task",
            "one with PROMPT_TUNING, P_TUNING or PREFIX_TUNING",
            "train or convert the prompt of the one task as PROMPT_TUNING",
        )
    return int(config.num_virtual_tokens)  # type: ignore[union-attr]


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
        warn(message, FgsteerWarning)


def check_pairing(model: nn.Module, hookpoint: Hookpoint, width: int, made_for: str, what: str) -> None:
    """Refuse a vector, SAE or intervention that cannot belong to the model; warn by name of one that may not.

    Raises HookpointError for a place the model lacks, PairingError for another d_model;
    warns PairingWarning when it was made for a model of another name.
    """
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    another = bool(made_for and name and bare_name(made_for) != bare_name(name))
    advice = f"load the model that it was made for: fg.load_model({made_for!r})" if another else ""
    made = f" made for {made_for}" if made_for else ""
    try:
        needed = width_at(model, hookpoint)
    except HookpointError as error:
        if not another:
            raise
        loaded = f"a place in the model that is loaded, {name}: {error.expected}"
        raise HookpointError(f"{a(what)}{made} at {hookpoint}", loaded, advice) from error
    if width != needed:
        raise PairingError(
            f"{a(what)} of d_model {width}{made}",
            f"{needed}, the width of {name or type(model).__name__} at {hookpoint}",
            advice,
        )
    if another:
        warn(f"the {what} was made for {made_for!r} and the model is {name!r}", PairingWarning)


def width_at(model: nn.Module, hookpoint: Hookpoint) -> int:
    """Width of the activations at a hookpoint: d_model, or n_heads · d_head at z. Raises HookpointError."""
    module, _ = resolve(model, hookpoint)
    if hookpoint.site != "z":
        return d_model(model)
    width = getattr(module, "in_features", None)  # a Conv1D, as in GPT-2, has none, and weight (in, out)
    return int(module.weight.shape[0] if width is None else width)  # type: ignore[index]


@checked
@torch.no_grad()
def residual_direction(model: nn.Module, hookpoint: Hookpoint, directions: torch.Tensor) -> torch.Tensor:
    """What directions (..., width) at a hookpoint add to the residual stream, (..., d_model).

    ``v W_O`` at z, v itself at resid_pre, resid_post, attn_out and mlp_out. Raises
    HookpointError where that is not linear: at mlp_in, and at z before a post-norm.
    """
    module, _ = resolve(model, hookpoint)
    if hookpoint.site not in ("z", "mlp_in"):
        return directions
    sublayer, _ = resolve(model, Hookpoint(hookpoint.layer, "attn_out"))
    if hookpoint.site == "mlp_in" or all(part is not module for part in sublayer.modules()):
        raise HookpointError(
            f"a direction at {hookpoint} of {a(type(model).__name__)}",
            "one whose effect on the residual stream is linear",
            "steer with it at its own hookpoint, or read an SAE on resid_post, attn_out or mlp_out",
        )
    embedding: torch.Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    rows = directions.to(next(module.parameters()).device, embedding.dtype)
    return module(rows) - module(torch.zeros_like(rows))  # type: ignore[no-any-return]


@checked
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
