"""Vectors that are trained in common batches: each reads its own examples, and passes hold answers of all of them.

Run(passes, {"cheerful": learner}, plan, checkpoint).run(report)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgsteer.display.progress import Report
from fgsteer.errors import DataError
from fgsteer.interventions.base import Intervention
from fgsteer.learning.learner import Learner
from fgsteer.learning.objectives import Unit
from fgsteer.learning.response_passes import ResponsePasses
from fgsteer.models.gradients import frozen
from fgsteer.storage.files import read_tensors, refuse_damaged, write_tensors
from fgsteer.storage.plans import check_same_plan

KIND = "vector checkpoint"
CHECKPOINT_SECONDS = 60.0

Work = tuple[str, Unit]  # the name of a vector, and a unit of its batch


class Run:
    """The training of vectors by name, from the beginning or from a checkpoint.

    Args:
        passes: The answers of all of them.
        learners: The vectors.
        plan: All that the run depends on.
        checkpoint: The file that a run which was stopped goes on from; None keeps none.
    """

    def __init__(
        self,
        passes: ResponsePasses,
        learners: Mapping[str, Learner],
        plan: Mapping[str, Any],
        checkpoint: Path | None = None,
    ) -> None:
        self.passes, self.learners, self.plan, self.checkpoint = passes, dict(learners), dict(plan), checkpoint

    def run(self, report: Report, note: Callable[[Mapping[str, Learner]], str] | None = None) -> None:
        """Take all steps that are left; ``report`` is called with the steps that are done and those of all vectors.

        ``note`` says what is shown beside a bar, of the vectors as they are.
        """
        if self.checkpoint is not None and self.checkpoint.exists():
            self._load()
        total = sum(learner.steps for learner in self.learners.values())
        saved = time.monotonic()
        with frozen(self.passes.model):
            while active := {name: learner for name, learner in self.learners.items() if not learner.done}:
                self._step(active)
                if self.checkpoint is not None and time.monotonic() - saved >= CHECKPOINT_SECONDS:
                    self._save()
                    saved = time.monotonic()
                said = None if note is None else partial(note, self.learners)
                report(sum(learner.step for learner in self.learners.values()), total, note=said)
        if self.checkpoint is not None:
            self._save()

    def _step(self, active: Mapping[str, Learner]) -> None:
        losses = self._losses({name: learner.begin_step() for name, learner in active.items()})
        for name, learner in active.items():
            _check_loss(losses[name], f"at step {learner.step} of {name!r}")
            learner.end_step(losses[name])
        ended = {name: learner for name, learner in active.items() if learner.held_out and learner.epoch_ended}
        if ended:
            with torch.no_grad():
                losses = self._losses({name: learner.held_out_units() for name, learner in ended.items()})
            for name, learner in ended.items():
                _check_loss(losses[name], f"on the held-out examples of {name!r} after step {learner.step}")
                learner.note_held_out(losses[name])

    def _losses(self, batches: Mapping[str, Sequence[Unit]]) -> dict[str, float]:
        """The losses of batches by name; where gradients are on, they are added up in what is trained."""
        losses = dict.fromkeys(batches, 0.0)
        work: list[Work] = [(name, unit) for name, units in batches.items() for unit in units]
        for part in self.passes.split(work, lambda item: item[1].rows):
            rows: list[int] = []
            entries: list[Intervention] = []
            spans: list[tuple[str, list[Unit], Tensor]] = []
            for name in dict.fromkeys(name for name, _ in part):
                units = [unit for other, unit in part if other == name]
                applied, rest = self.learners[name].entries(units)
                rows += [row for unit in units for row in unit.rows]
                entries += applied
                spans.append((name, units, rest))
            values = self.passes.log_probabilities(rows, entries)
            terms: list[Tensor] = []
            start = 0
            for name, units, rest in spans:
                end = start + sum(len(unit.readings) for unit in units)
                terms.append(self.learners[name].loss(units, values[start:end], rest))
                losses[name] += float(terms[-1].detach())
                start = end
            if torch.is_grad_enabled():
                torch.autograd.backward(torch.stack(terms).sum())
        return losses

    def _by_name(self) -> list[Learner]:
        """The vectors in the order in which a checkpoint has them, whatever the order in which they were given."""
        return [self.learners[name] for name in sorted(self.learners)]

    def _save(self) -> None:
        assert self.checkpoint is not None
        tensors = {
            f"{n}/{key}": value for n, learner in enumerate(self._by_name()) for key, value in learner.state().items()
        }
        write_tensors(self.checkpoint, tensors, kind=KIND, header={"plan": self.plan})

    def _load(self) -> None:
        """Go on from the checkpoint. Raises PairingError for one of another run, FormatError for a damaged one."""
        assert self.checkpoint is not None
        tensors, header = read_tensors(self.checkpoint, kind=KIND)
        check_same_plan(self.checkpoint, header.get("plan"), self.plan)
        with refuse_damaged(self.checkpoint, "a checkpoint of this run", "delete it, and the run starts over"):
            for n, learner in enumerate(self._by_name()):
                own = {key.split("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{n}/")}
                learner.load(own)


def _check_loss(loss: float, where: str) -> None:
    """Raises DataError for a loss that is not finite, which no later one would be better than."""
    if not math.isfinite(loss):
        raise DataError(f"a loss of {loss} {where}", "a finite loss", "lower lr or the factors")
