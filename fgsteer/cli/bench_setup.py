"""What ``fgsteer bench`` makes of its options: the plan, the judges, the benchmark, who generates and who spreads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgsteer.cli.loading import ModelOptions, check_device, documents, load_model, load_sae, sae_name
from fgsteer.cli.printing import say
from fgsteer.cli.values import parse_settings
from fgsteer.errors import DataError
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.wording import count
from fgsteer.evaluation.judges import table
from fgsteer.storage.ranks import Ranks

if TYPE_CHECKING:
    from fgsteer.data.contrasts import ContrastSet
    from fgsteer.evaluation.bench.bench import Bench
    from fgsteer.evaluation.bench.distributors import Distributor
    from fgsteer.evaluation.bench.generators import Generator
    from fgsteer.evaluation.judges.protocols import CoherenceJudge, Judge

COSTS = ("neutral", "own-text")
KLS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # nats a text of 32 tokens, from hardly any effect to broken text
GENERATORS = ("transformers", "vllm")
DISTRIBUTORS = ("none", "torchrun", "ray")
FORMER_ENGINES = {"hf": ("transformers", None), "vllm": ("vllm", None), "ray": ("transformers", "ray")}
FEWEST_PROMPTS = 4  # of one's own: two a half
QUICK: dict[str, Any] = {
    "concepts": ("wedding", "sea"),
    "methods": ("unsteered", "random", "caa", "sae_feature", "fgaa", "fgaa_effects"),
    "ce_rises": (0.25, 0.5, 1.0),
    "prompts": 8,
    "seeds": 1,
    "texts": 8,
}


@dataclass(frozen=True)
class BenchOptions:
    """All that a process, here or on another machine, needs to make the same benchmark.

    ``plan`` holds the fields of ``BenchPlan`` that options set, ``judge`` and ``coherence`` are names of judges.
    """

    out: Path
    plan: dict[str, Any]
    contrasts: Sequence[ContrastSet]
    quick: bool
    fresh: bool
    model: ModelOptions
    sae: str | None
    sae_ids: Sequence[str | None]
    effects: Sequence[str]
    judge: str | None
    coherence: str
    judge_url: str | None

    def make(self) -> Bench:
        """The benchmark, with transformers in this process. Raises DataError for a plan that cannot be run."""
        import fgsteer as fg
        from fgsteer.evaluation.bench.concept_runs import begun_design
        from fgsteer.evaluation.bench.conditions import bench_methods, default_methods
        from fgsteer.methods import spec
        from fgsteer.models.shipped import find_shipped

        name = sae_name(self.sae, self.model.name)
        check_device(self.model.device, self.model.dtype)
        loaded = [load_sae(name, sae_id, self.model.name) for sae_id in self.sae_ids or [None]]
        saes = {sae.hookpoint.layer: sae for sae in loaded}
        shipped = None if self.sae_ids else find_shipped(name)
        sources = self.effects or ([name] if shipped is not None and shipped.has_effects() else [])
        effects = {one.hookpoint.layer: one for source in sources for one in self._load_effects(source)}
        methods = bench_methods()
        layers = {m: tuple(n for n in sorted(saes) if spec(m).needs != "effects" or n in effects) for m in methods}
        fields: dict[str, Any] = {"methods": default_methods(), "layers": layers, **(QUICK if self.quick else {})}
        fields["methods"] = tuple(method for method in fields["methods"] if layers[method])
        if not self.fresh:
            fields |= begun_design(self.out / "bench.jsonl")
        names = tuple(contrast.name for contrast in self.contrasts)
        plan = fg.BenchPlan(**{**fields, **self.plan, "concepts": names})
        contrasts, judge = make_judge(self.contrasts, self.judge, self.judge_url, self.out)
        coherence = make_coherence_judge(contrasts, self.coherence, self.judge_url, self.out)
        model, tokenizer = load_model(self.model)
        saes = {layer: sae.to(model.device) for layer, sae in saes.items()}
        return fg.Bench(model, tokenizer, saes, effects, judge, plan, contrasts=contrasts, coherence=coherence)

    def _load_effects(self, source: str) -> list[Any]:
        """The effects of a file; of a shipped model those of the SAEs of --sae-id, or of the ones that have any."""
        import fgsteer as fg
        from fgsteer.models.shipped import find_shipped

        shipped = find_shipped(source)
        if shipped is None:
            return [fg.load_effects(source)]
        chosen = list(self.sae_ids or [None])
        measured = [sae_id for sae_id in chosen if shipped.has_effects(sae_id)]
        return [fg.load_effects(source, sae_id) for sae_id in measured or chosen[:1]]


def cost_fields(
    cost: str | None, kls: Sequence[float] | None, ce_rises: Sequence[float] | None, matched: float | None
) -> dict[str, Any]:
    """The plan's fields of --cost and --kl. Raises DataError for another kind of cost, or two of them."""
    if cost is not None and cost not in COSTS:
        raise DataError(f"--cost {cost}", " or ".join(COSTS), "the costs themselves are set with --ce-rise or --kl")
    if kls and cost == COSTS[0]:
        raise DataError(
            f"--kl with --cost {cost}", f"--cost {COSTS[1]}", "costs on neutral text are set with --ce-rise"
        )
    if not kls and cost != COSTS[1]:
        return {}
    if ce_rises:
        raise DataError("--ce-rise with costs on own text", "--kl", "costs on own text are set with --kl")
    chosen = tuple(sorted(kls or KLS))
    if matched is not None and matched not in chosen:
        raise DataError(f"--matched {matched:g}", f"one of the costs {', '.join(f'{one:g}' for one in chosen)}")
    return {"kls": chosen, "top_k": MAX_COUNT, "top_p": 1.0}


def load_contrasts(concepts: Iterable[str]) -> list[ContrastSet]:
    """The contrast sets of --concept, each of which has a name of its own that files can have. Raises DataError."""
    import fgsteer as fg
    from fgsteer.data.contrasts import check_name

    contrasts = [fg.load_contrast(concept) for concept in concepts]
    for number, contrast in enumerate(contrasts):
        check_name(contrast.name)
        if contrast.name.casefold() in [other.name.casefold() for other in contrasts[:number]]:
            raise DataError(
                f"--concept: two contrast sets named {contrast.name!r}",
                "each name once, in upper or lower case",
                'give the file of one of them another name, or a "name" of its own',
            )
    return contrasts


def own_texts(prompts: Path | None, neutral: Path | None, field: str, number: int | None) -> dict[str, Any]:
    """The plan's fields of --prompts-from and --neutral.

    Of the prompts ``number`` a half are used, all of them by default. Raises DataError.
    """
    fields: dict[str, Any] = {}
    if prompts is not None:
        texts = tuple(documents(prompts, field))
        if len(texts) < FEWEST_PROMPTS:
            raise DataError(
                f"{prompts} with {count(len(texts), 'prompt')}",
                f"at least {FEWEST_PROMPTS} prompts",
                "add prompts to the file: strengths are chosen on one half of them and measured on the other",
            )
        fields |= {"own_prompts": texts, "prompts": number or len(texts) // 2}
    if neutral is not None:
        texts = tuple(documents(neutral, field))
        fields |= {"neutral": texts, "texts": len(texts)}
    return fields


def settings_by_method(settings: Iterable[str]) -> dict[str, dict[str, Any]] | None:
    """{"fgaa": {"n_positive": 8}} of --set fgaa.n_positive=8. Raises DataError."""
    by_method: dict[str, dict[str, Any]] = {}
    for entry in settings:
        method, dot, setting = entry.partition(".")
        if not dot:
            raise DataError(f"--set {entry}", "METHOD.PARAMETER=VALUE, such as --set fgaa.n_positive=8")
        by_method.setdefault(method, {}).update(parse_settings([setting]))
    return by_method or None


def make_judge(
    contrasts: Sequence[ContrastSet], name: str | None, url: str | None, out: Path
) -> tuple[Sequence[ContrastSet], Judge]:
    """The judge of behavior, and the contrast sets, with held-out texts where the judge learns from them.

    Raises DataError for a name that is in no row, and for a set that is too small to hold texts out.
    """
    if name is None:
        row = table.default_spec()
        first = table.specs()[0]
        if row != first:
            say(f"note: judged by {row.label}. To judge by {first.label}: pip install {first.install}", err=True)
    else:
        row = table.spec(name, url)
    if row.learns:
        contrasts = _held_out(contrasts)
    return contrasts, row.load()(_judge_options(contrasts, name, url, out, row))


def make_coherence_judge(
    contrasts: Sequence[ContrastSet], name: str, url: str | None, out: Path
) -> CoherenceJudge | None:
    """The judge of coherence; None where the benchmark fits its own. Raises DataError for a name in no row."""
    row = table.spec(name, url, "coherence")
    judge: CoherenceJudge | None = row.load()(_judge_options(contrasts, name, url, out, row))
    return judge


def _judge_options(
    contrasts: Sequence[ContrastSet], name: str | None, url: str | None, out: Path, row: table.JudgeSpec
) -> table.JudgeOptions:
    from fgsteer.storage.targets import make_folder

    cache = make_folder(out) / "judge.jsonl" if row.takes_model else None
    return table.JudgeOptions(contrasts, name or row.name, url, cache)


def _held_out(contrasts: Sequence[ContrastSet]) -> list[ContrastSet]:
    """The contrast sets, each with a held-out part; says of which texts were held out. Raises DataError."""
    parted = [contrast.hold_out() for contrast in contrasts]
    for before, after in zip(contrasts, parted, strict=True):
        if before is not after and not Ranks.from_env().rank:
            say(
                f"note: {before.name} has no held_out part, so every third text is held out: the judge learns from "
                "these texts, and no vector is built from them",
                err=True,
            )
    return parted


def choose_engine(generator: str, distribute: str | None, former: str | None) -> tuple[str, str]:
    """The names of the generator and the distributor, which is torchrun where its environment is found.

    Raises DataError for names that are unknown, and for two that do not go together.
    """
    under_torchrun = Ranks.from_env().world > 1
    if former is not None:
        if former not in FORMER_ENGINES:
            raise DataError(f"--engine {former}", f"one of {', '.join(FORMER_ENGINES)}")
        generator, distribute = FORMER_ENGINES[former]
        new = f"--generator {generator}" if distribute is None else f"--distribute {distribute}"
        say(f"note: --engine {former} is now called {new}", err=True)
    if generator not in GENERATORS:
        raise DataError(f"--generator {generator}", " or ".join(GENERATORS))
    distribute = distribute or ("torchrun" if under_torchrun else "none")
    if distribute not in DISTRIBUTORS:
        raise DataError(f"--distribute {distribute}", ", ".join(DISTRIBUTORS))
    if under_torchrun and distribute != "torchrun":
        raise DataError(
            f"--distribute {distribute} under torchrun",
            "--distribute torchrun, which is the default there",
            "leave --distribute out, or start the command without torchrun",
        )
    if distribute == "torchrun" and not under_torchrun:
        raise DataError(
            "--distribute torchrun in a single process",
            "processes that torchrun started",
            "start them: torchrun --nproc-per-node 2 -m fgsteer bench ...",
        )
    if generator == "vllm" and distribute != "none":
        raise DataError(
            f"--generator vllm with --distribute {distribute}",
            "--distribute none, because vLLM spreads over GPUs by itself",
            "for several GPUs pass --generator-set tensor_parallel_size=2",
        )
    return generator, distribute


def make_generator(name: str, bench: Bench, model: ModelOptions, settings: dict[str, Any]) -> Generator | None:
    """The generator: None for transformers in this process; vLLM with room for a batch, in the model's dtype."""
    if name == "transformers":
        return None
    from fgsteer.serving import VllmWriter, steered_llm

    rows = max(32, bench.plan.batch_rows // bench.plan.prompts)
    dtype = str(bench.model.dtype).removeprefix("torch.")
    layers = sorted({layer for _, layer in bench.plan.method_layers})
    options: dict[str, Any] = {"dtype": dtype, "revision": model.revision}
    options |= {"trust_remote_code": model.trust_remote_code, "vectors_per_request": 1} | settings
    return VllmWriter(steered_llm(model.name, layers=layers, rows=rows, **options), bench.tokenizer)


def make_distributor(name: str, make: Callable[[], Bench], workers: int) -> Distributor:
    """The distributor of a name; ``make`` makes the benchmark again in a worker of Ray."""
    from fgsteer.evaluation.bench.distributors import OneProcess, RayWorkers, Torchrun

    if name == "ray":
        return RayWorkers(make, workers)
    return Torchrun() if name == "torchrun" else OneProcess()
