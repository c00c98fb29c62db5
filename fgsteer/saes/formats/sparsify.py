"""SAEs and transcoders of EleutherAI's sparsify: a folder with cfg.json and sae.safetensors, named after a module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fgsteer.errors import FormatError, HookpointError, PairingError
from fgsteer.models.hookpoints import Hookpoint, Site
from fgsteer.saes.formats.base import LoadOptions, Source, State, load_state, refuse_unused_weights
from fgsteer.saes.formats.places import check_given
from fgsteer.saes.sae import SAE
from fgsteer.storage.files import tensor_sha256
from fgsteer.storage.json_files import read_json, text_sha256

WEIGHTS_FILE = "sae.safetensors"
RUN_FILE = "config.json"  # of the run that trained several SAEs, beside their folders
# sparsify names a module: its input is read by a transcoder, its output by an SAE
_MODULE = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.(mlp|self_attn|attn|attention|self_attention))?")
# fields of any version of sparsify under which it computes something else
_UNSUPPORTED_FIELDS = (
    *("signed", "embed_skip", "gram_lookup", "normalize_io", "n_targets", "n_sources", "divide_cross_layer"),
    *("post_encoder_scale", "per_source_tied", "secondary_target_tied", "coalesce_topk"),
)
_POST_NORM_MODELS = re.compile(r"gemma-?[23]|olmo-?2|glm-?4", re.IGNORECASE)


def is_sparsify(source: Source) -> bool:
    """Tell whether cfg.json was written by sparsify rather than by sae-lens."""
    config = source.config
    return "d_in" in config and "k" in config and not {"architecture", "d_sae"} & set(config)


def load_sparsify(source: Source, options: LoadOptions) -> SAE:
    """Load a sparsify folder, local or of a repository; the run's config.json beside it names the model."""
    folder = source.folder
    assert folder is not None
    if source.row is not None:
        from huggingface_hub import hf_hub_download

        _download_if_there(source.row.repo_id, RUN_FILE, source.revision)  # names the model, where a run kept it
        hf_hub_download(source.row.repo_id, f"{source.row.path}/{WEIGHTS_FILE}", revision=source.revision)
    run = folder.resolve().parent / RUN_FILE
    run_config = read_json(run) if run.is_file() else {}
    return parse_sparsify(
        source.config,
        load_state(folder / WEIGHTS_FILE),
        folder.name,
        source=str(folder),
        model_name=str(run_config.get("model") or "") if isinstance(run_config, Mapping) else "",
        hookpoint=options.hookpoint,
    )


def _download_if_there(repo_id: str, name: str, revision: str | None) -> None:
    """Download a file into the cache, if the repository has it; a file known to be missing is not asked for."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if try_to_load_from_cache(repo_id, name, revision=revision) is _CACHED_NO_EXIST:
        return
    try:
        hf_hub_download(repo_id, name, revision=revision)
    except LocalEntryNotFoundError:  # not known without a request
        raise
    except EntryNotFoundError:
        return


def parse_sparsify(
    config: Mapping[str, Any],
    state: State,
    folder: str,
    *,
    source: str,
    model_name: str = "",
    hookpoint: Hookpoint | None = None,
) -> SAE:
    """Return the canonical SAE or transcoder of a sparsify config and state.

    ``acts = topk(relu(W_enc (x − b_dec) + b_enc))``, of x alone for a transcoder;
    ``x̂ = acts W_dec + b_dec (+ W_skip x)``. The hookpoint is the folder's name, a module
    such as layers.12 or h.5.mlp, unless given. Raises PairingError for other activations,
    HookpointError for a folder that names no module.
    """
    activation = str(config.get("activation", "topk"))
    unsupported = [name for name in _UNSUPPORTED_FIELDS if config.get(name) not in (None, False, 0, "none")]
    if activation != "topk" or unsupported:
        raise PairingError(
            f"a sparsify SAE with {', '.join(unsupported) or f'activation {activation!r}'}",
            "a sparsify SAE with topk of the ReLU, from this activation alone",
            "take one trained with topk: competition within groups, signed activations and other inputs have no "
            "canonical form",
        )
    tensors = {name: tensor.detach().float() for name, tensor in state.items()}
    needed = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"} | (
        {"W_skip"} if config.get("skip_connection") else set()
    )
    missing = needed - set(tensors)
    if missing:
        raise FormatError(
            f"weights with {', '.join(state)} alone",
            f"sparsify weights with {', '.join(sorted(missing))} too",
            "get the files again from where they came",
        )
    refuse_unused_weights(tensors, needed, "a sparsify SAE")
    reads, writes = _module_hookpoints(folder, bool(config.get("transcode")), model_name, hookpoint)
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


def _module_hookpoints(
    folder: str, transcode: bool, model_name: str, given: Hookpoint | None
) -> tuple[Hookpoint | None, Hookpoint]:
    """Return where a sparsify SAE or transcoder reads (None: where it writes) and writes."""
    match = _MODULE.fullmatch(folder)
    if match is None:
        if given is not None and not transcode:
            return None, given
        raise HookpointError(
            f"a sparsify folder {folder!r}",
            "a folder named after a block or sublayer, such as layers.12, layers.3.mlp or h.5",
            "rename it, or pass hookpoint= (for an SAE that is no transcoder)",
        )
    layer, sublayer = int(match[1]), match[2]
    if sublayer and _POST_NORM_MODELS.search(model_name):
        raise PairingError(
            f"a sparsify SAE on {folder} of {model_name}, before the sublayer's post-norm",
            "an SAE on a whole block, such as layers.12",
        )
    sites: tuple[Site, Site]
    if sublayer is None:
        sites = "resid_pre", "resid_post"
    elif sublayer == "mlp":
        sites = "mlp_in", "mlp_out"
    elif transcode:
        raise HookpointError(f"a transcoder of {folder}", "a transcoder of an MLP or of a whole block")
    else:
        sites = "resid_pre", "attn_out"
    return Hookpoint(layer, sites[0]) if transcode else None, check_given(Hookpoint(layer, sites[1]), given)
