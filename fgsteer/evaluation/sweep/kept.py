"""What a sweep has measured so far, in a file, so that a sweep that was killed goes on.

kept = KeptCells("sweep", plan)
if kept.get("12/+1/0.5") is None: kept.put({"12/+1/0.5": {"coefficient": 2.0, ...}})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError
from fgsteer.storage.json_files import read_json, write_json
from fgsteer.storage.plans import check_same_plan
from fgsteer.storage.targets import make_folder

PARTS_FILE = "sweep-parts.json"


class KeptCells:
    """Measured cells by name, in a folder or in memory alone.

    Args:
        folder: The folder; None keeps nothing beyond this run.
        plan: All that the cells depend on, as plain JSON.
        fresh: Whether to start over.

    Raises:
        PairingError: The folder holds a sweep of something else; the error says what differs.
        FormatError: The file is damaged, or the folder cannot be written to.
    """

    def __init__(self, folder: str | Path | None, plan: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = None if folder is None else make_folder(folder) / PARTS_FILE
        self.plan = dict(plan)
        self._cells: dict[str, dict[str, Any]] = {}
        if self.path is not None and self.path.exists() and not fresh:
            stored = read_json(self.path)
            cells = stored.get("cells") if isinstance(stored, dict) else None
            if not isinstance(cells, dict) or not all(isinstance(cell, dict) for cell in cells.values()):
                raise FormatError(
                    f"{self.path} without cells",
                    "the cells of a sweep that was stopped",
                    "delete it, or pass fresh=True",
                )
            check_same_plan(self.path, stored.get("plan"), self.plan)
            self._cells = cells

    def get(self, name: str) -> dict[str, Any] | None:
        """A cell; None for one that was not measured yet."""
        return self._cells.get(name)

    def put(self, cells: Mapping[str, dict[str, Any]]) -> None:
        """Keep cells, in one write."""
        self._cells.update(cells)
        if self.path is not None:
            write_json(self.path, {"plan": self.plan, "cells": self._cells})
