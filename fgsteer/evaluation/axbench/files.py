"""AxBench's own files: concepts, training texts, texts for detection, and instructions, every column checked.

    data = load_axbench("axbench/concept500/prod_2b_l10_v1", instructions="axbench/data/alpaca_eval.json")
    data.concepts[0].positives[0].output

A folder holds generate/metadata.jsonl, generate/train_data.parquet and inference/latent_eval_data.parquet, or these
files beside one another. Tables may be .jsonl too, which needs no pyarrow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fgsteer.data.chat import check_text
from fgsteer.data.corpora import read_rows
from fgsteer.errors import DataError
from fgsteer.errors.checks import check_range, checked, describe_value, is_whole_number
from fgsteer.errors.limits import MAX_COUNT
from fgsteer.errors.reprs import OneLineRepr
from fgsteer.storage.json_files import text_sha256

METADATA, TRAINING, EVALUATION, INSTRUCTIONS = "metadata", "train_data", "latent_eval_data", "alpaca_eval"
TABLE_KINDS = (".parquet", ".jsonl")
POSITIVE, NEGATIVE, HARD_NEGATIVE = "positive", "negative", "hard negative"
CATEGORIES = (POSITIVE, NEGATIVE, HARD_NEGATIVE)
SHARED_ID = -1  # the concept_id of negatives that all concepts of a genre share
LOSING = "losing_output"  # a column that AxBench makes for preferences; where it lacks, the model's own answers lose
COLUMNS = ("input", "output", "output_concept", "concept_genre", "category", "dataset_category", "concept_id")
EVALUATION_COLUMNS = (*COLUMNS, "sae_link", "sae_id")


@dataclass(frozen=True, repr=False)
class AxBenchText(OneLineRepr):
    """An instruction with an answer.

    Attributes:
        input: The instruction.
        output: The answer.
        category: "positive", "negative" or "hard negative".
        losing: An answer to the instruction without the concept, where the file has one.
    """

    input: str
    output: str
    category: str = POSITIVE
    losing: str | None = None


@dataclass(frozen=True, repr=False)
class AxBenchConcept(OneLineRepr):
    """A concept with its texts.

    Attributes:
        id: Its number, which is the seed of its instructions too.
        concept: What it is, in words.
        feature: The SAE's feature that it describes.
        genre: "text", "math" or "code".
        positives: Training texts with the concept.
        negatives: Training texts without it, of its genre.
        evaluation: Texts that methods are read on: positives, negatives and hard negatives.
    """

    id: int
    concept: str
    feature: int
    genre: str
    positives: tuple[AxBenchText, ...]
    negatives: tuple[AxBenchText, ...]
    evaluation: tuple[AxBenchText, ...]

    def of(self, category: str) -> list[AxBenchText]:
        """The evaluation texts of a category."""
        return [text for text in self.evaluation if text.category == category]


@dataclass(frozen=True, repr=False)
class AxBenchData(OneLineRepr):
    """The concepts of a folder of AxBench, and the instructions that answers are written to.

    Attributes:
        name: What the folder is called.
        concepts: The concepts, by rising id.
        instructions: The instructions of AlpacaEval, or others.
        total: The number of concepts that the folder has.
    """

    name: str
    concepts: tuple[AxBenchConcept, ...]
    instructions: tuple[str, ...]
    total: int

    def limit(self, concepts: int) -> AxBenchData:
        """The first concepts alone. Raises DataError for fewer than one."""
        check_range("limit", concepts, 1, MAX_COUNT, whole=True)
        return replace(self, concepts=self.concepts[:concepts])

    @property
    def sha256(self) -> str:
        """Hash of all texts."""
        concepts = [
            [c.id, c.concept, c.feature, c.genre]
            + [[[t.input, t.output, t.category, t.losing] for t in part] for part in (c.positives, c.negatives)]
            + [[[t.input, t.output, t.category] for t in c.evaluation]]
            for c in self.concepts
        ]
        return text_sha256([concepts, self.instructions])


@checked
def load_axbench(folder: str | Path, *, instructions: str | Path | None = None) -> AxBenchData:
    """Load a folder of AxBench (arXiv 2501.17148): metadata, training texts, texts for detection, instructions.

    Args:
        folder: The folder, such as axbench/concept500/prod_2b_l10_v1.
        instructions: The file of instructions, alpaca_eval.json; by default the one in the folder, in its ``data``, or
            where AxBench's repository has it.

    Returns:
        The data, with every column checked.

    Raises:
        DataError: A file or a column is missing, a value cannot be used, or a concept lacks texts; the error names the
            file, the row and the field. A .parquet file needs pyarrow.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"There is no folder {folder}.", "a folder of AxBench with generate/metadata.jsonl")
    metadata = _find(folder, "generate", METADATA, (".jsonl",))
    training = _find(folder, "generate", TRAINING, TABLE_KINDS)
    evaluation = _find(folder, "inference", EVALUATION, TABLE_KINDS)
    asked = _instructions(_instructions_path(folder) if instructions is None else Path(instructions))
    entries = _metadata(metadata)
    train_rows = list(_rows(training, COLUMNS, (LOSING,)))
    evaluated = list(_rows(evaluation, EVALUATION_COLUMNS))
    concepts = tuple(
        _concept(number, *entries[number], train_rows, evaluated, (training, evaluation)) for number in sorted(entries)
    )
    return AxBenchData(folder.name, concepts, tuple(asked), len(concepts))


def _find(folder: Path, part: str, name: str, kinds: Sequence[str]) -> Path:
    """Find a file of a folder. Raises DataError where it is not there, or needs a package that is not."""
    places = [place / f"{name}{kind}" for place in (folder / part, folder) for kind in kinds]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(
            f"{folder} has no {name}.",
            " or ".join(str(place.relative_to(folder)) for place in places),
            "name the folder that holds generate and inference, such as concept500/prod_2b_l10_v1",
        )
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise DataError(
            f"{path} needs pyarrow, which is not installed.",
            change="install it with pip install 'fgsteer[axbench]', or convert the file to .jsonl",
        )
    return path


def _instructions_path(folder: Path) -> Path:
    places = [at / f"{INSTRUCTIONS}.json" for at in (folder, folder / "data", *(p / "data" for p in folder.parents))]
    for place in places[: 2 + 3]:
        if place.is_file():
            return place
    raise DataError(
        f"{folder} has no {INSTRUCTIONS}.json.",
        "the instructions of AlpacaEval: a JSON list of objects with the field 'instruction'",
        "pass instructions= (to the command --instructions), the path of that file",
    )


def _instructions(path: Path) -> list[str]:
    """The instructions of a file. Raises DataError."""
    return [_text(_fields(row, where, ("instruction",)), "instruction", where) for where, row in read_rows(path)]


def _fields(row: object, where: str, columns: Sequence[str]) -> Mapping[str, Any]:
    """Return a row that has these fields. Raises DataError."""
    if not isinstance(row, Mapping):
        raise DataError(f"{describe_value(row)} in {where}", f"an object with the fields {', '.join(columns)}")
    if missing := [name for name in columns if name not in row]:
        raise DataError(
            f"{where}, which lacks {', '.join(missing)} and has {', '.join(map(str, row)) or 'nothing'}",
            f"the columns {', '.join(columns)}",
        )
    return row


def _text(row: Mapping[str, Any], field: str, where: str, *, empty: bool = False) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{describe_value(value)} in {where}, field {field!r}", "a text")
    return str(check_text(value, f"{where}, field {field!r}", empty=empty))


def _number(row: Mapping[str, Any], field: str, where: str, least: int = 0) -> int:
    value = row[field]
    if isinstance(value, float) and value.is_integer():  # a column with gaps
        value = int(value)
    if not is_whole_number(value) or not least <= value <= MAX_COUNT:
        raise DataError(f"{describe_value(value)} in {where}, field {field!r}", f"a whole number from {least}")
    return int(value)


def _metadata(path: Path) -> dict[int, tuple[str, int, str]]:
    """(concept, feature, genre) by id. Raises DataError."""
    entries: dict[int, tuple[str, int, str]] = {}
    for where, line in read_rows(path):
        row = _fields(line, where, ("concept_id", "concept", "ref", "concept_genres_map"))
        number, concept = _number(row, "concept_id", where), _text(row, "concept", where)
        if number in entries:
            raise DataError(f"concept_id {number} twice, the second time in {where}", "each concept once")
        ending = _text(row, "ref", where).rsplit("/", 1)[-1]
        if not (ending.isascii() and ending.isdigit() and len(ending) < 16):
            raise DataError(
                f"{row['ref']!r:.80} in {where}, field 'ref'", "an address that ends in the number of an SAE's feature"
            )
        genres = row["concept_genres_map"]
        genre = genres.get(concept) if isinstance(genres, Mapping) else None
        genre = genre[0] if isinstance(genre, list) and genre else genre
        if not isinstance(genre, str):
            raise DataError(
                f"{describe_value(genres)} in {where}, field 'concept_genres_map'", "an object {concept: [genre]}"
            )
        entries[number] = (concept, int(ending), genre)
    if not entries:
        raise DataError(f"{path} holds no concept.", "an object on each line")
    return entries


Row = tuple[str, int, str, AxBenchText]  # where it is, the concept's id, the genre, and the text


def _rows(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Iterator[Row]:
    """The rows of a table. Raises DataError naming the row and the field."""
    for where, line in read_rows(path, (*columns, *optional)):
        row = _fields(line, where, columns)
        number = _number(row, "concept_id", where, SHARED_ID)
        if row["category"] not in CATEGORIES:
            raise DataError(
                f"{describe_value(row['category'])} in {where}, field 'category'", f"one of {', '.join(CATEGORIES)}"
            )
        if "sae_id" in columns:
            _number(row, "sae_id", where)
        losing = _text(row, LOSING, where) if row.get(LOSING) is not None and LOSING in optional else None
        text = AxBenchText(_text(row, "input", where), _text(row, "output", where), row["category"], losing)
        yield where, number, _text(row, "concept_genre", where), text


def _concept(
    number: int,
    concept: str,
    feature: int,
    genre: str,
    training: Sequence[Row],
    evaluated: Sequence[Row],
    paths: tuple[Path, Path],
) -> AxBenchConcept:
    """Put a concept's texts together. Raises DataError for one that lacks texts of a kind."""
    positives = tuple(t for _, at, _, t in training if at == number and t.category == POSITIVE)
    negatives = tuple(
        t
        for _, at, kind, t in training
        if t.category == NEGATIVE and (at == number or (at == SHARED_ID and kind == genre))
    )
    evaluation = tuple(t for _, at, _, t in evaluated if at == number)
    read = {text.category for text in evaluation}
    for what, there, path in (
        ("training text with it", positives, paths[0]),
        (f"training text of genre {genre!r} without it", negatives, paths[0]),
        ("positive row", POSITIVE in read, paths[1]),
        ("negative row", NEGATIVE in read, paths[1]),
    ):
        if not there:
            raise DataError(
                f"{path}, which has no {what} for concept {number}, {concept!r:.60}",
                "positives and negatives of every concept of metadata.jsonl",
                "pass the whole file, or leave the concept out of metadata.jsonl",
            )
    return AxBenchConcept(number, concept, feature, genre, positives, negatives, evaluation)
