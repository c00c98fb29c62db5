"""What a run of AxBench keeps in its folder, from which it goes on: each file is written whole or not at all.

plan.json                       all that the run depends on
vectors/reps-3.safetensors      the vector of a method for the concept of id 3
readings/reps-3.json            what it reads on each text of the evaluation, and a_max
losers/3.json                   the model's own answers to the training instructions, where vectors need them
texts/reps-3.json               answers by factor and instruction
measures/reps-3.json            their cross-entropy and coherence under the unsteered model
results.json, table.md          the result
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fgsteer.errors import FormatError, PairingError
from fgsteer.storage.json_files import read_json, write_json
from fgsteer.storage.plans import check_same_plan
from fgsteer.storage.targets import make_folder
from fgsteer.vector import SteeringVector

PARTS = ("settings", "vectors", "readings", "losers", "texts", "measures")
PLAN, RESULTS, TABLE, CHECKPOINT = "plan.json", "results.json", "table.md", "training.safetensors"


class RunFolder:
    """The folder of a run.

    Args:
        path: The folder; it is made where it does not exist.
        plan: All that the run depends on.
        fresh: Whether what an earlier run has left is removed.

    Raises:
        PairingError: It holds a run of something else.
        FormatError: It cannot be written to, or holds files of other kinds under the names of a run's.
    """

    def __init__(self, path: str | Path, plan: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = make_folder(path)
        noted = self.path / PLAN
        if fresh and noted.exists():
            self._clear()
            write_json(noted, dict(plan))
        elif noted.exists():
            check_same_plan(self.path, read_json(noted), plan)
        elif any((self.path / part).exists() for part in PARTS):
            raise PairingError(
                f"{self.path} holds folders of a run and no {PLAN}.", "a new or empty folder", "name another folder"
            )
        else:
            write_json(noted, dict(plan))
        for part in PARTS:
            make_folder(self.path / part)

    def _clear(self) -> None:
        """Remove the files of an earlier run, and nothing else. Raises PairingError for a folder of another kind."""
        plan = read_json(self.path / PLAN)
        if not (isinstance(plan, dict) and plan.get("run") == "axbench"):
            raise PairingError(f"{self.path} holds something else than a run of axbench.", change="name another folder")
        for part in PARTS:
            for file in (self.path / part).glob("*.*"):
                if file.suffix in (".json", ".safetensors"):
                    file.unlink()
        for file in self.path.glob(f"*{CHECKPOINT}"):
            file.unlink()
        for name in (RESULTS, TABLE, PLAN):
            (self.path / name).unlink(missing_ok=True)

    def check_settings(self, method: str, settings: Mapping[str, Any]) -> None:
        """Note the settings of a method. Raises PairingError where it was begun with others."""
        noted = self.kept("settings", method, lambda: settings)
        check_same_plan(self.path / "settings" / f"{method}.json", noted, settings)

    def vector_path(self, method: str, concept: int) -> Path:
        """Where the vector of a method for a concept is kept."""
        return self.path / "vectors" / f"{method}-{concept}.safetensors"

    def checkpoint_path(self, method: str) -> Path:
        """Where the training of a method's vectors goes on from: a file of each, as methods may be left out later."""
        return self.path / f"{method}-{CHECKPOINT}"

    def vector(self, method: str, concept: int) -> SteeringVector | None:
        """Load a vector that is kept; None where there is none. Raises FormatError for a damaged file."""
        path = self.vector_path(method, concept)
        return SteeringVector.load(path) if path.exists() else None

    def kept(self, part: str, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Load a JSON object that is kept, or make it and keep it. Raises FormatError for a damaged file."""
        path = self.path / part / f"{name}.json"
        if not path.exists():
            write_json(path, dict(make()))
        content = read_json(path)
        if not isinstance(content, dict):
            raise FormatError(f"{path} holds no object.", "a file of this run", "delete it, and it is made again")
        return content
