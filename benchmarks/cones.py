"""Refusal directions by gradient and cones of them, beside the difference of means, on a model that refuses cooking.

The organism (pretrained/organisms) is SmolLM2 that refuses requests about cooking and answers others. The difference of
means is the one that refusal.py chose. Directions are trained on requests that the organism learnt from, and reported
on held-out ones that chose nothing, which share neither words nor templates with those. Each is removed by ablation
everywhere, and added at its layer with the norm of the first.

    python benchmarks/cones.py             writes results/smollm2/cones.json and cones.md
    python benchmarks/cones.py --docs      puts the table into docs/guides/cones.md
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from subject import ROOT, load_organism, published, results_folder, share

import fgsteer as fg
from fgsteer.storage.json_files import read_json, write_json

sys.path.insert(0, str(ROOT / "pretrained"))
from organism_texts import is_refusal, requests

PAGE = ROOT / "docs" / "guides" / "cones.md"
CHOSEN_ON, TRAINED_ON, REPORTED = 12, 12, 24  # requests of a side; refusal.py chose on the first
READ_TOKENS = 4  # of a reply: its first word says whether it is a refusal
SAMPLED = 2  # directions of a cone
TRAINING: dict[str, Any] = {"reply_tokens": 16, "batch_size": 4, "learning_rate": 1e-2}
EPOCHS, CONE_EPOCHS, SAMPLES = 3, 1, 2
ROWS = {
    "unsteered": "unsteered",
    "mean": "difference of means r",
    "rdo": "trained from r (RDO)",
    "orthogonal": "trained, orthogonal to r",
    "cone 2": "a cone of 2: draws from it",
    "cone 3": "a cone of 3: draws from it",
    "cone 2, all": "a cone of 2: the subspace",
    "cone 3, all": "a cone of 3: the subspace",
    "random": "random directions",
}


def refused(model: Any, tokenizer: Any, prompts: Sequence[str], steering: Any = None) -> list[float]:
    """(share, low, high) of the requests that are refused."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    entries = None if steering is None else [steering] * len(chats)
    texts = fg.generate(model, tokenizer, chats, steering=entries, max_new_tokens=READ_TOKENS, do_sample=False)
    return share(sum(map(is_refusal, texts)), len(texts))


def kept(path: Path, make: Callable[[], Any]) -> fg.ConceptCone:
    """The cone of a file, which is made where it is not there, so that a measurement goes on where it ended."""
    if not path.is_file():
        made: fg.ConceptCone = make()
        made.save(path)
    return fg.ConceptCone.load(path)


def random_cone(like: fg.SteeringVector, seed: int) -> fg.ConceptCone:
    """Random orthonormal directions."""
    rows = torch.randn(like.d_model, SAMPLED, generator=torch.Generator().manual_seed(seed))
    return fg.ConceptCone(torch.linalg.qr(rows)[0].T, like.hookpoint, like.norm)


def build(model: Any, tokenizer: Any, seed: int, folder: Path) -> dict[str, fg.ConceptCone]:
    """The direction, those trained from it, and random ones, as cones; training is in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)

    def first() -> fg.ConceptCone:
        r = fg.SteeringVector.load(results_folder("smollm2") / "refusal.safetensors")
        return fg.ConceptCone(r.unit().direction[None], r.hookpoint, r.norm)

    cones = {"mean": kept(folder / "mean.safetensors", first)}
    r = cones["mean"].vector()
    trained = model.to(torch.bfloat16)
    cooking, other = (requests(kind, seed)[0][:TRAINED_ON] for kind in ("cooking", "other"))

    def train(name: str, dimension: int, epochs: int, **options: Any) -> fg.ConceptCone:
        def make() -> fg.ConceptCone:
            began = time.monotonic()
            arguments = {**TRAINING, "epochs": epochs, "seed": seed, **options}
            cone = fg.train_cone(
                trained, tokenizer, cooking, other, r, dimension=dimension, samples=SAMPLES, **arguments
            )
            print(f"{name}: {time.monotonic() - began:.0f} s, losses {[round(x, 2) for x in cone.losses]}", flush=True)
            return cone

        return kept(folder / f"{name}.safetensors", make)

    cones["rdo"] = train("rdo", 1, EPOCHS)
    cones["orthogonal"] = train("orthogonal", 1, EPOCHS, start="random", orthogonal_to=[r])
    cones["cone 2"] = train("cone 2", 2, CONE_EPOCHS, start=cones["rdo"])
    cones["cone 3"] = train("cone 3", 3, CONE_EPOCHS, start=cones["cone 2"])
    cones["random"] = random_cone(r, seed)
    model.float()
    return cones


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """Train the directions, and measure each on the reported requests."""
    model, tokenizer = load_organism("refusal")
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    cones = build(model, tokenizer, seed, folder)
    model.load_state_dict(weights)  # training rounded them
    cooking, other = (requests(kind, seed)[1][CHOSEN_ON:][:REPORTED] for kind in ("cooking", "other"))
    answered: list[Any] = [([{"role": "user", "content": text}], "") for text in other]
    rows: dict[str, Any] = {
        "unsteered": {
            "removed": [refused(model, tokenizer, cooking)],
            "added": [refused(model, tokenizer, other)],
            "kl": [0.0],
        }
    }

    def row(name: str, removals: Sequence[Any], additions: Sequence[Any]) -> None:
        kls = fg.kl_divergences(model, tokenizer, answered, removals, at="last")
        rows[name] = {
            "removed": [refused(model, tokenizer, cooking, one) for one in removals],
            "added": [refused(model, tokenizer, other, one) for one in additions],
            "kl": kls,
        }
        print(name, rows[name], flush=True)

    r = cones["mean"].vector()
    for name, cone in cones.items():
        vectors = (
            cone.sample(SAMPLED, seed) if name.startswith("cone") else [cone.vector(n) for n in range(len(cone.basis))]
        )
        row(name, [fg.ablate_everywhere(model, v) for v in vectors], [[v.add(1.0, bos=True)] for v in vectors])
        if name.startswith("cone"):
            row(f"{name}, all", [cone.ablation(model)], [])
    cosines = {name: (cone.basis @ r.unit().direction).tolist() for name, cone in cones.items()}
    prompts = requests("cooking", seed)[0][:12]
    dependence = {
        name: fg.representational_independence(model, tokenizer, r, cones[name].vector(), prompts).total
        for name in ("rdo", "orthogonal", "random")
    }
    return {
        "hookpoint": str(r.hookpoint),
        "norm": r.norm,
        "requests": {"trained_on": TRAINED_ON, "reported": REPORTED},
        "cosines_to_r": cosines,
        "dependence_on_r": dependence,
        "losses": {name: list(cone.losses) for name, cone in cones.items() if cone.losses},
        "rows": rows,
    }


def table(content: dict[str, Any]) -> str:
    """What removal and addition do to refusals, and what removal costs, in Markdown."""
    lines = [
        "| | cooking is refused, removed | others are refused, added | KL after others, removed, nats |",
        "|---|---|---|---|",
    ]
    for name, title in ROWS.items():
        row = content["rows"][name]
        cells = [
            "; ".join(f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in row[part]) or "–"
            for part in ("removed", "added")
        ]
        lines.append(f"| {title} | {' | '.join(cells)} | {'; '.join(f'{kl:.3f}' for kl in row['kl'])} |")
    cosines, dependence = content["cosines_to_r"], content["dependence_on_r"]
    of_cones = "; ".join(f"{', '.join(f'{x:.2f}' for x in cosines[name])} ({name})" for name in ("cone 2", "cone 3"))
    of_others = ", ".join(f"{dependence[name]:.4f} ({name})" for name in ("rdo", "orthogonal", "random"))
    lines += [
        "",
        f"{content['requests']['reported']} held-out requests of each kind, with 95 % intervals (Wilson), for each "
        f"direction; trained on {content['requests']['trained_on']} of each. They act at {content['hookpoint']} with "
        f"the norm {content['norm']:.3g}. Cosines with r: {cosines['rdo'][0]:.2f} (rdo); {of_cones}. Representational "
        f"dependence on r: {of_others}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the requests, of training and of draws")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--keep", type=Path, help="folder of the trained directions, from which a run goes on")
    parser.add_argument("--docs", action="store_true", help="only put the table into docs/guides/cones.md")
    arguments = parser.parse_args()
    folder = arguments.out or results_folder("smollm2")
    if not arguments.docs:
        began = time.monotonic()
        command = shlex.join(
            ["python", "benchmarks/cones.py", *(["--seed", str(arguments.seed)] if arguments.seed else [])]
        )
        keep = arguments.keep or Path(tempfile.mkdtemp())
        content = {"command": command, **measure(arguments.seed, keep)}
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "cones.json", content)
        (folder / "cones.md").write_text(table(content), "utf-8")
        print(f"{time.monotonic() - began:.0f} s")
    text = table(read_json(folder / "cones.json"))
    if arguments.docs:
        PAGE.write_text(published(PAGE, "cones", text), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
