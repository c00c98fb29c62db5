"""Plugins: modules of other packages that add methods, judges and exports to fgsteer's tables.

A package names its module in its pyproject.toml; the module calls ``register`` of the tables that it adds to, such as
``fgsteer.methods.register``:

    [project.entry-points."fgsteer.plugins"]
    my-methods = "my_package.methods"

Every table calls ``load_plugins`` before it is read, so that a name that a plugin adds is known wherever names are;
adds a row with ``add_row``; and imports a row's function with ``import_function``.
"""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from fgsteer.errors import PluginError

GROUP = "fgsteer.plugins"
Key = TypeVar("Key")
Row = TypeVar("Row")


class _Loading:
    """Whether the plugins are loaded, or just being loaded by the thread that holds the lock."""

    lock = threading.RLock()
    begun = False


def load_plugins() -> None:
    """Import every plugin that is installed, once in a process.

    A plugin may read the tables while it is imported: it finds them without the plugins that come after it.

    Raises:
        PluginError: A plugin cannot be imported. The next call tries again.
    """
    with _Loading.lock:
        if _Loading.begun:
            return
        _Loading.begun = True
        try:
            for entry in entry_points(group=GROUP):
                _load(entry)
        except BaseException:
            _Loading.begun = False
            raise


def _load(entry: EntryPoint) -> None:
    try:
        entry.load()
    except Exception as error:
        raise PluginError(
            f"The plugin {entry.name!r} cannot be imported: {entry.value} raised {type(error).__name__}: {error}.",
            f"a module that can be imported (it is named in the entry-point group {GROUP!r})",
            "Mend the package that the plugin belongs to, or uninstall it",
        ) from error


def add_row(rows: MutableMapping[Key, Row], key: Key, row: Row, what: str, *, replace: bool) -> None:
    """Add a row to a table.

    Args:
        rows: The table.
        key: The key of the row in it.
        row: The row.
        what: How the message names the row, such as "A method named 'mine'".
        replace: Whether to take the place of another row with that key.

    Raises:
        PluginError: The table has another row with that key.
    """
    if not replace and rows.get(key, row) != row:
        raise PluginError(
            f"{what} is in the table already.",
            "a name that is not taken",
            "Choose another name, or pass replace=True to register",
        )
    rows[key] = row


def import_function(reference: str, what: str) -> Any:
    """Import what a row of a table names as "module:name".

    Args:
        reference: The name, such as "fgsteer.methods.difference:caa".
        what: How the message names the row, such as "the method 'caa'".

    Raises:
        PluginError: It cannot be imported.
    """
    module, _, attribute = reference.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise PluginError(
            f"The function {reference!r} of {what} cannot be imported: {error}.",
            '"module:name" of a function',
            "Install what the module needs, or correct the row",
        ) from error
