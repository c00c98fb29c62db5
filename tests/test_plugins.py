"""Plugins: modules of other packages, named by entry points, that add to fgsteer's tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fgsteer as fg
from tests.helpers.plugins import install_plugin

ROOT = Path(fg.__file__).resolve().parent.parent


def run_with_plugin(folder, code):
    path = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def test_a_plugin_is_imported_once_and_may_ask_for_the_plugins(tmp_path):
    install_plugin(
        tmp_path,
        "counting",
        "from fgsteer.storage.plugins import load_plugins\nload_plugins()\nprint('imported')\n",
    )
    code = "from fgsteer.storage.plugins import load_plugins\nload_plugins()\nload_plugins()\n"
    result = run_with_plugin(tmp_path, code)
    assert result.stdout == "imported\n", result.stderr


def test_a_plugin_that_fails_is_named(tmp_path):
    install_plugin(tmp_path, "broken", "import a_module_that_is_nowhere\n")
    code = (
        "import fgsteer as fg\nfrom fgsteer.storage.plugins import load_plugins\n"
        "for _ in range(2):\n    try: load_plugins()\n    except fg.PluginError as error: print(error)\n"
    )
    result = run_with_plugin(tmp_path, code)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    for line in lines:
        assert "The plugin 'broken' cannot be imported" in line
        assert "No module named 'a_module_that_is_nowhere'" in line
        assert "'fgsteer.plugins'" in line
