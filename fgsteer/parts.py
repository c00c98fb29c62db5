"""Long work in parts, each written whole to one folder: a killed run goes on, and several processes share it.

What a part holds follows from the plan and its number, not from the process that makes it. Part n is
made by process n mod world (see ranks); they need a common folder and nothing else.

    for tensors in Parts(folder, "sums", plan).each(pieces, make, text_sha256): ...
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fgsteer.checks import warn
from fgsteer.errors import FgsteerWarning, FormatError, PairingError
from fgsteer.files import read_json, read_tensors, text_sha256, write_json, write_tensors
from fgsteer.ranks import Ranks
from fgsteer.targets import make_folder

POLL = 0.1  # seconds between looks for a part that another process makes
LATE = 60.0  # seconds after which waiting for one is told

T = TypeVar("T")


class Parts:
    """The parts of one plan in a folder.

    Raises PairingError when the folder holds those of another plan, FormatError when it cannot be written to.
    """

    def __init__(self, folder: str | Path, kind: str, plan: Mapping[str, Any], ranks: Ranks | None = None) -> None:
        self.folder, self.kind, self.ranks = make_folder(folder), kind, ranks or Ranks.here()
        self.key = text_sha256(dict(plan))
        note = self.folder / "plan.json"
        if not note.exists():
            write_json(note, plan)
        found, told = read_json(note), json.loads(json.dumps(plan))
        if found != told:
            known = found if isinstance(found, dict) else {}
            differing = sorted(k for k in {*told, *known} if told.get(k) != known.get(k))
            raise PairingError(
                f"{self.folder} holds a run with other {', '.join(differing)}",
                "the same plan as before",
                "name another folder, or delete this one",
            )

    def each(
        self,
        pieces: Iterable[T],
        make: Callable[[int, T], Mapping[str, Tensor]],
        name: Callable[[T], str],
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """The tensors of every part in order: this process's made and written where missing, others' waited for.

        ``name`` says of what a part was made, so that none is taken for another's. ``progress`` gets the
        number of parts that are done. Raises PairingError and FormatError as ``read`` does.
        """
        names = []
        for number, piece in enumerate(pieces):
            names.append(name(piece))
            path, alone = self.path(number), self.ranks.world == 1
            if not self.ranks.makes(number):
                continue
            if not path.exists():
                write_tensors(path, make(number, piece), kind=self.kind, header=self._header(number, names[-1]))
            if progress is not None:  # others' parts are looked for only where there are others
                progress(number + 1 if alone else sum(1 for _ in self.folder.glob("part-*.safetensors")))
            if alone:
                yield self.read(number, names[-1])
        for number, told in enumerate(names if self.ranks.world > 1 else ()):
            wait_for(self.path(number), number % self.ranks.world)
            yield self.read(number, told)

    def path(self, number: int) -> Path:
        """Where a part is."""
        return self.folder / f"part-{number:06d}.safetensors"

    def read(self, number: int, name: str) -> dict[str, Tensor]:
        """A part that was written. Raises PairingError for one made of something else, FormatError when damaged."""
        path = self.path(number)
        tensors, header = read_tensors(path, kind=self.kind)
        if {key: header.get(key) for key in ("plan", "part", "of")} != self._header(number, name):
            raise PairingError(f"{path} of another run, or another part", "what this plan writes there", "delete it")
        return tensors

    def damaged(self, number: int, why: object) -> FormatError:
        """The error to raise of a part whose tensors are not what its plan asks for."""
        return FormatError(f"{self.path(number)} is damaged: {why}", "what this plan writes there", "delete it")

    def _header(self, number: int, name: str) -> dict[str, Any]:
        return {"plan": self.key, "part": number, "of": name}


def wait_for(path: Path, maker: int) -> None:
    """Until another process has made a file. Warns FgsteerWarning once when that takes long."""
    began, told = time.monotonic(), False
    while not path.exists():
        time.sleep(POLL)
        if not told and time.monotonic() - began > LATE:
            told = True
            warn(
                f"waiting for {path}, which process {maker} makes; if it has ended, start all of them again",
                FgsteerWarning,
            )
