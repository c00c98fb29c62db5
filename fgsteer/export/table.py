"""The table of exports: one row for each format of another engine, which ``fgsteer export`` and the docs read.

Nothing here imports torch, so that help texts can list exports. An exporter is imported when it is first used.

    register(ExportSpec("mine", "My engine", writes="a file for my engine", expresses="Add on every token",
                        refuses="everything else", exporter=my_exporter))
    spec("mine").write([vec.add(8.0)], Path("love.mine"))
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from fgsteer.errors import ArgumentError, DataError, SteeringError
from fgsteer.storage.plugins import add_row, import_function, load_plugins

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fgsteer.interventions import Intervention
    from fgsteer.saes.sae import SAE
    from fgsteer.vector import SteeringVector


def _no_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    raise SteeringError("no model", "load_model=, a function that returns a model and its tokenizer")


def _no_sae() -> SAE:
    raise SteeringError("no SAE", "load_sae=, a function that returns an SAE")


@dataclass(frozen=True)
class ExportInputs:
    """What an exporter may need besides the interventions."""

    vectors: Sequence[SteeringVector] = ()
    """The vectors that the interventions were made from, in the same order."""
    load_model: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]] = _no_model
    """Loads the model and its tokenizer; an exporter calls it after it has checked the interventions."""
    load_sae: Callable[[], SAE] = _no_sae
    """Loads the SAE, likewise."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Values of the row's options by name; those that are not given have their defaults."""

    @property
    def model_type(self) -> str:
        """The Hugging Face model type ("llama") that a vector remembers, or an empty text."""
        models = [vector.provenance.get("model") for vector in self.vectors]
        return next((str(model["type"]) for model in models if isinstance(model, Mapping) and model.get("type")), "")


@runtime_checkable
class Exporter(Protocol):
    """Writes interventions in the format of an engine."""

    def __call__(self, interventions: Sequence[Intervention], path: Path, inputs: ExportInputs) -> Sequence[Path]:
        """Write them to the path, whole or not at all, and return the paths of what was written.

        Raises:
            SteeringError: The engine cannot express an intervention. The message says what can.
        """


@dataclass(frozen=True)
class ExportOption:
    """An option of one export, which ``fgsteer export --set name=value`` gives."""

    name: str
    default: str | int | float | None
    summary: str

    def check(self, value: object) -> None:
        """Raises DataError for a value of another type than the default, where None stands for a text."""
        kind: type = str if self.default is None else type(self.default)
        fits = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if isinstance(value, bool) or not fits:
            kinds = {str: "a text", int: "a whole number", float: "a number"}
            raise DataError(f"the option {self.name}={value!r:.80}", f"{kinds[kind]} as {self.name} ({self.summary})")


@dataclass(frozen=True)
class ExportSpec:
    """One row of the table of exports.

    Args:
        name: What ``fgsteer export --to`` calls it: lower-case letters, digits and hyphens.
        label: The engines that read what it writes.
        writes: What it writes: a phrase that completes "This export writes …".
        expresses: The interventions that the format can express.
        refuses: The interventions that it cannot express, and refuses.
        exporter: The function that writes, or "module:name" of it, which is imported when it is first used.
        needs: What the exporter loads: "model", which the command line then requires, or "sae".
        model_on_cpu: Whether the model is loaded on the CPU, because only its weights are read.
        folder: Whether it writes a new folder, instead of a file.
        spares_position_0: Whether the format can leave the token at position 0 alone; it then does so by default.
        options: The options that are its own.
        checked_by: How it is known that the engine does what the interventions say.

    Raises:
        ArgumentError: The name has other characters, or a text is empty.
    """

    name: str
    label: str
    writes: str
    expresses: str
    refuses: str
    exporter: str | Exporter
    needs: tuple[Literal["model", "sae"], ...] = ()
    model_on_cpu: bool = False
    folder: bool = False
    spares_position_0: bool = False
    options: tuple[ExportOption, ...] = ()
    checked_by: str = ""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9-]*", self.name):
            raise ArgumentError(
                f"name={self.name!r}", "lower-case letters, digits and hyphens, a letter first, as an export's name"
            )
        for text_field in ("label", "writes", "expresses", "refuses"):
            if not getattr(self, text_field).strip():
                raise ArgumentError(f"{text_field}=''", f"a text as the {text_field} of the export {self.name!r}")

    def load(self) -> Exporter:
        """The exporter, imported if need be. Raises PluginError where it cannot be imported."""
        if not isinstance(self.exporter, str):
            return self.exporter
        exporter: Exporter = import_function(self.exporter, f"the export {self.name!r}")
        return exporter

    def write(
        self, interventions: Sequence[Intervention], path: str | Path, inputs: ExportInputs | None = None
    ) -> list[Path]:
        """Write interventions in this format.

        Args:
            interventions: What to write.
            path: The file, or the new folder, to write.
            inputs: What the exporter may need besides.

        Returns:
            The paths of what was written.

        Raises:
            DataError: An option is not this export's, or has a value of another type.
            SteeringError: The format cannot express an intervention.
        """
        inputs = inputs or ExportInputs()
        known = {option.name: option for option in self.options}
        for name, value in inputs.options.items():
            if name not in known:
                raise DataError(
                    f"the option {name}={value!r:.80} for the export {self.name}",
                    f"one of the options {', '.join(known)}" if known else "no option",
                    "" if known else "this export has no options of its own",
                )
            known[name].check(value)
        options = {option.name: option.default for option in self.options} | dict(inputs.options)
        filled = ExportInputs(inputs.vectors, inputs.load_model, inputs.load_sae, options)
        return list(self.load()(interventions, Path(path), filled))


_BUILT_IN = (
    ExportSpec(
        "checkpoint",
        "every engine that loads the model",
        writes="an ordinary checkpoint of the model with the vectors inside",
        expresses="Add on every token, where a bias of the model can take it",
        refuses="other interventions, scopes, leaving position 0 alone",
        exporter="fgsteer.export.checkpoint:export",
        needs=("model",),
        model_on_cpu=True,
        folder=True,
        checked_by="equal to hooks in transformers, in tests of every architecture that folds",
    ),
    ExportSpec(
        "gguf",
        "llama.cpp, repeng",
        writes="a control vector for llama.cpp and repeng",
        expresses="Add at the output of block 1 or later, on every token, with its strength baked in",
        refuses="other interventions, scopes, block 0, leaving position 0 alone",
        exporter="fgsteer.export.gguf:export",
        checked_by="run in llama.cpp by a test",
    ),
    ExportSpec(
        "lm-eval",
        "lm-evaluation-harness (its steered model)",
        writes="a file for the steered model of lm-evaluation-harness",
        expresses="Add, Clamp, Ablate and Affine, one at each module",
        refuses="other interventions, bounds, scopes, leaving position 0 alone",
        exporter="fgsteer.export.lm_eval:export",
        needs=("model",),
        checked_by="run in lm-eval by a test",
    ),
    ExportSpec(
        "easysteer",
        "EasySteer (vLLM)",
        writes="a steering spec for EasySteer, and the GGUF files that it names",
        expresses="Add and Ablate, in every scope",
        refuses="other interventions, scopes that count tokens",
        exporter="fgsteer.export.easysteer:export",
        spares_position_0=True,
        options=(ExportOption("folder", None, "the folder where the engine will find the GGUF files"),),
        checked_by="written after EasySteer's source, not run in it",
    ),
    ExportSpec(
        "neuronpedia",
        "Neuronpedia's steering API",
        writes="a request to Neuronpedia's steering API",
        expresses="Add of one vector that is a sum of decoder rows of an SAE that Neuronpedia hosts",
        refuses="other interventions, several vectors, vectors without features, vectors built through effects",
        exporter="fgsteer.export.neuronpedia:export",
        needs=("sae",),
        options=(
            ExportOption("prompt", "I think", "the text to continue"),
            ExportOption("n_tokens", 48, "the number of tokens to generate"),
            ExportOption("temperature", 0.5, "the sampling temperature"),
            ExportOption("seed", 16, "the sampling seed"),
        ),
        checked_by="written after Neuronpedia's source, not run against it",
    ),
)
_rows: dict[str, ExportSpec] = {row.name: row for row in _BUILT_IN}


def register(row: ExportSpec, *, replace: bool = False) -> None:
    """Add an export to the table, so that ``fgsteer export`` offers it.

    Args:
        row: The export.
        replace: Whether to take the place of an export of the same name, as a notebook's cell that runs twice does.

    Raises:
        PluginError: The table has another export of that name.
    """
    add_row(_rows, row.name, row, f"An export named {row.name!r}", replace=replace)


def specs() -> list[ExportSpec]:
    """All rows, those of plugins too. Raises PluginError for a plugin that cannot be imported."""
    load_plugins()
    return list(_rows.values())


def spec(name: str) -> ExportSpec:
    """The row of a name. Raises DataError for a name that is not in the table."""
    by_name = {row.name: row for row in specs()}
    if name not in by_name:
        raise DataError(
            f"the export {name!r:.80}",
            f"one of {', '.join(by_name)}",
            "if another package adds this export, install that package",
        )
    return by_name[name]


def rows() -> list[dict[str, str]]:
    """The table as texts, for documentation: one {column: text} for each export."""
    return [
        {
            "name": row.name,
            "label": row.label,
            "writes": row.writes,
            "expresses": row.expresses,
            "refuses": row.refuses,
            "options": "; ".join(f"{option.name}: {option.summary}" for option in row.options),
            "checked by": row.checked_by,
        }
        for row in specs()
    ]
