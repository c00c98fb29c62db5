"""The table of SAE formats. To add one, write a module that recognises and loads it, and add its row here.

Another package adds a row of its own with ``register``, from a plugin (see ``storage.plugins``).
"""

from __future__ import annotations

from fgsteer.errors import FormatError, PluginError
from fgsteer.saes.formats.base import CONFIG_FILE, SAEFormat, Source
from fgsteer.saes.formats.gemma_scope_2 import is_gemma_scope_2, load_gemma_scope_2
from fgsteer.saes.formats.sae_lens import (
    is_early_folder,
    is_folder,
    is_live,
    is_release,
    load_early_folder,
    load_folder,
    load_live,
    load_release,
)
from fgsteer.saes.formats.sparsify import is_sparsify, load_sparsify
from fgsteer.storage.plugins import add_row, load_plugins

# The first row that recognises a source loads it.
FORMATS: tuple[SAEFormat, ...] = (
    SAEFormat("live object", "a sae_lens.SAE in memory", is_live, load_live),
    SAEFormat("Gemma Scope 2", "an entry of a Gemma Scope 2 release", is_gemma_scope_2, load_gemma_scope_2),
    SAEFormat("sparsify", "a folder of EleutherAI's sparsify, local or of a repository", is_sparsify, load_sparsify),
    SAEFormat("sae-lens", "a folder that sae-lens 6 wrote", is_folder, load_folder),
    SAEFormat("sae-lens before 6", "a folder that an earlier sae-lens wrote", is_early_folder, load_early_folder),
    SAEFormat("sae-lens release", "another entry of sae-lens's registry, which reads it", is_release, load_release),
)


_registered: dict[str, SAEFormat] = {}


def register(row: SAEFormat, *, replace: bool = False) -> None:
    """Add a format to the table, before those of fgsteer, so that ``load_sae`` loads it.

    Args:
        row: The format.
        replace: Whether to take the place of a registered format of the same name, as a notebook's cell that runs
            twice does.

    Raises:
        PluginError: The table has another format of that name.
    """
    if any(built_in.name == row.name and built_in != row for built_in in FORMATS):
        raise PluginError(
            f"An SAE format named {row.name!r} is in the table already, as one of fgsteer's own.",
            "a name that is not taken",
            "rename the format",
        )
    add_row(_registered, row.name, row, f"An SAE format named {row.name!r}", replace=replace)


def specs() -> list[SAEFormat]:
    """Return all rows, those of plugins first. Raises PluginError for a plugin that cannot be imported."""
    load_plugins()
    return [*_registered.values(), *FORMATS]


def find_format(source: Source) -> SAEFormat:
    """Return the format of a source. Raises FormatError for one that no format recognises."""
    for sae_format in specs():
        if sae_format.recognises(source):
            return sae_format
    path = CONFIG_FILE if source.folder is None else source.folder / CONFIG_FILE
    raise FormatError(
        f"{path}, with the fields {', '.join(source.config) or 'none'}",
        "the config of a sae-lens or a sparsify SAE",
        "name a folder that sae-lens or sparsify wrote",
    )
