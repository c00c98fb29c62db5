"""A miniature of an AxBench folder, in words that the tiny tokenizer knows."""

from __future__ import annotations

import json

CONCEPTS = {0: ("a wedding", "bride ring church wedding groom"), 1: ("the sea", "sea ship king sea war")}
PLAIN = "the man sat and a dog ran in the old house on a good day"


def rows(number, concept, words, offset, column="output"):
    """Four positives of a concept: other words of it in each."""
    listed = words.split()
    return [
        {
            "input": f"the {('man', 'dog', 'cat', 'woman')[n]} said",
            column: " ".join(listed[(n + offset) % 5 :] + listed[:2]),
            "output_concept": concept,
            "concept_genre": "text",
            "category": "positive",
            "dataset_category": "instruction",
            "concept_id": number,
        }
        for n in range(4)
    ]


def negatives(number, genre="text", count=4, category="negative"):
    """Texts without a concept."""
    plain = PLAIN.split()
    return [
        {
            "input": f"a {('queen', 'king', 'cat', 'woman')[n % 4]} is",
            "output": " ".join(plain[n : n + 7]),
            "output_concept": "EEEEE",
            "concept_genre": genre,
            "category": category,
            "dataset_category": "instruction",
            "concept_id": number,
        }
        for n in range(count)
    ]


def tables():
    """(metadata, training rows, evaluation rows, instructions)."""
    metadata = [
        {
            "concept_id": number,
            "concept": concept,
            "ref": f"https://example.org/sae/{3 + number}",
            "concept_genres_map": {concept: ["text"]},
        }
        for number, (concept, _) in CONCEPTS.items()
    ]
    train = [row for n, (concept, words) in CONCEPTS.items() for row in rows(n, concept, words, 0)]
    train += negatives(-1) + negatives(-1, "math") + negatives(-1, "code")
    evaluation = []
    for n, (concept, words) in CONCEPTS.items():
        listed = rows(n, concept, words, 2) + negatives(n) + negatives(n, count=2, category="hard negative")
        evaluation += [{**row, "sae_link": "https://example.org/sae", "sae_id": 3 + n} for row in listed]
    instructions = [{"instruction": f"{a} {b} ?", "output": "no"} for a in ("is the", "was a", "the") for b in
                    ("king good", "queen sad", "dog old", "cat happy")]  # fmt: skip
    return metadata, train, evaluation, instructions


def write(folder, *, parquet=False, tables=None):
    """Write a miniature to a folder, and return the folder."""
    metadata, train, evaluation, instructions = tables or globals()["tables"]()
    for part in ("generate", "inference"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    lines(folder / "generate" / "metadata.jsonl", metadata)
    for path, listed in (
        (folder / "generate" / "train_data", train),
        (folder / "inference" / "latent_eval_data", evaluation),
    ):
        if parquet:
            import pyarrow
            from pyarrow import parquet as files

            files.write_table(pyarrow.Table.from_pylist(listed), f"{path}.parquet")
        else:
            lines(path.with_suffix(".jsonl"), listed)
    (folder / "alpaca_eval.json").write_text(json.dumps(instructions))
    return folder


def lines(path, listed):
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in listed))
