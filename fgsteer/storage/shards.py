"""Long work in shards, each written atomically to one folder: a killed run goes on, and several processes share it.

What a shard holds follows from the plan and its number, not from the process that makes it. Shard n is made by
process n mod world (see ``ranks``). The processes need a common folder and nothing else. A second run on the folder
is refused, and so is one of another plan. On disk a shard is called a part, as in part-000002.safetensors.

    for tensors in Shards(folder, "sums", plan).each(pieces, make, text_sha256): ...
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

POLL_SECONDS = 0.1  # between looks for a shard that another process makes
LATE_SECONDS = 60.0  # of waiting for one, after which a warning says so

T = TypeVar("T")


class Shards:
    """The shards of one plan in a folder.

    Args:
        folder: Where they are kept; it is made where it does not exist.
        kind: The kind of run, such as "collected texts", which is the kind of its files too.
        plan: All that the shards depend on, besides the pieces that they are made of.
        ranks: Which process makes which shards; by default what the environment says.
        fresh: Whether to start over: shards of a run of this kind are removed.
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
        """Yield the tensors of every shard, in order.

        Shards of this process that are missing are made and written; those of other processes are waited for.

        Args:
            pieces: What each shard is made of.
            make: Makes the tensors of a shard from its number and its piece.
            name: Names a piece, so that no shard is taken for that of another piece.
            progress: Called with the number of shards that are done.

        Raises:
            BusyError: Another run is at work in the folder.
            PairingError: The folder holds shards of another plan.
            FormatError: The folder cannot be written to, or a shard is damaged.
        """
        with exclusive_lock(self.folder, f"process-{self.ranks.rank}"):
            self._begin()
            yield from self._each(pieces, make, name, progress)

    def _begin(self) -> None:
        """Note the plan, or check that it is the one that the folder notes."""
        plan_file = self.folder / "plan.json"
        if self.fresh and plan_file.exists():
            try:
                self._clear(read_json(plan_file))
            except FormatError as error:
                change = "delete the folder if it is this run's, or name another"
                raise FormatError(error.got, error.expected, change) from error
        if self.fresh or not plan_file.exists():
            write_json(plan_file, self.plan)
        check_same_plan(self.folder, read_json(plan_file), self.plan)

    def _clear(self, plan: Any) -> None:
        """Remove this process's shards, and all of another plan: what other processes may just have made stays."""
        kind = plan.get("run", self.kind) if isinstance(plan, dict) and "model" in plan else None
        if kind != self.kind:
            raise PairingError(
                f"{self.folder} holds {kind or 'something else'}, not {self.kind}.",
                "a folder that holds this kind of run",
                "name another folder",
            )
        for path in self.folder.glob("*.safetensors"):
            number = re.fullmatch(r"part-(\d{6})", path.stem)
            if number is None and path.stem != "baseline":
                continue
            try:
                header = read_tensors(path, kind=None)[1]
            except FormatError:  # damaged, under the name of one of this run's shards
                header = {"kind": self.kind}
            is_own = number is not None and self.ranks.owns(int(number[1]))
            if header["kind"] in (self.kind, "baseline") and (is_own or header.get("plan") != self.key):
                path.unlink(missing_ok=True)

    def _each(
        self,
        pieces: Iterable[T],
        make: Callable[[int, T], Mapping[str, Tensor]],
        name: Callable[[T], str],
        progress: Callable[[int], None] | None,
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the tensors of every shard, as ``each`` does, once the plan is noted."""
        names = []
        for number, piece in enumerate(pieces):
            names.append(name(piece))
            path, alone = self.path(number), self.ranks.world == 1
            if not self.ranks.owns(number):
                continue
            if not path.exists():
                write_tensors(path, make(number, piece), kind=self.kind, header=self._header(number, names[-1]))
            if progress is not None:  # others' shards are counted only where there are other processes
                progress(number + 1 if alone else sum(1 for _ in self.folder.glob("part-*.safetensors")))
            if alone:
                yield self.read(number, names[-1])
        for number, piece_name in enumerate(names if self.ranks.world > 1 else ()):
            wait_for_file(self.path(number), number % self.ranks.world)
            yield self.read(number, piece_name)

    def path(self, number: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"part-{number:06d}.safetensors"

    def read(self, number: int, name: str) -> dict[str, Tensor]:
        """Load a shard that was written. Raises PairingError for one of something else, FormatError when damaged."""
        path = self.path(number)
        tensors, header = read_tensors(path, kind=self.kind)
        expected = self._header(number, name)
        stored = {key: header.get(key) for key in expected}
        if stored != expected:
            source = "other texts or vectors" if {**stored, "of": name} == expected else "another run, or another shard"
            raise PairingError(
                f"{path} was made of {source}.",
                "a shard of this run",
                "start over with fresh=True, which removes what is there; or name another folder",
            )
        return tensors

    def damage_error(self, number: int, reason: object) -> FormatError:
        """Make the error of a shard whose tensors are not what its plan asks for."""
        return damage_error(self.path(number), reason, "a shard of this run", "delete it")

    def refuse_damaged(self, number: int) -> AbstractContextManager[None]:
        """Turn the errors of a block that interprets the tensors of a shard into a FormatError that names the file."""
        return refuse_damaged(self.path(number), "a shard of this run", "delete it")

    def _header(self, number: int, name: str) -> dict[str, Any]:
        """Return the header that a shard is written with."""
        return {"plan": self.key, "part": number, "of": name}


def wait_for_file(path: Path, maker: int) -> None:
    """Wait until process ``maker`` has made a file. Warns FgsteerWarning once when that takes long."""
    began, has_warned = time.monotonic(), False
    while not path.exists():
        time.sleep(POLL_SECONDS)
        if not has_warned and time.monotonic() - began > LATE_SECONDS:
            has_warned = True
            warn(
                f"Waiting for {path}, which process {maker} makes. If that process has ended, start all of them again.",
                FgsteerWarning,
            )
