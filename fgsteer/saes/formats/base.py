"""What every format of stored SAEs shares: the source to load, options, reading weights, and refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fgsteer.errors import FormatError, PairingError
from fgsteer.models.hookpoints import Hookpoint
from fgsteer.saes.registry import RegistryRow
from fgsteer.saes.sae import SAE
from fgsteer.storage.files import check_names

State = Mapping[str, Tensor]
CONFIG_FILE = "cfg.json"


@dataclass(frozen=True, eq=False)
class Source:
    """The SAE to load: a live object, a folder with its config, or an entry of a release, of a revision if any.

    An entry whose files include a config has a folder too, in the Hugging Face cache; its weights may be missing there.
    """

    live: Any = None
    folder: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    row: RegistryRow | None = None
    revision: str | None = None


@dataclass(frozen=True)
class LoadOptions:
    """What the caller of ``load_sae`` says about an SAE that does not say it itself."""

    hookpoint: Hookpoint | None = None
    norm_scaling_factor: float | None = None


NO_OPTIONS = LoadOptions()


@dataclass(frozen=True)
class SAEFormat:
    """One format: what it is called, how a source of it is recognised, and how it is loaded.

    Attributes:
        name: What it is called in messages and docs.
        description: What it is, in a phrase.
        recognises: Tells whether a source is of this format.
        load: Loads a source. It raises PairingError for an SAE without an exact canonical form.
    """

    name: str
    description: str
    recognises: Callable[[Source], bool]
    load: Callable[[Source, LoadOptions], SAE]


def load_state(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a safetensors file. Raises FormatError."""
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        check_names(path)
        return state
    except (OSError, SafetensorError, ValueError) as error:
        raise FormatError(
            f"Cannot read {path}: {str(error).removesuffix('.')}.",
            f"weights as safetensors beside {CONFIG_FILE}",
            "get the files again from where they came",
        ) from error


def refuse_unused_weights(tensors: State, used: Iterable[str], what: str) -> None:
    """Raise PairingError for weights, not all 0, that the SAE as it is described would not use."""
    names = set(used)
    unused = sorted(name for name, tensor in tensors.items() if name not in names and bool(tensor.any()))
    if unused:
        raise PairingError(
            f"{what} with the weights {', '.join(unused)} besides",
            f"the weights {', '.join(sorted(names))}, and no others",
            "take another SAE: without these weights its features would be others",
        )
