"""What a model card needs of a benchmark's run, so that a vector does not depend on the benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class MeasuredRun(Protocol):
    """A run of ``bench`` that ``load_run`` loaded: what a model card tells of how well a vector steered."""

    @property
    def header(self) -> Mapping[str, Any]:
        """The plan of the run, and what it was made of."""

    @property
    def settings(self) -> Sequence[Any]:
        """Every setting that was measured, once."""

    def mean(self, setting: Any, half: str = ..., measure: str = ...) -> float:
        """The mean of a measure over the texts of a setting."""
