"""What the benchmarks of this folder measure: a model with its SAEs and effects, and the behaviors with their prompts.

subject = load_subject("smollm2")                                    what ships in pretrained/smollm2
subject = load_subject("path/of/a/model", ["path/of/an/sae"])        one's own
model, tokenizer = load_organism("refusal")                          a model organism of pretrained/organisms
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fgsteer as fg
from fgsteer.data.shipped import load_bench_prompts, load_chat_prompts
from fgsteer.errors import DataError
from fgsteer.evaluation.bench.bench import Bench
from fgsteer.evaluation.bench.plan import BenchPlan
from fgsteer.evaluation.metrics.intervals import mean_interval, wilson
from fgsteer.storage.json_files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
ORGANISMS = ROOT / "pretrained" / "organisms"
EFFECTS_FILE = "effects.safetensors"  # beside the SAE that they were measured on
# Settings are chosen on these concepts where a model is dear to measure; the other ten choose nothing.
TUNING_CONCEPTS = ("anger", "crime", "london", "love", "music", "sea")


@dataclass(frozen=True)
class Behaviors:
    """Behaviors that are measured together, on prompts of one kind.

    Args:
        names: Names of contrast sets.
        prompts: The prompts, of which both halves are drawn.
        max_new_tokens: The tokens of each text.
    """

    names: tuple[str, ...]
    prompts: tuple[Any, ...]
    max_new_tokens: int


def load_behaviors(kind: str) -> Behaviors:
    """The sixteen concepts with openers of texts ("concepts"), or a chat model's manners with questions ("chat")."""
    if kind == "chat":
        return Behaviors(("formal", *fg.shipped_contrasts(chat=True)), tuple(load_chat_prompts()), 48)
    return Behaviors(tuple(fg.shipped_contrasts()), tuple(load_bench_prompts()), 32)


@dataclass(frozen=True)
class Subject:
    """A model that is measured, with its SAEs and effects by layer."""

    name: str
    model: Any
    tokenizer: Any
    saes: Mapping[int, fg.SAE]
    effects: Mapping[int, fg.EffectApproximator]

    @property
    def chats(self) -> bool:
        """Whether it can be asked in a chat."""
        return getattr(self.tokenizer, "chat_template", None) is not None

    @cached_property
    def judge(self) -> fg.EmbeddingJudge:
        """The judge of all benchmarks, which keeps the embeddings that it has made."""
        return fg.EmbeddingJudge(device=self.model.device)

    def bench(self, plan: BenchPlan, contrasts: Sequence[fg.ContrastSet] = ()) -> Bench:
        """The benchmark of a plan."""
        return Bench(self.model, self.tokenizer, self.saes, self.effects, self.judge, plan, contrasts=contrasts)

    def layers(self, needs: str, layers: Sequence[int] = ()) -> list[int]:
        """The layers at which methods of these needs can run; ``layers`` are some without an SAE that are tried too."""
        if needs == "layer":
            return sorted({*self.saes, *layers})
        return sorted(self.effects if needs == "effects" else self.saes)


def load_subject(name: str, saes: Sequence[str] = ()) -> Subject:
    """Load a model that ships in ``pretrained``, with all its SAEs, or another with the SAEs of these folders.

    Effects are loaded where they lie beside an SAE. Raises DataError for a model without an SAE.
    """
    shipped = ROOT / "pretrained" / name / "sae"
    if not saes:
        folders = sorted(path.parent for path in shipped.glob("*/cfg.json"))
        loaded = [fg.load_sae(name, folder.name) for folder in folders]
    else:
        folders = [Path(folder) for folder in saes]
        loaded = [fg.load_sae(folder) for folder in folders]
    if not loaded:
        raise DataError(
            f"{name} without an SAE", f"a model with SAEs in {shipped.parent.parent.name}", "pass folders with --sae"
        )
    model, tokenizer = fg.load_model(name)
    effects = [fg.load_effects(path) for folder in folders if (path := folder / EFFECTS_FILE).is_file()]
    by_layer = {sae.hookpoint.layer: sae.to(model.device) for sae in loaded}
    return Subject(Path(name).name, model, tokenizer, by_layer, {one.hookpoint.layer: one for one in effects})


def load_organism(name: str) -> tuple[Any, Any]:
    """A model organism of ``pretrained/organisms`` and its tokenizer: SmolLM2 with the adapter merged, in float32.

    Raises DataError for a name that there is not.
    """
    from peft import PeftModel

    if not (ORGANISMS / name / "adapter_config.json").is_file():
        names = sorted(path.parent.name for path in ORGANISMS.glob("*/adapter_config.json"))
        raise DataError(
            f"the organism {name!r:.40}", f"one of {', '.join(names)}", "or build it with pretrained/organisms.py"
        )
    model, tokenizer = fg.load_model("smollm2", dtype="float32", device="cpu")
    return PeftModel.from_pretrained(model, ORGANISMS / name).merge_and_unload().eval(), tokenizer


def results_folder(name: str, kind: str = "concepts") -> Path:
    """Where the results of a model are: those of the embedded default in ``results``, others in folders there."""
    folder = RESULTS if name == "default" else RESULTS / name
    return folder / kind if kind != "concepts" else folder


def share(hits: int, total: int) -> list[float]:
    """(share, low, high) of what holds, with a 95 % interval (Wilson)."""
    interval = wilson(float(hits), total)
    return [interval.mean, interval.low, interval.high]


def over_items(values: Sequence[float]) -> list[float]:
    """(mean, low, high) of values, one of each prompt, with a 95 % interval (t)."""
    return list(mean_interval([dict(enumerate(map(float, values)))], lambda number: number))


def with_interval(triple: Sequence[float], form: str = ".2f") -> str:
    """A mean or a share with its interval."""
    mean, low, high = (f"{value:{form}}" for value in triple)
    return f"{mean} [{low}, {high}]"


def verdict(mean: float, low: float, high: float) -> str:
    """What a gain is called, by its interval."""
    return "no winner" if low <= 0 <= high else "a win" if mean > 0 else "a loss"


def command_of(name: str, arguments: Sequence[str] | None = None) -> str:
    """The command that runs a benchmark, by default this one, without where it writes, which is nobody's business."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    kept, places = [], ("--out", "--work")
    for before, argument in zip([None, *given], given, strict=False):
        if argument.split("=")[0] not in places and before not in places:
            kept.append(argument)
    return shlex.join(["python", f"benchmarks/{name}.py", *kept])


def published(path: Path, mark: str, text: str) -> str:
    """A page's text with ``text`` between the marks, as it should be."""
    page = path.read_text("utf-8")
    marks = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.S)
    return marks.sub(lambda match: f"{match[1]}{text}{match[2]}", page)


def run_benchmark(
    name: str,
    description: str,
    page: Path,
    measure: Callable[[], Mapping[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    model: str = "smollm2",
) -> None:
    """The command of a benchmark without options of its own: measure, write NAME.json and NAME.md, print the table.

    With ``--docs`` it only puts the table that the results give between the page's marks NAME.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--docs", action="store_true", help=f"only put the table into {page.relative_to(ROOT)}")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder(model)
    if not arguments.docs:
        command = command_of(name)
        content = {"command": command, **measure()}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", content)
    text = table(read_json(folder / f"{name}.json"))
    if arguments.docs:
        page.write_text(published(page, name, text), "utf-8")
    else:
        (folder / f"{name}.md").write_text(text, "utf-8")
    print(text)
