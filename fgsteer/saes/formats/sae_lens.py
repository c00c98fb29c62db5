"""SAEs and transcoders of sae-lens: live objects, folders of all its versions, and entries of its registry.

An SAE is a config and a state of named tensors. One without an exact canonical equivalent is refused with the
reason and with what to use instead.

    sae = parse_sae_lens(config, state, config["metadata"], source="a folder")
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fgsteer.errors import FormatError, PairingError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.formats.base import NO_OPTIONS, LoadOptions, Source, State, load_state, refuse_unused_weights
from fgsteer.saes.formats.places import INSIDE_NORM, find_hookpoint
from fgsteer.saes.registry import RegistryRow, need_sae_lens
from fgsteer.saes.sae import INPUT_NORMS, SAE, InputNorm
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.json_files import text_sha256

WEIGHTS_FILE = "sae_weights.safetensors"
ARCHITECTURES = {
    "standard": "relu",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "gated": "gated",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
_TRAINING_CHECKPOINT = (
    "is a training checkpoint, whose k holds over a batch",
    "the jumprelu that sae-lens's save_inference_model writes",
)
_CROSS_LAYER = (
    "is a cross-layer transcoder, whose features write at many layers at once",
    "a transcoder of one layer, or an SAE on mlp_out",
)
# architectures, and conversions of sae-lens's registry, that are refused: (why, what to use instead)
REFUSED = {
    "temporal": ("encodes a token from all the tokens before it", "an SAE that reads one activation"),
    "matching_pursuit": ("encodes by a search that no encoder matrix expresses", "a topk or jumprelu SAE"),
    "abstopk": ("has negative activations, where every method here reads ≤ 0 as silent", "a topk or jumprelu SAE"),
    "batchtopk": _TRAINING_CHECKPOINT,
    "matryoshka_batchtopk": _TRAINING_CHECKPOINT,
    "mntss_clt_layer_transcoder": _CROSS_LAYER,
    "clt": _CROSS_LAYER,
    "gemma_2_transcoder": INSIDE_NORM,
    "connor_rob_hook_z": (
        "was trained on z without the value biases, which TransformerLens folds away and the model adds",
        "gpt2-small-attn-out-v5-32k, or another SAE on attn_out",
    ),
}
_INPUT_KEYS, _OUTPUT_KEYS = ("hf_hook_name", "hook_name"), ("hf_hook_name_out", "hook_name_out")
_MODEL_OPTIONS = "model_from_pretrained_kwargs"
_RMS_NORM_MODELS = re.compile(  # of which TransformerLens centres no writing weights
    r"llama|vicuna|gemma|mi[sx]tral|qwen|qwq|deepseek|\byi-|phi-?[34]|olmo-?[23]|olmoe|smollm|granite|glm|gpt-oss",
    re.IGNORECASE,
)


def is_live(source: Source) -> bool:
    """Tell whether the source is a live object."""
    return source.live is not None


def load_live(source: Source, options: LoadOptions) -> SAE:
    """Convert a live ``sae_lens.SAE``."""
    config = source.live.cfg.to_dict()
    return parse_sae_lens(
        config, source.live.state_dict(), config.get("metadata") or {}, source="sae_lens", options=options
    )


def is_folder(source: Source) -> bool:
    """Tell whether the source is a folder of sae-lens 6, whose config notes the version."""
    return _is_any_folder(source) and bool(source.config.get("metadata", {}).get("sae_lens_version"))


def load_folder(source: Source, options: LoadOptions) -> SAE:
    """Load a folder of sae-lens 6, local or of a revision of a repository."""
    folder = source.folder
    assert folder is not None
    _download_weights(source)
    state = load_state(folder / WEIGHTS_FILE)
    metadata = source.config.get("metadata") or {}
    return parse_sae_lens(source.config, state, metadata, source=str(folder), options=options)


def is_early_folder(source: Source) -> bool:
    """Tell whether the source is a folder of sae-lens before version 6."""
    return _is_any_folder(source) and not is_folder(source)


def load_early_folder(source: Source, options: LoadOptions) -> SAE:
    """Load a folder of sae-lens before version 6, which the installed sae-lens reads."""
    need_sae_lens(f"The SAE in {source.folder}, in a format of sae-lens before its version 6,")
    import sae_lens

    refuse_unsupported_fields(source.config)
    _download_weights(source)
    sae = load_live(Source(live=sae_lens.SAE.load_from_disk(source.folder)), options)
    return replace(sae, source=str(source.folder))


def _is_any_folder(source: Source) -> bool:
    """Tell whether the source is a folder of any sae-lens; of a release only where it is a revision's."""
    is_here = source.folder is not None and (source.row is None or source.revision is not None)
    metadata = source.config.get("metadata") or {}
    return is_here and isinstance(metadata, Mapping) and bool({"architecture", "d_sae"} & set(source.config))


def _download_weights(source: Source) -> None:
    """Download the weights of an entry of a release into the cache."""
    if source.row is not None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(source.row.repo_id, f"{source.row.path}/{WEIGHTS_FILE}", revision=source.revision)


def is_release(source: Source) -> bool:
    """Tell whether the source is an entry of a release in some layout that sae-lens reads; it knows no revisions."""
    return source.row is not None and source.revision is None


def load_release(source: Source, options: LoadOptions) -> SAE:
    """Load an entry of a release by sae-lens's own reader of its layout."""
    assert source.row is not None
    config, state = _read_by_sae_lens(source.row)
    return parse_sae_lens(config, state, config.get("metadata") or {}, source="", options=options)


def _read_by_sae_lens(row: RegistryRow) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return (config, state) by sae-lens's reader of the layout, pickles as weights only. Raises FormatError."""
    need_sae_lens(f"The layout {row.conversion!r} of {row.release}")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise FormatError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, under which a downloaded pickle may run code.",
            change="unset this environment variable",
        )
    read = loaders.NAMED_PRETRAINED_SAE_LOADERS.get(row.conversion)
    if read is None:
        raise FormatError(
            f"{row.release} in the layout {row.conversion!r}",
            "a layout that the installed sae-lens reads",
            "install a newer sae-lens",
        )
    overrides = {**row.overrides, "device": "cpu", "dtype": "float32"}
    config, state, _ = read(row.repo_id, row.path, "cpu", False, overrides)
    refuse_unsupported_fields(config)
    return loaders.handle_config_defaulting(config), state


def refuse_architecture(kind: str, what: str) -> None:
    """Raise PairingError, with the reason, for an architecture or a conversion that has no canonical form."""
    if kind in REFUSED:
        reason, instead = REFUSED[kind]
        raise PairingError(f"{what}, which {reason}", instead)


def refuse_unsupported_fields(config: Mapping[str, Any]) -> None:
    """Raise PairingError for fields that change what an SAE computes and have no canonical form.

    They are those of sae-lens before version 6, which it drops silently when it reads them.
    """
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    kwargs = config.get("activation_fn_kwargs") or {}
    topk = activation == "topk" and (kwargs.get("k") or config.get("architecture") == "topk")
    heads = ("hook_point_head_index", "hook_head_index", "hook_head_index_out")
    unsupported = {name: config[name] for name in heads if config.get(name) is not None}
    unsupported |= {
        f"activation_fn_kwargs {name}": value for name, value in kwargs.items() if name != "k" and value is not None
    }
    if activation != "relu" and not topk:
        unsupported["activation function"] = activation
    if config.get("reshape_activations") not in (None, "none", "hook_z"):
        unsupported["reshape_activations"] = config["reshape_activations"]
    if unsupported:
        raise PairingError(
            f"an SAE with {', '.join(f'{name} {value!r}' for name, value in unsupported.items())}",
            "an SAE that reads the whole activation and uses relu, or topk with k",
            "take another SAE: encoded otherwise, its features would be others",
        )


def parse_sae_lens(
    config: Mapping[str, Any],
    state: State,
    metadata: Mapping[str, Any],
    *,
    source: str,
    options: LoadOptions = NO_OPTIONS,
) -> SAE:
    """Return the canonical SAE of a sae-lens config and state.

    These are folded into the weights, each exactly: a known factor f on the input (expected_average_only_in),
    ``W_enc ·= f``, ``W_dec /= f``, ``b_dec /= f``; the decoder bias subtracted from the input,
    ``b_enc −= b_dec W_enc``; topk's decoder-norm rescaling, ``W_enc ·= n``, ``b_enc ·= n``, ``W_dec /= n``
    with n the decoder row norms; training on mean-centred residuals, ``W_enc −= mean(W_enc, 0)``.
    Raises PairingError for architectures and normalisations without an exact form.
    """
    refuse_unsupported_fields({**metadata, **config})
    architecture, norm, factor = _parse_kind(config, options.norm_scaling_factor)
    transcoder = "transcoder" in architecture
    tensors = _load_tensors(architecture, state)
    W_enc, W_dec, b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    b_enc = tensors["b_mag" if architecture == "gated" else "b_enc"]
    if factor is not None:
        W_enc, W_dec, b_dec = W_enc * factor, W_dec / factor, b_dec / factor
    subtracted = config.get("apply_b_dec_to_input", True) and not transcoder
    shift = b_dec @ W_enc if subtracted else torch.zeros_like(b_enc)
    read = find_hookpoint((metadata, config), _INPUT_KEYS, None if transcoder else options.hookpoint)
    model_name = str(metadata.get("model_name") or config.get("model_name") or "")
    model_options = metadata.get(_MODEL_OPTIONS) or config.get(_MODEL_OPTIONS) or {}
    centred = _is_centred(model_options, read, model_name)
    if centred:
        if norm == "constant_norm_rescale":
            raise PairingError(
                "an SAE that rescales mean-centred activations by their norm",
                "an SAE without centring, or with another normalisation",
            )
        W_enc = W_enc - W_enc.mean(0)  # trained on h − mean(h): (h − h̄) W = h (W − W̄)
    gate_bias = gate_scale = None
    if architecture == "gated":
        gate_scale = tensors["r_mag"].exp()
        gate_bias = tensors["b_gate"] - shift
        b_enc = b_enc - shift * gate_scale
    else:
        b_enc = b_enc - shift
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = W_dec.norm(dim=-1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms.clamp(min=1e-12)[:, None]
    return SAE(
        W_enc=W_enc.contiguous(),
        W_dec=W_dec.contiguous(),
        b_enc=b_enc,
        b_dec=b_dec,
        hookpoint=find_hookpoint((metadata, config), _OUTPUT_KEYS, options.hookpoint) if transcoder else read,
        activation=ARCHITECTURES[architecture],  # type: ignore[arg-type]
        threshold=tensors.get("threshold") if "jumprelu" in architecture else None,
        k=config.get("k") if architecture == "topk" else None,
        gate_bias=gate_bias,
        gate_scale=gate_scale,
        input_norm=norm,
        model_name=model_name,
        source=source,
        fingerprint=_fingerprint(config, state, factor, centred),
        neuronpedia=str(metadata.get("neuronpedia_id") or config.get("neuronpedia_id") or ""),
        prepend_bos=_parse_prepend_bos(metadata.get("prepend_bos", config.get("prepend_bos"))),
        reads=read if transcoder else None,
        W_skip=tensors["W_skip"].T.contiguous() if "skip" in architecture else None,
    )


def _parse_prepend_bos(value: Any) -> bool | None:
    """Tell whether BOS came before the training texts. Raises FormatError for anything but true, false or nothing."""
    if value is not None and not isinstance(value, bool):
        raise FormatError(f"prepend_bos = {value!r} in the SAE's config", "true or false")
    return value


def _parse_kind(config: Mapping[str, Any], factor: float | None) -> tuple[str, InputNorm, float | None]:
    """Return (architecture, input normalisation, factor to fold). Raises PairingError, with the reason, for others."""
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise PairingError(f"norm_scaling_factor = {factor}", "a finite number above 0")
    architecture = str(config.get("architecture", "standard"))
    what = f"a sae-lens SAE of architecture {architecture!r}"
    refuse_architecture(architecture, what)
    if architecture not in ARCHITECTURES:
        raise PairingError(what, f"one of the architectures {', '.join(ARCHITECTURES)}")
    norm: Any = config.get("normalize_activations") or "none"
    transcoder = "transcoder" in architecture
    if norm == "none" or (norm in INPUT_NORMS and not transcoder):
        return architecture, norm, None
    if norm == "expected_average_only_in" and factor is not None and not transcoder:
        return architecture, "none", factor
    raise PairingError(
        f"normalize_activations = {norm!r}{' of a transcoder' if transcoder else ''}",
        "none" if transcoder else f"one of {', '.join(INPUT_NORMS)}, or expected_average_only_in with its factor",
        "pass norm_scaling_factor=, or fold the factor with fold_activation_norm_scaling_factor of sae-lens",
    )


def _is_centred(model_options: Mapping[str, Any], read: Hookpoint, model_name: str) -> bool:
    """Tell whether TransformerLens, with these options, gave mean-centred values at a hookpoint.

    It does so for models with LayerNorm alone. Raises PairingError where it gave values that the model itself lacks.
    """
    if read.site == "z" and model_options.get("fold_value_biases"):
        refuse_architecture("connor_rob_hook_z", "this SAE")
    if read.site == "z" and model_options.get("refactor_factored_attn_matrices"):
        raise PairingError(
            "an SAE trained on z of refactored attention matrices, in a basis that the model itself lacks",
            "an SAE on attn_out, or on z of the model as it is",
        )
    if read.site == "mlp_in" and model_options.get("fold_ln"):
        refuse_architecture("gemma_2_transcoder", "this transcoder")
    centres = bool(model_options.get("center_writing_weights")) and not _RMS_NORM_MODELS.search(model_name)
    return centres and read.site not in ("z", "mlp_in")


def _load_tensors(architecture: str, state: State) -> dict[str, Tensor]:
    """Return the state in float32, with every tensor of the architecture. Raises FormatError, PairingError."""
    tensors = {name: tensor.detach().float().clone() for name, tensor in state.items()}
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not torch.all(tensors[name] == 1):
            raise PairingError(f"weights with a {name} other than 1", "an SAE without fine-tuned scales")
    if "log_threshold" in tensors:  # sae-lens before version 4
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    needed = ["W_enc", "W_dec", "b_dec", *(["b_mag", "b_gate", "r_mag"] if architecture == "gated" else ["b_enc"])]
    needed += ["threshold"] if "jumprelu" in architecture else []
    needed += ["W_skip"] if "skip" in architecture else []
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise FormatError(
            f"weights with {', '.join(state)} alone",
            f"weights of the architecture {architecture} with {', '.join(missing)} too",
            "get the files again from where they came",
        )
    refuse_unused_weights(tensors, [*needed, "scaling_factor", "finetuning_scaling_factor"], f"a {architecture} SAE")
    return tensors


def _fingerprint(config: Mapping[str, Any], state: State, factor: float | None, centred: bool) -> str:
    """Hash the weights as stored: folding rounds differently from machine to machine."""
    keys = ("architecture", "k", "normalize_activations", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
    values = [config.get(key) for key in keys] + ([] if factor is None else [factor]) + centred * ["centred"]
    return text_sha256([tensor_sha256(*(state[n] for n in sorted(state))), values])
