"""From every way that people keep SAEs to the one canonical ``SAE``.

load_sae("default")                                         the embedded one at the middle layer
load_sae("default", "layer_1")                              another embedded one
load_sae("path/to/folder")                                  a saved sae-lens or sparsify SAE
load_sae("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
load_sae("EleutherAI/sae-pythia-160m-32k", "layers.5")      a folder of a Hugging Face repository
load_sae(my_sae_lens_sae)                                   a live object
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from fgsteer.errors import FgsteerError, FormatError, MissingError, PairingError
from fgsteer.errors.wording import a
from fgsteer.models.embedded import DEFAULT, embedded_sae_dir
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.density import FeatureDensity
from fgsteer.saes.examples import FeatureExamples
from fgsteer.saes.formats import (
    canonical,
    gemma_scope_2,
    is_sparsify,
    refuse,
    refuse_place,
    refuse_unread,
    sparsify,
)
from fgsteer.saes.labels import load_labels
from fgsteer.saes.registry import RegistryRow, find_row, need_sae_lens
from fgsteer.saes.sae import SAE
from fgsteer.storage.files import check_names
from fgsteer.storage.json_files import read_json
from fgsteer.storage.network import describe_unreachable, hub_is_reachable

DENSITY_FILE = "density.safetensors"
LABELS_FILE = "labels.json"
EXAMPLES_FILE = "examples.safetensors"
_DAMAGE = (
    OSError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ValueError,
    ArithmeticError,
    UnpicklingError,
    SafetensorError,
)
_hub = threading.RLock()
T = TypeVar("T")


def load_sae(
    source: Any = DEFAULT,
    sae_id: str | None = None,
    *,
    hookpoint: Hookpoint | str | None = None,
    norm_scaling_factor: float | None = None,
    device: torch.device | str = "cpu",
) -> SAE:
    """An ``SAE`` from "default", a folder, a sae-lens release and id, a hub repository and folder, or a live object.

    Weights come in float32. Folders are those of sae-lens or of sparsify; ``fgsteer saes``
    lists the releases. A transcoder reads at ``sae.reads`` and steers at ``sae.hookpoint``;
    an SAE on hook_z reads and steers the input of the output projection.
    ``hookpoint`` says where an SAE was trained that does not say so itself;
    ``norm_scaling_factor`` is the factor f on the input of an expected_average_only_in SAE
    that was saved without it. In a local folder, ``density.safetensors`` becomes
    ``sae.density`` and ``labels.json`` ({"id": "label"}) ``sae.labels``. A repository may be pinned to a branch,
    tag or commit: "me/saes@v2".

    What is in the Hugging Face cache is read without a request, so a release whose files
    changed since is not refreshed: delete it from the cache for that. Some releases are
    pickles: they are read as weights only, which runs no code.

    Raises FormatError when nothing is there or it is damaged, PairingError for a kind
    that has no exact canonical form, HookpointError for an unknown hook name.
    """
    if isinstance(source, SAE):
        return source.to(device)
    if sae_id is not None and not isinstance(sae_id, str):
        raise FormatError(f"sae_id {sae_id!r}", "a text, such as blocks.5.hook_resid_pre")
    given: dict[str, Any] = {
        "hookpoint": None if hookpoint is None else Hookpoint.parse(hookpoint),
        "norm_scaling_factor": norm_scaling_factor,
    }
    return _finite(_load(source, sae_id, given)).to(device)


def _finite(sae: SAE) -> SAE:
    """The SAE. Raises FormatError for weights with nan or inf."""
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        if not bool(getattr(sae, name).isfinite().all()):
            raise FormatError(f"{name} of {sae.source} holds nan or inf", "finite weights", "get the files again")
    return sae


def _load(source: Any, sae_id: str | None, given: dict[str, Any]) -> SAE:
    """The SAE by the reader of what ``source`` is."""
    if not isinstance(source, str | Path):
        return _from_live(source, given)
    if str(source) == DEFAULT:
        folder = embedded_sae_dir(sae_id)
        return replace(_from_folder(folder, given), source=f"{DEFAULT}/{folder.name}")
    folder = Path(source) / (sae_id or "")
    if sae_id is not None and not (folder / "cfg.json").is_file():
        return _from_release(str(source), sae_id, given)
    if not (folder / "cfg.json").is_file():
        raise FormatError(
            f"no SAE at {str(source)!r}{_subfolders(folder)}",
            'a folder with cfg.json and its weights, or "default"',
            "for a sae-lens release or a folder of a run pass its sae_id too",
        )
    return _from_folder(folder, given)


def _subfolders(folder: Path) -> str:
    """The SAEs one level below a folder, as part of a message."""
    found = sorted(path.parent.name for path in folder.glob("*/cfg.json"))
    return f", which holds several: {', '.join(found)}" if found else ""


def _from_folder(folder: Path, given: Mapping[str, Any]) -> SAE:
    """A folder of sparsify or of sae-lens 6 (read directly), or of an earlier sae-lens (read by it)."""
    config = read_json(folder / "cfg.json")
    if not isinstance(config, Mapping):
        raise FormatError(f"{folder / 'cfg.json'} holds {type(config).__name__}", "an object")
    metadata = config.get("metadata") or {}
    if not isinstance(metadata, Mapping) or not (is_sparsify(config) or {"architecture", "d_sae"} & set(config)):
        raise FormatError(
            f"{folder / 'cfg.json'} with fields {', '.join(config) or 'none'}", "a sae-lens config or a sparsify config"
        )
    with _damage(f"the SAE in {folder}"):
        if is_sparsify(config):
            sae = _read_sparsify(folder, config, given)
        elif metadata.get("sae_lens_version"):
            state = _read_state(folder / "sae_weights.safetensors")
            sae = canonical(config, state, metadata, source=str(folder), **given)
        else:
            need_sae_lens(f"The SAE in {folder}, as sae-lens wrote them before its version 6,")
            import sae_lens

            refuse_unread(config)
            sae = replace(_from_live(sae_lens.SAE.load_from_disk(folder), given), source=str(folder))
    if (folder / DENSITY_FILE).is_file():
        density = FeatureDensity.load(folder / DENSITY_FILE)
        sae = replace(sae, density=density.check(sae))
    if (folder / LABELS_FILE).is_file():
        sae = replace(sae, labels=load_labels(folder / LABELS_FILE, sae))
    return sae


def load_examples(sae: SAE) -> FeatureExamples | None:
    """The excerpts kept in the folder that an SAE was loaded from, as ``examples.safetensors``; None without.

    Raises FormatError for a damaged file, PairingError for excerpts of another SAE.
    """
    source, _, name = sae.source.partition("/")
    folder = embedded_sae_dir(name) if source == DEFAULT else Path(sae.source)
    path = folder / EXAMPLES_FILE
    return FeatureExamples.load(path).check(sae) if sae.source and path.is_file() else None


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """Errors of a config and weights that do not fit together, as FormatError."""
    try:
        yield
    except FgsteerError:
        raise
    except _DAMAGE as error:
        raise FormatError(f"{what} cannot be read: {error}", "a config and weights that fit it") from error


def _read_sparsify(folder: Path, config: Mapping[str, Any], given: Mapping[str, Any]) -> SAE:
    """A sparsify folder; the run's config.json beside it names the model."""
    run = folder.resolve().parent / "config.json"
    told = read_json(run) if run.is_file() else {}
    return sparsify(
        config,
        _read_state(folder / "sae.safetensors"),
        folder.name,
        source=str(folder),
        model_name=str(told.get("model") or "") if isinstance(told, Mapping) else "",
        hookpoint=given["hookpoint"],
    )


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        check_names(path)
        return state
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(f"{path} is not readable: {error}", "safetensors weights beside cfg.json") from error


def _from_live(sae: Any, given: Mapping[str, Any]) -> SAE:
    """A live ``sae_lens.SAE``. Raises PairingError for any other object."""
    if not hasattr(sae, "cfg") or not hasattr(sae, "state_dict"):
        raise PairingError(f"{a(type(sae).__name__)}", "a name, a folder, an fgsteer SAE or a sae_lens.SAE")
    config = sae.cfg.to_dict()
    return canonical(config, sae.state_dict(), config.get("metadata") or {}, source="sae_lens", **given)


def _from_release(release: str, sae_id: str, given: dict[str, Any]) -> SAE:
    """A release of sae-lens's registry, or a folder of any Hugging Face repository, of a revision if one is named."""
    repo_id, at, revision = release.partition("@")
    row = find_row(repo_id, sae_id)
    if at and (row is not None or not revision):
        raise FormatError(f"{release!r:.100}", "a repository and its revision, such as me/saes@main")
    row = row or RegistryRow(release, sae_id, model="", repo_id=repo_id, path=sae_id)
    refuse(row.conversion, f"{release}/{sae_id}")
    refuse_place(row.hookpoint)
    if given["norm_scaling_factor"] is None:
        given = {**given, "norm_scaling_factor": row.norm_scaling_factor}
    sae = _cached_first(lambda: _read_release(row, given, revision or None), f"{release}/{sae_id}")
    return replace(sae, source=f"{release}/{sae_id}", neuronpedia=row.neuronpedia or sae.neuronpedia)


def _read_release(row: RegistryRow, given: Mapping[str, Any], revision: str | None) -> SAE:
    """The files of a row, from the cache or the hub, by the reader of their layout; sae-lens's knows no revisions."""
    from huggingface_hub import hf_hub_download

    if row.conversion == "gemma_3":  # sae-lens's reader asks the hub for shapes, cached or not
        path = hf_hub_download(row.repo_id, f"{row.path}/params.safetensors")
        config, state = gemma_scope_2(row, _read_state(Path(path)))
        return canonical(config, state, {}, source="", **given)
    if row.conversion in ("sae_lens", "sparsify"):
        path = hf_hub_download(row.repo_id, f"{row.path}/cfg.json", revision=revision)
        told = read_json(path)
        if isinstance(told, Mapping) and is_sparsify(told):  # sae-lens's reader transposes W_dec
            _download_if_there(row.repo_id, "config.json", revision)  # names the model, where a run kept it
            hf_hub_download(row.repo_id, f"{row.path}/sae.safetensors", revision=revision)
            return _read_sparsify(Path(path).parent, told, given)
        if revision is not None:
            hf_hub_download(row.repo_id, f"{row.path}/sae_weights.safetensors", revision=revision)
            return _from_folder(Path(path).parent, given)
    config, state = _by_sae_lens(row)
    return canonical(config, state, config.get("metadata") or {}, source="", **given)


def _download_if_there(repo_id: str, name: str, revision: str | None) -> None:
    """A file into the cache, if the repository has it; what the cache knows to be missing is not asked for."""
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


def _by_sae_lens(row: RegistryRow) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, state) by sae-lens's own reader of the layout; its pickles as weights only. Raises FormatError."""
    need_sae_lens(f"The layout {row.conversion!r} of {row.release}")
    from sae_lens.loading import pretrained_sae_loaders as loaders

    if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower() in ("1", "y", "yes", "true"):
        raise FormatError(
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, under which a downloaded pickle may run code", "it unset"
        )
    read = loaders.NAMED_PRETRAINED_SAE_LOADERS.get(row.conversion)
    if read is None:
        raise FormatError(f"{row.release} in layout {row.conversion!r}", "one that the installed sae-lens reads")
    overrides = {**row.overrides, "device": "cpu", "dtype": "float32"}
    config, state, _ = read(row.repo_id, row.path, "cpu", False, overrides)
    refuse_unread(config)
    return loaders.handle_config_defaulting(config), state


def _cached_first(read: Callable[[], T], what: str) -> T:
    """What ``read`` gives from the Hugging Face cache alone, without a request; else with the hub.

    Raises FormatError.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    with _damage(what), _hub:
        offline = constants.HF_HUB_OFFLINE
        try:
            constants.HF_HUB_OFFLINE = True
            return read()
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if offline:
                raise FormatError(f"{what} is not in the Hugging Face cache", change="unset HF_HUB_OFFLINE") from error
        finally:
            constants.HF_HUB_OFFLINE = offline
        if not hub_is_reachable():
            raise MissingError(f"no SAE {what!r}", "a folder, or an SAE of the hub", describe_unreachable())
        return read()
