"""Long work in parts, each written whole to one folder: a killed run goes on, and several processes share it.

What a part holds follows from the plan and its number, not from the process that makes it. Part n is
made by process n mod world (see ranks); they need a common folder and nothing else. A second run on the folder is
refused, and so is one of another plan.

    for tensors in Parts(folder, "sums", plan).each(pieces, make, text_sha256): ...
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from fgsteer.errors import FgsteerWarning, FormatError, PairingError
from fgsteer.errors.checks import warn
from fgsteer.storage.files import damage_error, read_tensors, refuse_damaged, write_tensors
from fgsteer.storage.json_files import read_json, text_sha256, write_json
from fgsteer.storage.locks import exclusive_lock
from fgsteer.storage.plans import check_same_plan
from fgsteer.storage.ranks import Ranks
from fgsteer.storage.targets import make_folder

POLL = 0.1  # seconds between looks for a part that another process makes
LATE = 60.0  # seconds after which waiting for one is told

T = TypeVar("T")


class Shards:
    """The parts of one plan in a folder; ``fresh`` starts over, removing those of a run of this kind.

    The plan says all that the parts depend on, besides the pieces that they are made of.
    """

    def __init__(
        self, folder: str | Path, kind: str, plan: Mapping[str, Any], ranks: Ranks | None = None, *, fresh: bool = False
    ) -> None:
        self.folder, self.kind, self.ranks, self.fresh = make_folder(folder), kind, ranks or Ranks.from_env(), fresh
        self.plan = {"run": kind, **plan}
        self.key = text_sha256(self.plan)

    def each(
        self,
        pieces: Iterable[T],
        make: Callable[[int, T], Mapping[str, Tensor]],
        name: Callable[[T], str],
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """The tensors of every part in order: this process's made and written where missing, others' waited for.

        ``name`` says of what a part was made, so that none is taken for another's. ``progress`` gets the
        number of parts that are done. Raises BusyError while another run is at work in the folder, PairingError where
        it holds parts of another plan, FormatError when it cannot be written to, or as ``read`` does.
        """
        with exclusive_lock(self.folder, f"process-{self.ranks.rank}"):
            self._begin()
            yield from self._each(pieces, make, name, progress)

    def _begin(self) -> None:
        """Note the plan, or see that it is the one that the folder is of."""
        note = self.folder / "plan.json"
        if self.fresh and note.exists():
            try:
                self._clear(read_json(note))
            except FormatError as error:
                change = "delete the folder if it is this run's, or name another"
                raise FormatError(error.got, error.expected, change) from error
        if self.fresh or not note.exists():
            write_json(note, self.plan)
        check_same_plan(self.folder, read_json(note), self.plan)

    def _clear(self, found: Any) -> None:
        """Remove this process's parts, and whatever is of another plan: what others may just have made stays."""
        kind = found.get("run", self.kind) if isinstance(found, dict) and "model" in found else None
        if kind != self.kind:
            raise PairingError(
                f"{self.folder} holds {kind or 'something else'}, not {self.kind}",
                "a folder of the run to start over",
                "name another folder",
            )
        for path in self.folder.glob("*.safetensors"):
            part = re.fullmatch(r"part-(\d{6})", path.stem)
            if part is None and path.stem != "baseline":
                continue
            try:
                header = read_tensors(path, kind=None)[1]
            except FormatError:  # damaged, under the name of ours
                header = {"kind": self.kind}
            mine = part is not None and self.ranks.owns(int(part[1]))
            if header["kind"] in (self.kind, "baseline") and (mine or header.get("plan") != self.key):
                path.unlink(missing_ok=True)

    def _each(
        self,
        pieces: Iterable[T],
        make: Callable[[int, T], Mapping[str, Tensor]],
        name: Callable[[T], str],
        progress: Callable[[int], None] | None,
    ) -> Iterator[dict[str, Tensor]]:
        names = []
        for number, piece in enumerate(pieces):
            names.append(name(piece))
            path, alone = self.path(number), self.ranks.world == 1
            if not self.ranks.owns(number):
                continue
            if not path.exists():
                write_tensors(path, make(number, piece), kind=self.kind, header=self._header(number, names[-1]))
            if progress is not None:  # others' parts are looked for only where there are others
                progress(number + 1 if alone else sum(1 for _ in self.folder.glob("part-*.safetensors")))
            if alone:
                yield self.read(number, names[-1])
        for number, told in enumerate(names if self.ranks.world > 1 else ()):
            wait_for_file(self.path(number), number % self.ranks.world)
            yield self.read(number, told)

    def path(self, number: int) -> Path:
        """Where a part is."""
        return self.folder / f"part-{number:06d}.safetensors"

    def read(self, number: int, name: str) -> dict[str, Tensor]:
        """A part that was written. Raises PairingError for one made of something else, FormatError when damaged."""
        path = self.path(number)
        tensors, header = read_tensors(path, kind=self.kind)
        found, ours = (
            {key: told.get(key) for key in ("plan", "part", "of")} for told in (header, self._header(number, name))
        )
        if found != ours:
            what = "other texts or vectors" if {**found, "of": name} == ours else "another run, or another part"
            raise PairingError(
                f"{path} was made of {what}",
                "what this run writes there",
                "start over with fresh=True, which removes what is there; or name another folder",
            )
        return tensors

    def damage_error(self, number: int, reason: object) -> FormatError:
        """The error to raise of a shard whose tensors are not what its plan asks for."""
        return damage_error(self.path(number), reason, "what this run writes there", "delete it")

    def refuse_damaged(self, number: int) -> AbstractContextManager[None]:
        """A block that interprets the tensors of a shard; its errors become a FormatError that names the file."""
        return refuse_damaged(self.path(number), "what this run writes there", "delete it")

    def _header(self, number: int, name: str) -> dict[str, Any]:
        return {"plan": self.key, "part": number, "of": name}


def wait_for_file(path: Path, maker: int) -> None:
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
