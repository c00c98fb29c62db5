"""Load SAEs from everywhere that people keep them, as the one canonical ``SAE``.

load_sae("default")                                         the embedded one at the middle layer
load_sae("default", "layer_1")                              another embedded one
load_sae("smollm2")                                         one of SmolLM2-135M-Instruct
load_sae("path/to/folder")                                  a saved sae-lens or sparsify SAE
load_sae("gemma-scope-2b-pt-res-canonical", "layer_12/width_16k/canonical")
load_sae("EleutherAI/sae-pythia-160m-32k", "layers.5")      a folder of a Hugging Face repository
load_sae(my_sae_lens_sae)                                   a live object

The formats are the rows of ``formats.table.FORMATS``.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError

from fgsteer.errors import FgsteerError, FormatError, MissingError, PairingError
from fgsteer.errors.checks import checked
from fgsteer.errors.wording import a
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.models.shipped import DEFAULT, SHIPPED, find_shipped
from fgsteer.saes.density import FeatureDensity
from fgsteer.saes.examples import FeatureExamples
from fgsteer.saes.formats.base import CONFIG_FILE, LoadOptions, Source
from fgsteer.saes.formats.places import refuse_unreachable
from fgsteer.saes.formats.sae_lens import refuse_architecture
from fgsteer.saes.formats.table import find_format
from fgsteer.saes.labels import load_labels
from fgsteer.saes.registry import RegistryRow, find_row
from fgsteer.saes.sae import SAE
from fgsteer.storage.json_files import read_json
from fgsteer.storage.network import describe_unreachable, hub_is_reachable

DENSITY_FILE = "density.safetensors"
LABELS_FILE = "labels.json"
EXAMPLES_FILE = "examples.safetensors"
# what a config and weights that do not fit together raise
_DAMAGE_ERRORS = (
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
_hub_lock = threading.RLock()
T = TypeVar("T")


@checked
def load_sae(
    source: Any = DEFAULT,
    sae_id: str | None = None,
    *,
    hookpoint: Hookpoint | str | None = None,
    norm_scaling_factor: float | None = None,
    device: torch.device | str = "cpu",
) -> SAE:
    """Load an ``SAE``, with weights in float32.

    What is in the Hugging Face cache is read without a request, so a release whose files have changed since is not
    refreshed: delete it from the cache for that. Some releases are pickles: they are read as weights only, which
    runs no code. In a local folder, ``density.safetensors`` becomes ``sae.density`` and ``labels.json``
    ({"id": "label"}) becomes ``sae.labels``. A transcoder reads at ``sae.reads`` and steers at ``sae.hookpoint``; an
    SAE on hook_z reads and steers the input of the output projection.

    Args:
        source: "default" for the embedded one, "smollm2" for one of that model; a folder of sae-lens or sparsify; a
            release of sae-lens's registry, which ``fgsteer saes`` lists; a Hugging Face repository, which may be pinned
            to a branch, tag or commit, as in "me/saes@v2"; a live ``sae_lens.SAE``; or an SAE of fgsteer.
        sae_id: Which SAE of a release, a repository or a folder of several.
        hookpoint: Where an SAE was trained that does not say so itself.
        norm_scaling_factor: The factor f on the input of an expected_average_only_in SAE that was saved without it.
        device: Where the weights go.

    Returns:
        The SAE, in its canonical form.

    Raises:
        FormatError: Nothing is there, or it is damaged.
        PairingError: It is of a kind that has no exact canonical form.
        HookpointError: Its hook name is unknown.
    """
    if isinstance(source, SAE):
        return source.to(device)
    options = LoadOptions(None if hookpoint is None else Hookpoint.parse(hookpoint), norm_scaling_factor)
    return _check_finite(_load(source, sae_id, options)).to(device)


def load_examples(sae: SAE) -> FeatureExamples | None:
    """Load the excerpts kept in the folder that an SAE was loaded from, as ``examples.safetensors``; None without.

    Raises FormatError for a damaged file, PairingError for excerpts of another SAE.
    """
    source, _, name = sae.source.partition("/")
    shipped = find_shipped(source)
    folder = Path(sae.source) if shipped is None else shipped.sae_folder(name)
    path = folder / EXAMPLES_FILE
    return FeatureExamples.load(path).check(sae) if sae.source and path.is_file() else None


def _check_finite(sae: SAE) -> SAE:
    """Return the SAE. Raises FormatError for weights with nan or inf."""
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        if not bool(getattr(sae, name).isfinite().all()):
            raise FormatError(f"{name} of {sae.source} with nan or inf", "finite weights", "get the files again")
    return sae


def _load(source: Any, sae_id: str | None, options: LoadOptions) -> SAE:
    """Load the SAE from what ``source`` is."""
    if not isinstance(source, str | Path):
        return _load_live(source, options)
    if (shipped := find_shipped(source)) is not None:
        folder = shipped.sae_folder(sae_id)
        place = f"{shipped.name}/{folder.name}"
        return replace(_load_folder(folder, options), source=place, model_name=shipped.model_name)
    folder = Path(source) / (sae_id or "")
    if (folder / CONFIG_FILE).is_file():
        return _load_folder(folder, options)
    if sae_id is not None:
        return _load_release(str(source), sae_id, options)
    raise FormatError(
        f"There is no SAE at {str(source)!r}{_list_subfolders(folder)}.",
        f"a folder with {CONFIG_FILE} and its weights, or one of {', '.join(map(repr, SHIPPED))}",
        "for a release of sae-lens or a folder of several SAEs pass sae_id too",
    )


def _list_subfolders(folder: Path) -> str:
    """List the SAEs one level below a folder, as part of a message."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG_FILE}"))
    return f", which holds several: {', '.join(names)}" if names else ""


def _load_live(sae: Any, options: LoadOptions) -> SAE:
    """Load a live ``sae_lens.SAE``. Raises PairingError for any other object."""
    if not hasattr(sae, "cfg") or not hasattr(sae, "state_dict"):
        raise PairingError(a(type(sae).__name__), "a name, a folder, an SAE of fgsteer or a sae_lens.SAE")
    source = Source(live=sae)
    return find_format(source).load(source, options)


def _load_folder(folder: Path, options: LoadOptions) -> SAE:
    """Load a local folder, with the density and the labels in it."""
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, Mapping):
        raise FormatError(f"{a(type(config).__name__)} in {folder / CONFIG_FILE}", "an object")
    source = Source(folder=folder, config=config)
    sae_format = find_format(source)
    with _as_format_errors(f"The SAE in {folder}"):
        sae = sae_format.load(source, options)
    return _add_companions(sae, folder)


def _add_companions(sae: SAE, folder: Path) -> SAE:
    """Return the SAE with the density and the labels that are kept in a folder."""
    if (folder / DENSITY_FILE).is_file():
        density = FeatureDensity.load(folder / DENSITY_FILE)
        sae = replace(sae, density=density.check(sae))
    if (folder / LABELS_FILE).is_file():
        sae = replace(sae, labels=load_labels(folder / LABELS_FILE, sae))
    return sae


@contextlib.contextmanager
def _as_format_errors(what: str) -> Iterator[None]:
    """Raise FormatError for the errors of a config and weights that do not fit together."""
    try:
        yield
    except FgsteerError:
        raise
    except _DAMAGE_ERRORS as error:
        raise FormatError(
            f"{what} cannot be read: {str(error).removesuffix('.')}.",
            "a config and weights that fit it",
            "get the files again from where they came",
        ) from error


def _load_release(release: str, sae_id: str, options: LoadOptions) -> SAE:
    """Load an entry of sae-lens's registry, or a folder of a Hugging Face repository, of a revision if one is named."""
    repo_id, at, revision = release.partition("@")
    row = find_row(repo_id, sae_id)
    if at and (row is not None or not revision):
        raise FormatError(f"{release!r:.100}", "a repository and its revision, such as me/saes@main")
    row = row or RegistryRow(release, sae_id, model="", repo_id=repo_id, path=sae_id)
    name = f"{release}/{sae_id}"
    refuse_architecture(row.conversion, name)
    refuse_unreachable(row.hookpoint)
    if options.norm_scaling_factor is None:
        options = replace(options, norm_scaling_factor=row.norm_scaling_factor)
    sae = _try_cache_first(lambda: _load_row(row, options, revision or None), name)
    return replace(sae, source=name, neuronpedia=row.neuronpedia or sae.neuronpedia)


def _load_row(row: RegistryRow, options: LoadOptions, revision: str | None) -> SAE:
    """Load the files of an entry from the cache or the hub; where they include a config, it decides the format."""
    from huggingface_hub import hf_hub_download

    folder: Path | None = None
    config: Mapping[str, Any] = {}
    if row.conversion in ("sae_lens", "sparsify"):
        path = Path(hf_hub_download(row.repo_id, f"{row.path}/{CONFIG_FILE}", revision=revision))
        value = read_json(path)
        folder, config = path.parent, value if isinstance(value, Mapping) else {}
    source = Source(folder=folder, config=config, row=row, revision=revision)
    return find_format(source).load(source, options)


def _try_cache_first(load: Callable[[], T], what: str) -> T:
    """Return what ``load`` gives from the Hugging Face cache alone, without a request; else with the hub.

    Raises FormatError.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    with _as_format_errors(what), _hub_lock:
        offline = constants.HF_HUB_OFFLINE
        try:
            constants.HF_HUB_OFFLINE = True
            return load()
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            if offline:
                raise FormatError(
                    f"{what} is not in the Hugging Face cache, and HF_HUB_OFFLINE is set.",
                    change="unset HF_HUB_OFFLINE, or download the files first",
                ) from error
        finally:
            constants.HF_HUB_OFFLINE = offline
        if not hub_is_reachable():
            raise MissingError(f"There is no SAE {what!r}.", "a folder, or an SAE of the hub", describe_unreachable())
        return load()
