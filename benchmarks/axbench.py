"""AxBench's protocol on concepts of our own with an embedding judge; not comparable with the published table.

The folder that it makes has AxBench's format. Concepts are ten shipped contrast sets: a training sentence with the
concept answers a request for a sentence, and loses to the sentence beside it in the set; the held-out sentences are the
texts of the evaluation, those of another concept its hard negatives. Instructions are the shipped questions. A
concept's feature is the one that ``fg.find_features`` finds for its name.

    python benchmarks/axbench.py                          writes results/smollm2/axbench.json and axbench.md
    python benchmarks/axbench.py --no-write               the same for detection alone, without answers
    python benchmarks/axbench.py --docs                   puts the table into docs/guides/axbench.md

A run that was stopped goes on in the folder of --work.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from subject import ROOT, command_of, published, results_folder

import fgsteer as fg
from fgsteer.data.shipped import load_chat_prompts
from fgsteer.storage.json_files import read_json, write_json

PAGE = ROOT / "docs" / "guides" / "axbench.md"
NAME = "ten-concepts"
# concepts, each with the one whose sentences are its hard negatives
NEIGHBOURS = {
    "anger": "war",
    "christian": "wedding",
    "crime": "anger",
    "food": "london",
    "london": "food",
    "love": "music",
    "music": "love",
    "sea": "christian",
    "war": "crime",
    "wedding": "sea",
}
REQUESTS = (
    "Write a sentence of a story.",
    "Give me one line of a novel.",
    "What would you put into a diary today?",
    "Tell me something in one sentence.",
    "Begin a short tale.",
    "Write down a thought.",
)
HARD = 10  # hard negatives of a concept
SHARED = -1


def as_row(number: int, text: str, n: int, category: str, concept: str, losing: str | None = None) -> dict[str, Any]:
    """A row of AxBench's tables."""
    return {
        "input": REQUESTS[n % len(REQUESTS)],
        "output": text,
        "output_concept": concept,
        "concept_genre": "text",
        "category": category,
        "dataset_category": "instruction",
        "concept_id": number,
        "losing_output": losing,
    }


def make_folder(folder: Path, features: dict[str, int], texts: int) -> Path:
    """Write the concepts in AxBench's format: so many training texts a side of each."""
    sets = {name: fg.load_contrast(name) for name in NEIGHBOURS}
    metadata, training, evaluation = [], [], []
    for number, (name, contrast) in enumerate(sets.items()):
        held_out, concept = contrast.held_out, contrast.description
        assert held_out is not None
        metadata.append(
            {
                "concept_id": number,
                "concept": concept,
                "ref": f"smollm2/{features[name]}",
                "concept_genres_map": {concept: ["text"]},
            }
        )
        pairs = list(zip(contrast.positives, contrast.negatives, strict=True))[:texts]
        training += [as_row(number, up, n, "positive", concept, down) for n, (up, down) in enumerate(pairs)]
        # every concept gives its share of the negatives that all of them have in common
        size = -(-texts // len(sets))
        training += [as_row(SHARED, pairs[n][1], n, "negative", "EEEEE") for n in range(size)]
        neighbour = sets[NEIGHBOURS[name]].held_out
        assert neighbour is not None
        for category, listed in (
            ("positive", held_out.positives),
            ("negative", held_out.negatives),
            ("hard negative", neighbour.positives[:HARD]),
        ):
            rows = [as_row(number, text, n, category, concept) for n, text in enumerate(listed)]
            evaluation += [{**row, "sae_link": "smollm2", "sae_id": features[name]} for row in rows]
    instructions = [{"instruction": prompt[-1]["content"]} for prompt in load_chat_prompts()]
    for part in ("generate", "inference"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for path, listed in (
        (folder / "generate" / "metadata.jsonl", metadata),
        (folder / "generate" / "train_data.jsonl", training),
        (folder / "inference" / "latent_eval_data.jsonl", evaluation),
    ):
        path.write_text("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in listed), "utf-8")
    (folder / "alpaca_eval.json").write_text(json.dumps(instructions, ensure_ascii=False), "utf-8")
    return folder


def run(arguments: argparse.Namespace, work: Path) -> fg.AxBenchResult:
    """Make the folder and run the protocol on it."""
    model, tokenizer = fg.load_model("smollm2", device="cpu", dtype=arguments.dtype)
    sae = fg.load_sae("smollm2", arguments.sae)
    effects = fg.load_effects("smollm2", arguments.sae)
    work.mkdir(exist_ok=True)
    noted = work / f"features-{arguments.sae}.json"
    if not noted.exists():
        examples = fg.load_examples(sae)
        found = {n: fg.find_features(model, tokenizer, sae, n, examples=examples, top=1)[0].id for n in NEIGHBOURS}
        write_json(noted, found)
    features = read_json(noted)
    data = fg.load_axbench(make_folder(work / NAME, features, arguments.texts))
    settings = {name: {"epochs": arguments.epochs} for name in arguments.methods if name.split("_sae")[0] in TRAINED}
    plan = fg.AxBenchPlan(
        methods=tuple(arguments.methods),
        factors=tuple(arguments.factors),
        trained_factors=tuple(arguments.trained_factors),
        instructions=arguments.instructions,
        max_new_tokens=arguments.tokens,
        settings=settings,
        together=1,
        batch_rows=arguments.rows,
    )
    rater = fg.EmbeddingRater()

    def say(done: int, _: int | None = None) -> None:
        print(f"{time.strftime('%H:%M:%S')} {done}", flush=True)

    return fg.axbench(
        model,
        tokenizer,
        data,
        work / "run",
        sae=sae,
        effects=effects,
        rater=rater,
        plan=plan,
        write=arguments.write,
        progress=say,
    )


TRAINED = ("lm", "lm_factors", "bipo", "reps", "reft_r1", "simpo")
METHODS = (
    "prompt diffmean pca probe sae sae_a fgaa sta sae_ts lm lm_sae reps reps_sae reft_r1 random".split()  # noqa: SIM905
)


def page(content: dict[str, Any]) -> str:
    """What was done, and the table, in Markdown."""
    result = fg.AxBenchResult({key: value for key, value in content.items() if key != "command"})
    what = (
        "protocol on our own concepts with an embedding judge" if content["judge"] else "detection on our own concepts"
    )
    return (
        f"AxBench's {what}; not comparable with the published table.\n\n"
        f"{result.table}\nCommand: `{content['command']}`\n"
    )


def main() -> None:
    """Run or print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("axbench-run"), help="the folder that a run goes on from")
    parser.add_argument("--sae", default="layer_12", help="the SAE of smollm2 whose layer is steered")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--texts", type=int, default=24, help="training texts of a concept, on either side")
    parser.add_argument("--epochs", type=int, default=2, help="of every trained method")
    parser.add_argument("--factors", nargs="+", type=float, default=[0.4, 0.8, 1.2, 2.0])
    parser.add_argument("--trained-factors", nargs="+", type=float, default=[4, 8, 16, 25])
    parser.add_argument("--instructions", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24, help="of an answer")
    parser.add_argument("--rows", type=int, default=32, help="answers that are written together")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--no-write", dest="write", action="store_false", help="measure detection alone")
    parser.add_argument("--docs", action="store_true", help="put what the results file says into the guide")
    arguments = parser.parse_args()
    folder = results_folder("smollm2")
    if not arguments.docs:
        result = run(arguments, arguments.work)
        command = command_of("axbench")
        write_json(folder / "axbench.json", {"command": command, **result.content})
    text = page(read_json(folder / "axbench.json"))
    (folder / "axbench.md").write_text(text, "utf-8")
    if arguments.docs:
        PAGE.write_text(published(PAGE, "axbench", text), "utf-8")
    print(text)


if __name__ == "__main__":
    main()
