"""Where steering moves answers: sweeps over layers and signs on A/B questions and on the likelihood of behaviors.

A/B questions are made of the shipped pairs of replies: which of two replies is chosen, A or B, in turn the one with the
behavior. Vectors are CAA's at the letter of training questions, and effects are measured on held-out ones, in nats an
answer. Likelihoods are those of held-out texts of the shipped concepts, in nats a token. Strength stands in both units:
raw, the coefficient of v, and relative, ‖c v‖/‖h‖, where ‖h‖ is the median norm of neutral text's residual stream.

    python benchmarks/answers.py                            the embedded default, all layers at all costs
    python benchmarks/answers.py --model smollm2            some layers of SmolLM2, and those around the best
    python benchmarks/answers.py --docs                     puts the findings into docs/benchmarks.md
    python benchmarks/answers.py ... --tables               makes table and picture again, of the results that are there

It writes answers.json, answers.md and answers.{png,svg} to the results folder of the model. A command that was killed
goes on where it ended.
"""

from __future__ import annotations

import argparse
import json
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subject import PAGE, ROOT, command_of, published, results_folder

import fgsteer as fg
from fgsteer.activations.recording import record
from fgsteer.activations.tokens import encode_prompts
from fgsteer.data.shipped import load_neutral
from fgsteer.evaluation.drawing import BLUE, LINE, ORANGE, Picture, drawing_style, legend, mark, panel_grid, save_each
from fgsteer.models.hookpoints import Hookpoint, blocks_of
from fgsteer.storage.json_files import read_json, write_json

CONCEPTS = ("anger", "love", "sea", "formal")  # whose likelihood is swept, besides the replies'
SIGNS = {1: ("towards", BLUE, "o-"), -1: ("away", ORANGE, "s--")}


def behaviors(chats: bool) -> dict[str, tuple[fg.ContrastSet, Any]]:
    """Contrast sets by name, each with the rule of the tokens that its vectors are built from."""
    replies = [fg.load_contrast(name) for name in fg.shipped_contrasts(chat=True)]
    questions = [(fg.ab_questions(one, chat=chats), "letter") for one in replies]
    likelihoods = [(fg.load_contrast(name), "all") for name in CONCEPTS]
    likelihoods += [(one, "answer") for one in replies if chats]
    return {one.name: (one, rule) for one, rule in (*questions, *likelihoods)}


def residual_norms(model: Any, tokenizer: Any) -> dict[int, float]:
    """By layer, the median norm of the residual stream of neutral texts, their first tokens left out."""
    places = [Hookpoint(layer) for layer in range(len(blocks_of(model)))]
    norms: dict[int, list[float]] = {place.layer: [] for place in places}
    for text in load_neutral()[0]:
        ids, mask = encode_prompts(tokenizer, [text])
        for place, values in record(model, ids.to(model.device), mask.to(model.device), places).items():
            norms[place.layer] += values[0, 1:].float().norm(dim=-1).tolist()
    return {layer: statistics.median(found) for layer, found in norms.items()}


def reached_cells(sweep: Mapping[str, Any], residual: Mapping[str, float]) -> list[dict[str, Any]]:
    """The cells at the matched cost, with their strength in both units."""
    return [
        {
            **cell,
            "push": cell["sign"] * cell["effect"]["mean"],
            "raw": abs(cell["coefficient"]),
            "relative": abs(cell["coefficient"]) * sweep["norms"][str(cell["layer"])] / residual[str(cell["layer"])],
        }
        for cell in sweep["cells"]
        if cell["target"] == sweep["matched"]
    ]


def spread(values: Sequence[float]) -> float:
    """The largest by the smallest."""
    return max(values) / min(values)


def row(name: str, sweep: Mapping[str, Any], residual: Mapping[str, float], sign: int) -> str:
    """A behavior and sign as a row of the table."""
    cells = [cell for cell in reached_cells(sweep, residual) if cell["sign"] == sign]
    if not cells:
        return f"| {name} | {SIGNS[sign][0]} | not reached |" + " |" * 5
    best = max(cells, key=lambda cell: cell["push"])
    low, high = sorted(sign * best["effect"][end] for end in ("low", "high"))
    push = f"{best['push']:.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")
    spreads = [spread([cell[unit] for cell in cells]) for unit in ("raw", "relative")]
    return (
        f"| {name} | {SIGNS[sign][0]} | {best['layer']} | {push} {sweep['unit']} | {best['raw']:.2f} "
        f"| {best['relative']:.2f} | {spreads[0]:.1f} | {spreads[1]:.1f} |"
    )


def finding(content: Mapping[str, Any]) -> str:
    """What the sweeps say together: whether A/B answers move, and where, how far and by which sign likelihoods do.

    Every figure is a count, or a median over behaviors.
    """
    answers, likelihoods = (
        [one for one in content["sweeps"].values() if (one["unit"] == "nats an answer") == of_answers]
        for of_answers in (True, False)
    )
    return " ".join(
        [*([_answers(answers)] if answers else []), *([_likelihoods(content, likelihoods)] if likelihoods else [])]
    )


def _clearly_moved(sweeps: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """The cells at the matched cost whose effect is clearly in the direction of their sign, and all of them."""
    cells = [cell for one in sweeps for cell in one["cells"] if cell["target"] == one["matched"]]
    return sum((_above if cell["sign"] > 0 else _below)(cell["effect"]) for cell in cells), len(cells)


def _answers(sweeps: Sequence[Mapping[str, Any]]) -> str:
    moved, cells = _clearly_moved(sweeps)
    undecided = sum(not (_above(one["propensity"]) or _below(one["propensity"])) for one in sweeps)
    return (
        f"On the A/B questions of {len(sweeps)} behaviors, steering at a cost of {sweeps[0]['matched']:g} nats a token "
        f"clearly moves the answers at {moved} of {cells} layers and signs; the unsteered model cannot tell which "
        f"reply has the behavior on {undecided} of {len(sweeps)}."
    )


def _likelihoods(content: Mapping[str, Any], sweeps: Sequence[Mapping[str, Any]]) -> str:
    residual, (moved, cells) = content["residual_norms"], _clearly_moved(sweeps)
    matched = [reached for one in sweeps if (reached := reached_cells(one, residual))]
    best = [max(reached, key=lambda cell: cell["push"]) for reached in matched]
    depths, doses = sorted(cell["layer"] for cell in best), [cell["relative"] for cell in best]
    ratios = {
        unit: statistics.median(spread([cell[unit] for cell in reached]) for reached in matched)
        for unit in ("raw", "relative")
    }
    signs = [
        row for one, cell in zip(sweeps, best, strict=True) for row in one["signs"] if row["layer"] == cell["layer"]
    ]
    counts = {
        key: [sum(test(row[key]) for row in signs if row[key]) for test in (_above, _below)]
        for key in ("difference", "net")
    }
    return (
        f"The likelihood of texts that show a behavior clearly moves at {moved} of {cells} layers and signs of "
        f"{len(sweeps)} behaviors. The best layer is {statistics.median(depths):g} of {len(residual)} (median, from "
        f"{depths[0]} to {depths[-1]}), at ‖c v‖/‖h‖ of {statistics.median(doses):.2f} (from {min(doses):.2f} to "
        f"{max(doses):.2f}). Over layers and signs, the strength of this cost differs {ratios['raw']:.1f}-fold in raw "
        f"units and {ratios['relative']:.1f}-fold in relative ones (medians). At its best layer the negative sign is "
        f"clearly stronger for {counts['difference'][0]} of {len(signs)} behaviors and clearly weaker for "
        f"{counts['difference'][1]}; net of what random directions of equal cost do, for {counts['net'][0]} and "
        f"{counts['net'][1]}."
    )


def _above(interval: Mapping[str, float]) -> bool:
    return interval["low"] > 0


def _below(interval: Mapping[str, float]) -> bool:
    return interval["high"] < 0


def page(content: Mapping[str, Any]) -> str:
    """The finding and the table, in Markdown."""
    lines = [
        f"# Answers and likelihoods by layer and sign: {content['model']}\n",
        f"`{content['command']}`\n",
        f"{finding(content)}\n",
        "| behavior | sign | best layer | push [95 %] | coefficient | ‖c v‖/‖h‖ | raw spread | relative spread |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in content["sweeps"].items():
        lines += [row(name, one, content["residual_norms"], sign) for sign in SIGNS]
    lines.append("\nSpread: the largest strength by the smallest over the layers, at equal cost.")
    return "\n".join(lines) + "\n"


@drawing_style()
def push_by_layer(content: Mapping[str, Any]) -> Any:
    """Push at the matched cost by layer, a panel a behavior, scaled to its largest."""
    figure, panels = panel_grid(list(content["sweeps"]), str)
    for name, axis in panels:
        cells = reached_cells(content["sweeps"][name], content["residual_norms"])
        top = max((abs(cell["push"]) for cell in cells), default=1.0) or 1.0
        axis.axhline(0, color=LINE, lw=0.7, zorder=0)
        for sign, (_, color, style) in SIGNS.items():
            own = sorted((cell["layer"], cell["push"] / top) for cell in cells if cell["sign"] == sign)
            axis.plot([layer for layer, _ in own], [push for _, push in own], style, color=color)
    figure.supxlabel("layer")
    figure.supylabel("push by the largest")
    legend(figure, [mark(label, style, color=color) for label, color, style in SIGNS.values()])
    return figure


def publish(folder: Path) -> str:
    """Write table and picture of the results in a folder, and return the table."""
    content = read_json(folder / "answers.json")
    text = page(content)
    (folder / "answers.md").write_text(text, "utf-8")
    save_each([Picture("answers", "Push at equal cost by layer.", push_by_layer(content))], folder)
    return text


def docs_text(name: str) -> str:
    """The finding on a model, as docs/benchmarks.md has it."""
    return textwrap.fill(finding(read_json(results_folder(name) / "answers.json")), 120) + "\n"


def publish_docs() -> None:
    """Put the findings on both models into docs/benchmarks.md."""
    for name in ("default", "smollm2"):
        PAGE.write_text(published(PAGE, f"answers {name}", docs_text(name)), "utf-8")


def main() -> None:
    """Sweep, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default", help="default, smollm2, or the folder of a model")
    parser.add_argument("--layer", type=int, action="append", help="sweep these layers alone, each at all costs")
    parser.add_argument("--behavior", action="append", default=[], help="sweep these alone")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--work", type=Path, help="folder of what is measured of unfinished sweeps")
    parser.add_argument("--fresh", action="store_true", help="sweep again what is there")
    parser.add_argument("--tables", action="store_true", help="only make table and picture of the results")
    parser.add_argument("--docs", action="store_true", help="only put the findings into docs/benchmarks.md")
    arguments = parser.parse_args()
    if arguments.docs:
        publish_docs()
        return
    name = Path(arguments.model).name
    folder = arguments.out or results_folder(name)
    path = folder / "answers.json"
    if arguments.tables:
        print(publish(folder))
        return
    model, tokenizer = fg.load_model(arguments.model)
    work = arguments.work or ROOT / "build" / "answers" / name
    command = command_of("answers")
    done = read_json(path)["sweeps"] if path.is_file() and not arguments.fresh else {}
    norms = {str(layer): norm for layer, norm in residual_norms(model, tokenizer).items()}
    for needed in (folder, work):
        needed.mkdir(parents=True, exist_ok=True)
    chosen = behaviors(getattr(tokenizer, "chat_template", None) is not None)
    for behavior, (contrast, rule) in chosen.items():
        if behavior in done or (arguments.behavior and behavior not in arguments.behavior):
            continue
        began = time.monotonic()
        kept = work / behavior.replace(", ", "-").replace(" ", "-")
        found = fg.sweep(
            model, tokenizer, contrast, layers=arguments.layer, tokens=rule, work=kept, fresh=arguments.fresh
        )
        done[behavior] = json.loads(json.dumps(found.as_dict()))
        write_json(path, {"model": name, "command": command, "residual_norms": norms, "sweeps": done})
        print(f"{behavior}, {time.monotonic() - began:.0f} s: {' '.join(found.answers)}", flush=True)
    print(publish(folder))


if __name__ == "__main__":
    main()
