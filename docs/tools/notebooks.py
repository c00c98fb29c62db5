"""Execute the tutorials in docs/tutorials anew, and keep what they show: ``make notebooks``.

    python docs/tools/notebooks.py [NAME ...]

Outputs are kept without what belongs to one machine or one run: timings, standard error (warnings and progress), and
the displays of progress bars, which are empty when the work is done. A cell that fails ends the program.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbconvert.preprocessors import ClearMetadataPreprocessor, ExecutePreprocessor

TUTORIALS = Path(__file__).resolve().parents[1] / "tutorials"
CELL_SECONDS = 600  # that a cell may take


def execute(path: Path) -> None:
    """Run a notebook in its own folder, and write it with its outputs."""
    notebook: Any = nbformat.read(path, as_version=4)
    runner = ExecutePreprocessor(timeout=CELL_SECONDS, kernel_name="python3", record_timing=False)
    notebook, _ = runner.preprocess(notebook, {"metadata": {"path": path.parent}})
    notebook, _ = ClearMetadataPreprocessor(enabled=True).preprocess(notebook, {})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if is_kept(output)]
    nbformat.write(notebook, path)


def is_kept(output: Any) -> bool:
    """Whether an output is part of the tutorial."""
    if output.output_type == "stream":
        return bool(output.name == "stdout")
    return "data" not in output or output.data.get("text/html") != ""


if __name__ == "__main__":
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in sys.argv[1:] or sorted(path.name for path in TUTORIALS.glob("*.ipynb")):
        print(f"executing {name}")
        execute(TUTORIALS / name)
