"""From every way that people keep SAEs to the one canonical ``SAE``.

load_sae("default")                                         the embedded one
load_sae("path/to/folder")                                  a saved sae-lens SAE
load_sae("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
load_sae(my_sae_lens_sae)                                   a live object
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgsteer.density import FeatureDensity
from fgsteer.errors import FormatError, HookpointError, PairingError
from fgsteer.files import read_json, tensor_sha256, text_sha256
from fgsteer.hookpoints import Hookpoint
from fgsteer.labels import load_labels
from fgsteer.models import DEFAULT, pretrained_dir
from fgsteer.sae import SAE

_ARCHITECTURES = {"standard": "relu", "jumprelu": "jumprelu", "topk": "topk", "gated": "gated"}
_INPUT_NORMS = ("none", "layer_norm", "constant_norm_rescale")
DENSITY_FILE = "density.safetensors"
LABELS_FILE = "labels.json"


def load_sae(source: Any = DEFAULT, sae_id: str | None = None, *, device: torch.device | str = "cpu") -> SAE:
    """An ``SAE`` from "default", a sae-lens folder, a sae-lens release and id, or a live ``sae_lens.SAE``.

    Weights come in float32. In a local folder, ``density.safetensors`` becomes ``sae.density``
    and ``labels.json`` ({"id": "label"}) ``sae.labels``.
    Raises FormatError when nothing is there or it is damaged, PairingError for a kind
    that has no exact canonical form, HookpointError for an unknown hook name.
    """
    if isinstance(source, SAE):
        return source.to(device)
    if not isinstance(source, str | Path):
        return _from_live(source).to(device)
    if str(source) == DEFAULT and sae_id is None:
        return _from_folder(pretrained_dir() / "sae").to(device)
    if sae_id is not None:
        return _from_release(str(source), sae_id).to(device)
    folder = Path(source)
    if not (folder / "cfg.json").is_file():
        raise FormatError(
            f"no SAE at {source!r}",
            'a folder with cfg.json and sae_weights.safetensors, or "default"',
            "for a sae-lens release pass its sae_id too",
        )
    return _from_folder(folder).to(device)


def _from_folder(folder: Path) -> SAE:
    """A folder saved by sae-lens 6 (read directly) or an earlier one (read by sae-lens)."""
    config = read_json(folder / "cfg.json")
    if not isinstance(config, Mapping):
        raise FormatError(f"{folder / 'cfg.json'} holds {type(config).__name__}", "an object")
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, Mapping) or not ({"architecture", "d_sae"} & set(config)):
        raise FormatError(f"{folder / 'cfg.json'} with fields {', '.join(config) or 'none'}", "a sae-lens config")
    if metadata.get("sae_lens_version"):
        state = _read_state(folder / "sae_weights.safetensors")
        try:
            sae = canonical(config, state, metadata, source=str(folder))
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            raise FormatError(f"the SAE in {folder} is damaged: {error}", "weights that fit its cfg.json") from error
    else:
        import sae_lens

        sae = replace(_from_live(sae_lens.SAE.load_from_disk(folder)), source=str(folder))
    if folder == _default_folder():
        sae = replace(sae, source=DEFAULT)
    if (folder / DENSITY_FILE).is_file():
        density = FeatureDensity.load(folder / DENSITY_FILE)
        sae = replace(sae, density=density.check(sae))
    if (folder / LABELS_FILE).is_file():
        sae = replace(sae, labels=load_labels(folder / LABELS_FILE, sae))
    return sae


def _default_folder() -> Path | None:
    try:
        return pretrained_dir() / "sae"
    except FormatError:
        return None


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path} is not readable: {error}", "safetensors weights beside cfg.json") from error


def _from_release(release: str, sae_id: str) -> SAE:
    """A sae-lens release; its own errors name unknown releases and ids."""
    import sae_lens

    loaded = sae_lens.SAE.from_pretrained(release, sae_id)
    return replace(_from_live(loaded), source=f"{release}/{sae_id}")


def _from_live(sae: Any) -> SAE:
    """A live ``sae_lens.SAE``. Raises PairingError for any other object."""
    if not hasattr(sae, "cfg") or not hasattr(sae, "state_dict"):
        raise PairingError(f"a {type(sae).__name__}", "a name, a folder, an fgsteer SAE or a sae_lens.SAE")
    config = sae.cfg.to_dict()
    return canonical(config, sae.state_dict(), config.get("metadata") or {}, source="sae_lens")


def canonical(
    config: Mapping[str, Any], state: Mapping[str, Tensor], metadata: Mapping[str, Any], *, source: str
) -> SAE:
    """The canonical SAE of a sae-lens config and state.

    Folds, each exact: the decoder bias subtracted from the input,
    ``b_enc −= b_dec W_enc``; topk's decoder-norm rescaling, ``W_enc ·= n``, ``b_enc ·= n``,
    ``W_dec /= n`` with n the decoder row norms; training on mean-centred residuals, ``W_enc −= mean(W_enc, 0)``.
    Raises PairingError for architectures and normalisations without an exact form.
    """
    architecture = str(config.get("architecture", "standard"))
    if architecture not in _ARCHITECTURES:
        raise PairingError(
            f"a sae-lens SAE of architecture {architecture!r}",
            f"one of {', '.join(_ARCHITECTURES)}",
            "batchtopk SAEs are saved as jumprelu by sae-lens: save with save_inference_model",
        )
    norm = config.get("normalize_activations") or "none"
    if norm not in _INPUT_NORMS:
        raise PairingError(
            f"normalize_activations = {norm!r}",
            f"one of {', '.join(_INPUT_NORMS)}",
            "fold it first with fold_activation_norm_scaling_factor(factor) of sae-lens",
        )
    if config.get("reshape_activations") not in (None, "none"):
        raise PairingError("an SAE on hook_z", "one on resid_pre, resid_post, attn_out or mlp_out")
    try:
        tensors = {name: tensor.detach().float().clone() for name, tensor in state.items()}
        W_enc, W_dec, b_dec = tensors["W_enc"], tensors["W_dec"], tensors["b_dec"]
        b_enc = tensors["b_mag"] if architecture == "gated" else tensors["b_enc"]
    except KeyError as error:
        raise FormatError(f"SAE weights hold {', '.join(state)}", f"{error} for architecture {architecture}") from error
    shift = b_dec @ W_enc if config.get("apply_b_dec_to_input", True) else torch.zeros_like(b_enc)
    kwargs = metadata.get("model_from_pretrained_kwargs") or config.get("model_from_pretrained_kwargs") or {}
    if kwargs.get("center_writing_weights"):  # trained on h − mean(h): (h − h̄) W = h (W − W̄)
        W_enc = W_enc - W_enc.mean(0)
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
        hookpoint=_hookpoint(metadata, config),
        activation=_ARCHITECTURES[architecture],  # type: ignore[arg-type]
        threshold=tensors.get("threshold"),
        k=config.get("k") if architecture == "topk" else None,
        gate_bias=gate_bias,
        gate_scale=gate_scale,
        input_norm=norm,  # type: ignore[arg-type]
        model_name=str(metadata.get("model_name") or config.get("model_name") or ""),
        source=source,
        fingerprint=_fingerprint(config, state),
    )


def _fingerprint(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Hash of the weights as stored: folding rounds differently from machine to machine."""
    keys = ("architecture", "k", "normalize_activations", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm")
    return text_sha256([tensor_sha256(*(state[n] for n in sorted(state))), [config.get(key) for key in keys]])


def _hookpoint(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> Hookpoint:
    """The hookpoint that the metadata names, the Hugging Face name first."""
    names = [m.get(key) for m in (metadata, config) for key in ("hf_hook_name", "hook_name")]
    for name in names:
        if isinstance(name, str) and name:
            try:
                return Hookpoint.parse(name)
            except HookpointError:
                continue
    raise HookpointError(
        f"SAE hook names {[n for n in names if n]}",
        "a residual, attn_out or mlp_out hook",
        "set cfg.metadata.hook_name, for example blocks.12.hook_resid_post",
    )
