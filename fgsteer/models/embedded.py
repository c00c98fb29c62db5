"""The embedded default model: where its files are."""

from __future__ import annotations

from pathlib import Path

from fgsteer.errors import FormatError
from fgsteer.storage.json_files import read_json

DEFAULT = "default"


def pretrained_dir() -> Path:
    """Return the folder of the embedded default: inside the package, or in a checkout beside it.

    Raises FormatError when neither exists.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_pretrained" / DEFAULT, package.parent / "pretrained" / DEFAULT):
        if (folder / "index.json").is_file():
            return folder
    raise FormatError(
        "The embedded default is not installed.",
        "fgsteer/_pretrained/default in the package or pretrained/default in a checkout",
        "reinstall fgsteer, or run pretrained/build.py",
    )


def embedded_sae_dir(sae_id: str | None = None) -> Path:
    """Return the folder of an embedded SAE, such as layer_2; without an id that of the default one.

    Raises FormatError for an unknown id, naming those that exist.
    """
    folder = pretrained_dir()
    name = sae_id or str(read_json(folder / "index.json")["sae"])
    known = sorted(path.parent.name for path in (folder / "sae").glob("*/cfg.json"))
    if name not in known:
        raise FormatError(f"There is no embedded SAE {name!r}.", f"one of {', '.join(known)}", "pass another sae_id")
    return folder / "sae" / name


def embedded_model_name() -> str:
    """Return the name of the embedded default in vectors and SAEs."""
    return "fgsteer/default"
