"""The front door is typed: type checkers know every public name, and find what a user gets wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fgsteer as fg

ROOT = Path(__file__).resolve().parents[1]
SCRIPT, MISTAKES = ROOT / "tests" / "typing" / "user_script.py", ROOT / "tests" / "typing" / "user_mistakes.py"


def mypy():
    """(file, line) of each error, with the settings and the cache of ``make lint``."""
    command = [sys.executable, "-m", "mypy", "--output", "json", str(SCRIPT), str(MISTAKES)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode in (0, 1), result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {(Path(row["file"]).name, row["line"]) for row in rows if row["severity"] == "error"}


def pyright():
    """(file, line) of each error, in pyright's standard mode."""
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson"]
    result = subprocess.run(
        [*command, "--project", str(ROOT / "tests" / "typing")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode in (0, 1), result.stderr
    rows = [row for row in json.loads(result.stdout)["generalDiagnostics"] if row["severity"] == "error"]
    return {(Path(row["file"]).name, row["range"]["start"]["line"] + 1) for row in rows}


@pytest.mark.parametrize("checker", [mypy, pytest.param(pyright, marks=pytest.mark.slow)])
def test_a_checker_finds_the_mistakes_and_nothing_else(checker):
    lines = MISTAKES.read_text(encoding="utf-8").splitlines()
    expected = {(MISTAKES.name, number) for number, line in enumerate(lines, 1) if line.endswith("# mistake")}
    assert len(expected) > 10
    assert checker() == expected


def test_a_star_import_and_completion_list_the_public_names():
    assert set(vars(fg)["__all__"]) <= set(dir(fg))
    assert len(vars(fg)["__all__"]) == len(set(vars(fg)["__all__"])) >= 104
    names: dict[str, object] = {}
    exec("from fgsteer import *", names)
    assert set(vars(fg)["__all__"]) <= set(names)


def test_importing_it_loads_nothing_heavy():
    code = "import sys, fgsteer; assert not {'torch', 'transformers', 'sae_lens', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
