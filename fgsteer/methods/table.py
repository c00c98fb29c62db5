"""The table of methods: one row each, which everything that needs to know a method reads.

Nothing here imports torch, so that help texts can list methods. A row's function is imported when it is first used.

    register(MethodSpec("mine", "Mine", "What it does.", function=my_method, needs="layer", offered=("build", "bench")))
    build("mine", stats=stats)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from fgsteer.errors import ArgumentError, DataError, FgsteerError, SelectionError
from fgsteer.storage.plugins import add_row, import_function, load_plugins

if TYPE_CHECKING:
    from fgsteer.interventions import Intervention
    from fgsteer.vector import SteeringVector

Needs = Literal["nothing", "layer", "sae", "effects"]
Operation = Literal["add", "affine"]
Command = Literal["build", "bench", "sweep"]

# What build passes to the methods that take it, and where it comes from.
INPUTS = {
    "stats": "statistics, which fg.collect returns",
    "sae": "an SAE, which fg.load_sae returns",
    "effects": "the SAE's effects, which fg.load_effects returns",
    "features": "ids of features, such as fg.find_features lists",
}


@dataclass(frozen=True)
class MethodSpec:
    """One row of the table of methods.

    Args:
        name: What code, files and the command line call the method: lower-case letters, digits and underscores.
        label: What tables, plots and reports call it.
        summary: What it does, in one sentence.
        function: The function that returns the ``SteeringVector``, or "module:name" of it, which is imported when
            it is first used. It takes its inputs by name: ``stats`` (``ContrastStatistics``), ``sae``, ``effects``
            (``EffectApproximator``), ``features`` (ids), and keywords of its own with defaults. The benchmark can also
            give ``hookpoint``, ``d_model`` and ``seed``, and ``model``, ``tokenizer`` and ``contrast`` for training,
            to a function that requires them. Empty for a condition of the benchmark that applies no vector.
        needs: What it needs at a layer: "layer" (the statistics of the residual stream there), "sae" (an SAE of that
            layer too), or "effects" (the effects measured on that SAE too). "nothing" for a condition without a vector.
        offered: The commands that offer it: "build" (and ``fg.build``), "bench", and "sweep", for which the function
            takes the keyword ``hookpoint``.
        operation: How the benchmark applies the vector: "add" (``h + c·v``) or "affine" (``α`` is the strength).
        unit: Whether the benchmark scales the vector to norm 1 first.
        pooled: Whether it reads the pooled activations of each text, which ``collect(keep_pooled=True)`` keeps.
        in_context: Whether the benchmark puts examples of the behavior before each prompt.
        paper: Where the method was published, such as "arXiv 2312.06681".
        instructs: Whether the benchmark asks for the behavior in a system message, which needs a chat template.
        trains: Whether it trains through the model, which takes minutes where others take seconds: a benchmark runs it
            only if it is named.

    Raises:
        ArgumentError: A field is not one of the values above.
    """

    name: str
    label: str
    summary: str
    function: str | Callable[..., SteeringVector] = ""
    needs: Needs = "nothing"
    offered: tuple[Command, ...] = ()
    operation: Operation = "add"
    unit: bool = True
    pooled: bool = False
    in_context: bool = False
    paper: str = ""
    instructs: bool = False
    trains: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ArgumentError(
                f"name={self.name!r}", "lower-case letters, digits and underscores, a letter first, as a method's name"
            )
        for field, text in (("label", self.label), ("summary", self.summary)):
            if not text.strip():
                raise ArgumentError(f"{field}={text!r}", f"a text as the {field} of the method {self.name!r}")
        for field, value, kind in (
            ("needs", self.needs, Needs),
            ("operation", self.operation, Operation),
            *(("offered", command, Command) for command in self.offered),
        ):
            if value not in get_args(kind):
                listed = ", ".join(map(repr, get_args(kind)))
                raise ArgumentError(f"{field}={value!r}", f"one of {listed} for the method {self.name!r}")
        if bool(self.function) == (self.needs == "nothing"):
            raise ArgumentError(
                f"function={self.function!r} and needs={self.needs!r}",
                f'a function for the method {self.name!r} unless it needs "nothing"',
            )
        if "sweep" in self.offered and self.needs != "layer":
            raise ArgumentError(
                f"needs={self.needs!r}",
                f'needs="layer" for the method {self.name!r}',
                'A sweep has no SAE: leave "sweep" out of offered',
            )

    def load(self) -> Callable[..., SteeringVector]:
        """The function, imported if need be. Raises PluginError where it cannot be imported."""
        if callable(self.function):
            return self.function
        function: Callable[..., SteeringVector] = import_function(self.function, f"the method {self.name!r}")
        return function

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The function's parameters by name."""
        return inspect.signature(self.load()).parameters

    @property
    def required(self) -> list[str]:
        """The names of the parameters without a default."""
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return [name for name, p in self.parameters.items() if p.default is p.empty and p.kind in plain]

    def build(self, **inputs: Any) -> SteeringVector:
        """The vector of these inputs.

        Args:
            **inputs: The function's arguments. ``stats``, ``sae``, ``effects`` and ``features`` that it does not take
                are ignored.

        Raises:
            SelectionError: An input is missing, or a keyword is unknown.
        """
        parameters = self.parameters
        arguments = {key: value for key, value in inputs.items() if key in parameters or key not in INPUTS}
        missing = [key for key in self.required if arguments.get(key) is None]
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        unknown = [] if takes_any else [key for key in arguments if key not in parameters]
        if missing:
            needed = " and ".join(f"{key}= ({INPUTS[key]})" if key in INPUTS else f"{key}=" for key in missing)
            raise SelectionError("none", f"{needed} for the method {self.name!r}")
        if unknown:
            raise SelectionError(f"{', '.join(unknown)}", f"the parameters of {self.name!r}: {', '.join(parameters)}")
        return self.load()(**arguments)

    def maker(self, vector: SteeringVector) -> Callable[[float], Intervention]:
        """The function from a strength to the intervention that applies a vector of this method."""
        make: Callable[[float], Intervention] = getattr(vector.unit() if self.unit else vector, self.operation)
        return make


_BUILT_IN = (
    MethodSpec("unsteered", "unsteered", "No steering: what the others are compared with.", offered=("bench",)),
    MethodSpec(
        "random",
        "random direction",
        "A random direction: what any change of that size does.",
        function="fgsteer.methods.controls:random_direction",
        needs="layer",
        offered=("bench",),
    ),
    MethodSpec(
        "prompt",
        "prompt prefix",
        "No steering, but examples of the behavior before the prompt.",
        offered=("bench",),
        in_context=True,
    ),
    MethodSpec(
        "system_prompt",
        "system prompt",
        "No steering, but a system message that asks for the behavior; it needs a chat template.",
        offered=("bench",),
        instructs=True,
    ),
    MethodSpec(
        "caa",
        "CAA",
        "Contrastive activation addition: the difference of the two sides' means.",
        function="fgsteer.methods.difference:caa",
        needs="layer",
        offered=("build", "bench", "sweep"),
        paper="arXiv 2312.06681",
    ),
    MethodSpec(
        "ace",
        "ACE",
        "Affine concept editing: CAA's direction, applied from the negative side's mean.",
        function="fgsteer.methods.difference:ace",
        needs="layer",
        offered=("build", "bench", "sweep"),
        operation="affine",
        unit=False,
        paper="arXiv 2411.09003",
    ),
    MethodSpec(
        "pca",
        "PCA",
        "The first principal component of the differences between the pairs.",
        function="fgsteer.methods.difference:pca",
        needs="layer",
        offered=("build", "bench", "sweep"),
        pooled=True,
        paper="arXiv 2310.01405",
    ),
    MethodSpec(
        "caa_denoised",
        "CAA denoised",
        "CAA less what the SAE's features show to be noise: features within their standard errors are removed.",
        function="fgsteer.methods.denoising:caa_denoised",
        needs="sae",
        offered=("build", "bench"),
    ),
    MethodSpec(
        "from_features",
        "chosen features",
        "The decoder rows of features that you name, with weights.",
        function="fgsteer.methods.sae_methods:from_features",
        needs="sae",
        offered=("build",),
    ),
    MethodSpec(
        "sae_feature",
        "SAE feature",
        "The decoder row of the one feature that separates the two sides best.",
        function="fgsteer.methods.sae_methods:from_features",
        needs="sae",
        offered=("bench",),
    ),
    MethodSpec(
        "sta",
        "STA",
        "Steering target atoms: the features that differ between the sides in amplitude and frequency.",
        function="fgsteer.methods.target_atoms:sta",
        needs="sae",
        offered=("build", "bench"),
        paper="arXiv 2505.20322",
    ),
    MethodSpec(
        "sae_ts",
        "SAE-TS",
        "SAE-targeted steering: the direction whose effect is the features that you name.",
        function="fgsteer.methods.sae_methods:sae_ts",
        needs="effects",
        offered=("build", "bench"),
        paper="arXiv 2411.02193",
    ),
    MethodSpec(
        "fgaa",
        "FGAA",
        "Feature guided activation additions: the features that differ most, after filters.",
        function="fgsteer.methods.sae_methods:fgaa",
        needs="sae",
        offered=("build", "bench"),
        paper="arXiv 2501.09929",
    ),
    MethodSpec(
        "sae_ssv",
        "SAE-SSV",
        "Supervised steering in an SAE's space: twice the difference of means, on the features that separate best.",
        function="fgsteer.methods.separable:sae_ssv",
        needs="sae",
        offered=("build", "bench"),
        paper="arXiv 2505.16188",
    ),
    MethodSpec(
        "fgaa_error",
        "FGAA + error",
        "FGAA with what the SAE does not reconstruct of the contrast: CAA less the features that are not chosen.",
        function="fgsteer.methods.controls:fgaa_with_error",
        needs="sae",
        offered=("bench",),
    ),
    MethodSpec(
        "fgaa_effects",
        "FGAA + effects",
        "FGAA through the measured effects instead of the decoder rows.",
        function="fgsteer.methods.sae_methods:fgaa",
        needs="effects",
        offered=("bench",),
        paper="arXiv 2501.09929",
    ),
    MethodSpec(
        "trained",
        "trained vector",
        "A vector that is trained through the model to prefer the positive texts.",
        function="fgsteer.learning.bench:trained",
        needs="layer",
        offered=("bench",),
        trains=True,
    ),
    MethodSpec(
        "trained_features",
        "trained features",
        "Weights of an SAE's features that are trained through the model to prefer the positive texts.",
        function="fgsteer.learning.bench:trained_features",
        needs="sae",
        offered=("bench",),
        trains=True,
    ),
    MethodSpec(
        "minus_bias",
        "−Mb alone",
        "Only −M b, the part of FGAA through effects that does not depend on the features.",
        function="fgsteer.methods.controls:minus_bias",
        needs="effects",
        offered=("bench",),
    ),
)
_rows: dict[str, MethodSpec] = {row.name: row for row in _BUILT_IN}


def register(row: MethodSpec, *, replace: bool = False) -> None:
    """Add a method to the table, so that every command, report and plot that its row is offered by knows it.

    Args:
        row: The method.
        replace: Whether to take the place of a method of the same name, as a notebook's cell that runs twice does.

    Raises:
        PluginError: The table has another method of that name.
    """
    add_row(_rows, row.name, row, f"A method named {row.name!r}", replace=replace)


def specs(command: Command | None = None) -> list[MethodSpec]:
    """The rows in the order of tables; with a command, those that it offers. Raises PluginError."""
    load_plugins()
    return [row for row in _rows.values() if command is None or command in row.offered]


def spec(name: str, command: Command | None = None, error: type[FgsteerError] = DataError) -> MethodSpec:
    """The row of a name.

    Args:
        name: The method's name.
        command: The command that must offer it; None takes every method, as runs that were written before may hold.
        error: What is raised for another name.
    """
    rows = {row.name: row for row in specs(command)}
    if name in rows:
        return rows[name]
    known = {row.name: row for row in specs()}
    if name in known:
        change = f"{known[name].label} is a method of fgsteer {' and '.join(known[name].offered)}"
    else:
        change = "If another package adds this method, install that package"
        change += "" if command else "; run.only(methods=...) leaves it out of a benchmark's run"
    raise error(
        f"the method {name!r:.80}",
        f"one of {', '.join(rows)}" + (f" (the methods of fgsteer {command})" if command else ""),
        change,
    )


def method_name(name: str) -> str:
    """What tables and plots call a method. Raises DataError for one that is not in the table."""
    return spec(name).label


class MethodFunctions(Mapping[str, "Callable[..., SteeringVector]"]):
    """The functions of the methods that ``build`` offers, by name; each is imported when it is first asked for."""

    def __getitem__(self, name: str) -> Callable[..., SteeringVector]:
        if name not in self:
            raise KeyError(name)
        return spec(name, "build").load()

    def __contains__(self, name: object) -> bool:
        return any(row.name == name for row in specs("build"))

    def __iter__(self) -> Iterator[str]:
        return iter([row.name for row in specs("build")])

    def __len__(self) -> int:
        return len(specs("build"))

    def __repr__(self) -> str:
        return f"METHODS({', '.join(self)})"


METHODS = MethodFunctions()


def build(name: str, **inputs: Any) -> SteeringVector:
    """Build a vector by its method's name, for loops over methods and for the command line.

    Args:
        name: A name in ``METHODS``, such as "fgaa".
        **inputs: ``stats``, ``sae``, ``effects`` and ``features``, of which those that the method does not take are
            ignored, so that one call serves every method; and the method's own keywords.

    Returns:
        The vector: ``build("fgaa", stats=stats, sae=sae)`` is ``fgaa(stats, sae)``.

    Raises:
        SelectionError: The method is unknown, an input is missing, or a keyword is unknown.
    """
    return spec(name, "build", SelectionError).build(**inputs)
