"""The tutorials: their cells run, and what they keep of a run is whole, small and of no machine."""

from __future__ import annotations

import ast
import json
import re
import sys
import tempfile
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
LARGEST = 64 * 1024  # bytes of a notebook
WIDEST = 100  # characters of a line of code
OF_A_MACHINE = (str(ROOT), str(Path.home()) + "/", tempfile.gettempdir() + "/", "site-packages", " at 0x")
BENCHMARK = "3-fgaa-and-caa.ipynb"


def cells(path, kind):
    """The cells of a kind, each with its source as one text."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_there_are_five():
    assert [path.name[0] for path in TUTORIALS] == list("12345")


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_run(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < LARGEST
    for mark in OF_A_MACHINE:
        assert mark not in text, mark
    assert json.loads(text)["metadata"] == {"language_info": {"name": "python"}}
    counts = []
    for cell in cells(path, "code"):
        counts.append(cell["execution_count"])
        assert cell["metadata"] == {}
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "display_data", "execute_result"), output
            assert output.get("name", "stdout") == "stdout"  # a warning is no part of a tutorial
            assert not any(name.startswith("image/") for name in output.get("data", ()))
        statement = ast.parse(cell["source"]).body[-1]
        shows = isinstance(statement, ast.Expr) or "print(" in cell["source"]
        assert bool(cell["outputs"]) == shows, cell["source"]
        assert max(map(len, cell["source"].splitlines())) <= WIDEST
    assert counts == list(range(1, len(counts) + 1))  # run in order, in one go: make notebooks


def test_figures_of_the_benchmark_are_the_benchmarks():
    """The prose repeats differences and intervals of the table that the cells show."""
    table = (ROOT / "benchmarks" / "results" / "table.md").read_text(encoding="utf-8")
    known = set(re.findall(r"[0-9]\.[0-9]{3}", table))
    prose = "\n".join(cell["source"] for cell in cells(ROOT / "docs" / "tutorials" / BENCHMARK, "markdown"))
    figures = re.findall(r"[0-9]\.[0-9]{3}", prose)
    assert len(figures) >= 6
    assert set(figures) <= known


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # readers see warnings; a newer library may warn of what it changes
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_the_cells_run(path, monkeypatch, tmp_path):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(Markdown=str))
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(path, "code"), 1):
        parsed = ast.parse(cell["source"], f"{path.name}, cell {number}")
        last = parsed.body.pop() if isinstance(parsed.body[-1], ast.Expr) else None
        exec(compile(parsed, f"{path.name}, cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), namespace)
            shown = getattr(value, "_repr_html_", value.__repr__)()
            assert shown
