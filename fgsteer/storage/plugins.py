"""Plugins: modules of other packages that add methods, judges and exports to fgsteer's tables.

A package names its module in its pyproject.toml; the module calls ``register`` of the tables that it adds to, such as
``fgsteer.methods.register``:

    [project.entry-points."fgsteer.plugins"]
    my-methods = "my_package.methods"

Every table calls ``load_plugins`` before it is read, so that a name that a plugin adds is known wherever names are.
"""

from __future__ import annotations

import threading
from importlib.metadata import EntryPoint, entry_points

from fgsteer.errors import PluginError

GROUP = "fgsteer.plugins"


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
