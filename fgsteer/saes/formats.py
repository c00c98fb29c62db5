"""From each stored form of an SAE (sae-lens, sparsify, Gemma Scope 2) to the canonical ``SAE``.

A form is a config, a state of named tensors, and nothing else: what reads files and the
hub is in ``sae_loaders``. A form without an exact canonical equivalent is refused with
its reason and what to use instead.

    sae = canonical(config, state, config["metadata"], source="a folder")
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fgsteer.errors import FormatError, HookpointError, PairingError
from fgsteer.models.hookpoints import Hookpoint, Site
from fgsteer.saes.registry import RegistryRow
from fgsteer.saes.sae import INPUT_NORMS, SAE, InputNorm
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.json_files import text_sha256

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
_TRAINING = (
    "is a training checkpoint, whose k holds over a batch",
    "the jumprelu that sae-lens's save_inference_model writes",
)
_IN_NORM = (
    "reads inside the MLP's norm, before its gain, which only the model's weights hold",
    "a transcoder that reads mlp.hook_in (Gemma Scope 2, mwhanna-qwen3), or an SAE on mlp_out",
)
_CROSS_LAYER = (
    "is a cross-layer transcoder, whose features write at many layers at once",
    "a transcoder of one layer, or an SAE on mlp_out",
)
REFUSED = {  # architecture, or conversion of sae-lens's registry: (why, what to use instead)
    "temporal": ("encodes a token from all the tokens before it", "an SAE that reads one activation"),
    "matching_pursuit": ("encodes by a search that no encoder matrix expresses", "a topk or jumprelu SAE"),
    "abstopk": ("has negative activations, where every method here reads ≤ 0 as silent", "a topk or jumprelu SAE"),
    "batchtopk": _TRAINING,
    "matryoshka_batchtopk": _TRAINING,
    "mntss_clt_layer_transcoder": _CROSS_LAYER,
    "clt": _CROSS_LAYER,
    "gemma_2_transcoder": _IN_NORM,
    "connor_rob_hook_z": (
        "was trained on z without the value biases, which TransformerLens folds away and the model adds",
        "gpt2-small-attn-out-v5-32k, or another SAE on attn_out",
    ),
}
_UNREACHABLE = {  # hook names of TransformerLens that are no input or output of a module: (why, instead)
    "hook_resid_mid": ("reads between attention and MLP, where no module ends", "an SAE on resid_pre or resid_post"),
    "hook_mlp_in": ("reads before the MLP's norm, where no module ends", "an SAE on resid_pre, or one on mlp.hook_in"),
    "ln2.hook_normalized": _IN_NORM,
    "hook_embed": ("reads the token embedding", "an SAE on resid_pre of layer 0"),
}
_KWARGS, _OUT = "model_from_pretrained_kwargs", ("hf_hook_name_out", "hook_name_out")
_HF_HOOKS: tuple[tuple[str, Site], ...] = (  # Gemma Scope 2's names of places
    (r"layers\.(\d+)\.self_attn\.o_proj\.input", "z"),
    (r"layers\.(\d+)\.pre_feedforward_layernorm\.output", "mlp_in"),
    (r"layers\.(\d+)\.post_feedforward_layernorm\.output", "mlp_out"),
)
# sparsify names a module: its input is read by a transcoder, its output by an SAE
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(mlp|self_attn|attn|attention|self_attention))?")
# fields of sparsify, of any of its versions, under which it computes something else
_UNLIKE = (
    *("signed", "embed_skip", "gram_lookup", "normalize_io", "n_targets", "n_sources", "divide_cross_layer"),
    *("post_encoder_scale", "per_source_tied", "secondary_target_tied", "coalesce_topk"),
)
_RMS_NORM = re.compile(  # TransformerLens centres no writing weights of these
    r"llama|vicuna|gemma|mi[sx]tral|qwen|qwq|deepseek|\byi-|phi-?[34]|olmo-?[23]|olmoe|smollm|granite|glm|gpt-oss",
    re.IGNORECASE,
)
_POST_NORM = re.compile(r"gemma-?[23]|olmo-?2|glm-?4", re.IGNORECASE)


def refuse(kind: str, what: str) -> None:
    """Nothing for a kind that can be read. Raises PairingError with the reason for one that cannot."""
    if kind in REFUSED:
        why, instead = REFUSED[kind]
        raise PairingError(f"{what} {why}", instead)


def refuse_place(hook_name: str) -> None:
    """Nothing for most hook names. Raises HookpointError with the reason for one that no module reads or writes."""
    why, instead = _UNREACHABLE.get(hook_name.split(".", 2)[-1], ("", ""))
    if why:
        raise HookpointError(f"an SAE at {hook_name}, which {why}", instead)


def refuse_unread(config: Mapping[str, Any]) -> None:
    """Nothing for most configs. Raises PairingError for fields that change what an SAE computes and have no form here.

    They are those of sae-lens before version 6, which it drops without a word when it reads them.
    """
    activation = config.get("activation_fn_str") or config.get("activation_fn") or "relu"
    given = config.get("activation_fn_kwargs") or {}
    topk = activation == "topk" and (given.get("k") or config.get("architecture") == "topk")
    told = {name: config.get(name) for name in ("hook_point_head_index", "hook_head_index", "hook_head_index_out")}
    told = {name: value for name, value in told.items() if value is not None}
    told |= {
        f"activation_fn_kwargs {name}": value for name, value in given.items() if name != "k" and value is not None
    }
    if activation != "relu" and not topk:
        told["activation function"] = activation
    if config.get("reshape_activations") not in (None, "none", "hook_z"):
        told["reshape_activations"] = config["reshape_activations"]
    if told:
        raise PairingError(
            f"an SAE with {', '.join(f'{name} {value!r}' for name, value in told.items())}",
            "relu, or topk with its k, of a whole activation",
            "take another SAE: encoded otherwise, its features would be others",
        )


def canonical(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    source: str,
    hookpoint: Hookpoint | None = None,
    norm_scaling_factor: float | None = None,
) -> SAE:
    """The canonical SAE of a sae-lens config and state.

    Folds, each exact: a known factor f on the input (expected_average_only_in), ``W_enc ·= f``,
    ``W_dec /= f``, ``b_dec /= f``; the decoder bias subtracted from the input,
    ``b_enc −= b_dec W_enc``; topk's decoder-norm rescaling, ``W_enc ·= n``, ``b_enc ·= n``,
    ``W_dec /= n`` with n the decoder row norms; training on mean-centred residuals, ``W_enc −= mean(W_enc, 0)``.
    Raises PairingError for architectures and normalisations without an exact form.
    """
    refuse_unread({**metadata, **config})
    architecture, norm, factor = _kind(config, norm_scaling_factor)
    transcoder = "transcoder" in architecture
    tensors = _tensors(architecture, state)
    W_enc, W_dec, b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
    b_enc = tensors["b_mag" if architecture == "gated" else "b_enc"]
    if factor is not None:
        W_enc, W_dec, b_dec = W_enc * factor, W_dec / factor, b_dec / factor
    subtracted = config.get("apply_b_dec_to_input", True) and not transcoder
    shift = b_dec @ W_enc if subtracted else torch.zeros_like(b_enc)
    read = _place((metadata, config), ("hf_hook_name", "hook_name"), None if transcoder else hookpoint)
    model_name = str(metadata.get("model_name") or config.get("model_name") or "")
    centred = _centred(metadata.get(_KWARGS) or config.get(_KWARGS) or {}, read, model_name)
    if centred:
        if norm == "constant_norm_rescale":
            raise PairingError(
                "an SAE that rescales mean-centred activations by their norm", "no centring, or another normalisation"
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
        hookpoint=_place((metadata, config), _OUT, hookpoint) if transcoder else read,
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
        prepend_bos=_prepends(metadata.get("prepend_bos", config.get("prepend_bos"))),
        reads=read if transcoder else None,
        W_skip=tensors["W_skip"].T.contiguous() if "skip" in architecture else None,
    )


def _prepends(told: Any) -> bool | None:
    """Whether BOS stood before the training texts. Raises FormatError for what is neither true, false nor missing."""
    if told is not None and not isinstance(told, bool):
        raise FormatError(f"prepend_bos = {told!r} in the SAE's config", "true or false")
    return told


def _kind(config: Mapping[str, Any], factor: float | None) -> tuple[str, InputNorm, float | None]:
    """(architecture, input normalisation, factor to fold). Raises PairingError with the reason for another kind."""
    if factor is not None and not (isinstance(factor, int | float) and 0 < factor < math.inf):
        raise PairingError(f"norm_scaling_factor = {factor}", "a finite number > 0")
    architecture = str(config.get("architecture", "standard"))
    what = f"a sae-lens SAE of architecture {architecture!r}"
    refuse(architecture, what)
    if architecture not in ARCHITECTURES:
        raise PairingError(what, f"one of {', '.join(ARCHITECTURES)}")
    norm: Any = config.get("normalize_activations") or "none"
    transcoder = "transcoder" in architecture
    if norm == "none" or (norm in INPUT_NORMS and not transcoder):
        return architecture, norm, None
    if norm == "expected_average_only_in" and factor is not None and not transcoder:
        return architecture, "none", factor
    raise PairingError(
        f"normalize_activations = {norm!r}{' of a transcoder' if transcoder else ''}",
        "none" if transcoder else f"one of {', '.join(INPUT_NORMS)}, or expected_average_only_in with its factor",
        "pass norm_scaling_factor=, or fold it with fold_activation_norm_scaling_factor of sae-lens",
    )


def _centred(kwargs: Mapping[str, Any], read: Hookpoint, model_name: str) -> bool:
    """Whether TransformerLens, loaded so, gives mean-centred values at a hookpoint: of LayerNorm models alone.

    Raises PairingError where it gives values that the model alone does not have.
    """
    if read.site == "z" and kwargs.get("fold_value_biases"):
        refuse("connor_rob_hook_z", "this SAE")
    if read.site == "z" and kwargs.get("refactor_factored_attn_matrices"):
        raise PairingError(
            "an SAE trained on z of refactored attention matrices, in a basis that the model alone does not have",
            "an SAE on attn_out, or on z of the model as it is",
        )
    if read.site == "mlp_in" and kwargs.get("fold_ln"):
        refuse("gemma_2_transcoder", "this transcoder")
    asked = bool(kwargs.get("center_writing_weights")) and not _RMS_NORM.search(model_name)
    return asked and read.site not in ("z", "mlp_in")


def _tensors(architecture: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state in float32, with every tensor of the architecture. Raises FormatError, PairingError."""
    tensors = {name: tensor.detach().float().clone() for name, tensor in state.items()}
    for name in ("scaling_factor", "finetuning_scaling_factor"):
        if name in tensors and not torch.all(tensors[name] == 1):
            raise PairingError(f"weights with a {name}", "an SAE without fine-tuned scales")
    if "log_threshold" in tensors:  # sae-lens before version 4
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    needed = ["W_enc", "W_dec", "b_dec", *(["b_mag", "b_gate", "r_mag"] if architecture == "gated" else ["b_enc"])]
    needed += ["threshold"] if "jumprelu" in architecture else []
    needed += ["W_skip"] if "skip" in architecture else []
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise FormatError(
            f"SAE weights hold {', '.join(state)}", f"{', '.join(missing)} for architecture {architecture}"
        )
    _refuse_unread_weights(tensors, {*needed, "scaling_factor", "finetuning_scaling_factor"}, f"a {architecture} SAE")
    return tensors


def _refuse_unread_weights(tensors: Mapping[str, Tensor], read: set[str], what: str) -> None:
    """Raises PairingError for weights, not all 0, that the SAE as it is described would not use."""
    unread = sorted(name for name, tensor in tensors.items() if name not in read and bool(tensor.any()))
    if unread:
        raise PairingError(f"{what} with weights {', '.join(unread)}", f"{', '.join(sorted(read))}, and no others")


def _fingerprint(config: Mapping[str, Any], state: Mapping[str, Tensor], factor: float | None, centred: bool) -> str:
    """Hash of the weights as stored: folding rounds differently from machine to machine."""
    keys = ("architecture", "k", "normalize_activations", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
    values = [config.get(key) for key in keys] + ([] if factor is None else [factor]) + centred * ["centred"]
    return text_sha256([tensor_sha256(*(state[n] for n in sorted(state))), values])


def _place(configs: tuple[Mapping[str, Any], ...], keys: tuple[str, ...], given: Hookpoint | None) -> Hookpoint:
    """The hookpoint that a config names (under the first key that can be read), or the one given.

    Raises HookpointError for names without a place, PairingError when both are there and differ.
    """
    names = [str(m[key]) for m in configs for key in keys if m.get(key)]
    for name in names:
        found = _parse(name)
        if found is not None:
            return _agree(found, given)
    for name in names:
        refuse_place(name)
    if given is not None:
        return given
    raise HookpointError(
        f"SAE hook names {names}",
        "a residual, attn_out, mlp_out, z or mlp_in hook",
        "pass hookpoint=, for example blocks.12.hook_resid_post",
    )


def _agree(found: Hookpoint, given: Hookpoint | None) -> Hookpoint:
    """The hookpoint found. Raises PairingError for another one given."""
    if given is not None and given != found:
        raise PairingError(f"hookpoint={given}", f"{found}, where this SAE was trained", "leave it out")
    return found


def _parse(name: str) -> Hookpoint | None:
    for pattern, site in _HF_HOOKS:
        if match := re.search(pattern + "$", name):
            return Hookpoint(int(match[1]), site)
    try:
        return Hookpoint.parse(name)
    except HookpointError:
        return None


def is_sparsify(config: Mapping[str, Any]) -> bool:
    """Whether a cfg.json was written by EleutherAI's sparsify rather than by sae-lens."""
    return "d_in" in config and "k" in config and not {"architecture", "d_sae"} & set(config)


def sparsify(
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    folder: str,
    *,
    source: str,
    model_name: str = "",
    hookpoint: Hookpoint | None = None,
) -> SAE:
    """The canonical SAE or transcoder of a sparsify config and state.

    ``acts = topk(relu(W_enc (x − b_dec) + b_enc))``, of x alone for a transcoder;
    ``x̂ = acts W_dec + b_dec (+ W_skip x)``. The hookpoint is the folder's name, a module
    such as layers.12 or h.5.mlp, unless given. Raises PairingError for other activations,
    HookpointError for a folder that names no module.
    """
    activation = str(config.get("activation", "topk"))
    unlike = [name for name in _UNLIKE if config.get(name) not in (None, False, 0, "none")]
    if activation != "topk" or unlike:
        raise PairingError(
            f"a sparsify SAE with {', '.join(unlike) or f'activation {activation!r}'}",
            "topk of the ReLU, from this activation alone",
            "competition within groups, signed activations and other inputs have no canonical form: train with topk",
        )
    tensors = {name: tensor.detach().float() for name, tensor in state.items()}
    needed = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} | (
        {"W_skip"} if config.get("skip_connection") else set()
    )
    missing = needed - set(tensors)
    if missing:
        raise FormatError(f"sparsify weights hold {', '.join(state)}", f"{', '.join(sorted(missing))} too")
    _refuse_unread_weights(tensors, needed, "a sparsify SAE")
    reads, writes = _module_places(folder, bool(config.get("transcode")), model_name, hookpoint)
    W_enc = tensors["encoder.weight"].T.contiguous()
    b_enc, b_dec = tensors["encoder.bias"], tensors["b_dec"]
    if reads is None:
        b_enc = b_enc - b_dec @ W_enc
    return SAE(
        W_enc=W_enc,
        W_dec=tensors["W_dec"].contiguous(),
        b_enc=b_enc,
        b_dec=b_dec,
        hookpoint=writes,
        activation="topk",
        k=config["k"],
        model_name=model_name,
        source=source,
        fingerprint=text_sha256(
            [tensor_sha256(*(state[n] for n in sorted(state))), [config["k"], config.get("transcode")]]
        ),
        reads=reads,
        W_skip=tensors["W_skip"].T.contiguous() if config.get("skip_connection") else None,
    )


def _module_places(
    folder: str, transcode: bool, model_name: str, given: Hookpoint | None
) -> tuple[Hookpoint | None, Hookpoint]:
    """Where a sparsify coder reads (None: where it writes) and writes."""
    match = _MODULE.fullmatch(folder)
    if match is None:
        if given is not None and not transcode:
            return None, given
        raise HookpointError(
            f"sparsify hookpoint {folder!r}",
            "a folder named after a block or sublayer, such as layers.12, layers.3.mlp or h.5",
            "rename it, or pass hookpoint= (of an SAE that is no transcoder)",
        )
    layer, sublayer = int(match[1]), match[2]
    if sublayer and _POST_NORM.search(model_name):
        raise PairingError(
            f"a sparsify SAE on {folder} of {model_name}, before the sublayer's post-norm",
            "one on a whole block, such as layers.12",
        )
    sites: tuple[Site, Site]
    if sublayer is None:
        sites = "resid_pre", "resid_post"
    elif sublayer == "mlp":
        sites = "mlp_in", "mlp_out"
    elif transcode:
        raise HookpointError(f"a transcoder of {folder}", "one of an MLP or of a whole block")
    else:
        sites = "resid_pre", "attn_out"
    return Hookpoint(layer, sites[0]) if transcode else None, _agree(Hookpoint(layer, sites[1]), given)


def gemma_scope_2(row: RegistryRow, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state) as sae-lens has them, of the params.safetensors of a Gemma Scope 2 release.

    Raises PairingError for cross-layer transcoders, FormatError for an unknown layout.
    """
    place = re.match(r"(resid_post|attn_out|mlp_out|transcoder|clt)\w*/layer_(\d+)", row.path)
    if place is None:
        raise FormatError(f"{row.repo_id}/{row.path}", "a path such as resid_post/layer_12_width_16k_l0_small")
    kind, layer = place[1], int(place[2])
    refuse(kind, f"{row.release}/{row.sae_id}")
    names = {"w_enc": "W_enc", "w_dec": "W_dec", "affine_skip_connection": "W_skip"}
    tensors = {names.get(name, name): tensor for name, tensor in state.items()}
    transcoder, skip = kind == "transcoder", "W_skip" in tensors
    sites: dict[str, Site] = {"resid_post": "resid_post", "attn_out": "z", "mlp_out": "mlp_out", "transcoder": "mlp_in"}
    config = {
        "architecture": ("jumprelu_skip_transcoder" if skip else "jumprelu_transcoder") if transcoder else "jumprelu",
        "apply_b_dec_to_input": False,
        "prepend_bos": True,
        "model_name": row.model,
        "neuronpedia_id": row.neuronpedia,
        "hook_name": str(Hookpoint(layer, sites[kind])),
        "hook_name_out": str(Hookpoint(layer, "mlp_out")) if transcoder else None,
    }
    if skip:  # stored as (d_in, d_out), kept by sae-lens as (d_out, d_in)
        tensors["W_skip"] = tensors["W_skip"].T
    return config, tensors
