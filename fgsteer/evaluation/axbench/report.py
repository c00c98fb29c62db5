"""The result of a run of AxBench: a table in Markdown, and JSON.

result = load_axbench_result("run/results.json")
print(result.table)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgsteer.errors.checks import checked
from fgsteer.errors.reprs import short_repr
from fgsteer.errors.wording import count
from fgsteer.evaluation.axbench.contestants import contestant
from fgsteer.evaluation.axbench.folders import RESULTS, TABLE
from fgsteer.evaluation.axbench.published import COLUMNS, DETECTION, PublishedColumn, column_of, verdict
from fgsteer.models.names import bare_name
from fgsteer.storage.atomic import atomic_write
from fgsteer.storage.files import refuse_damaged
from fgsteer.storage.json_files import read_json, write_json


@dataclass(frozen=True, repr=False)
class AxBenchResult:
    """What a run found.

    Attributes:
        content: All of it, as plain JSON: model, hookpoint, judge, plan, and for each method scores with their 95 %
            intervals over concepts, ratings, detection, and every concept's chosen factor.
    """

    content: Mapping[str, Any]

    def __repr__(self) -> str:
        content = self.content
        names = {name: short_repr(str(content[name] or "none")) for name in ("data", "judge")}
        return (
            f"AxBenchResult({count(len(content['methods']), 'method')}, {count(content['concepts'], 'concept')} of "
            f"{names['data']}, model {short_repr(bare_name(content['model']))}, judge {names['judge']})"
        )

    @property
    def scores(self) -> dict[str, float | None]:
        """The mean score of each method on the instructions that report; None without a judge."""
        return {row["method"]: row["score"] and row["score"]["mean"] for row in self.content["methods"]}

    @property
    def verdict(self) -> str:
        """Whether the published figures may be compared with these, and why not."""
        return verdict(self.content)

    @property
    def table(self) -> str:
        """The result in Markdown: what was run, a row for each method, and the published figures beside them."""
        content = self.content
        lines = [*_about(content), "", *_rows(content), "", self.verdict]
        lines += [
            "",
            "Published (arXiv 2501.17148, RePS 2505.20809): Gemma-2-it of 2B at layers 10 and 20 and of 9B at layers "
            "20 and 31, judged by gpt-4o-mini.",
        ]
        return "\n".join(lines) + "\n"

    def save(self, folder: str | Path) -> None:
        """Write results.json and table.md to a folder. Raises FormatError where they cannot be written."""
        write_json(Path(folder) / RESULTS, dict(self.content))
        with atomic_write(Path(folder) / TABLE) as temporary:
            temporary.write_text(self.table, encoding="utf-8")


@checked
def load_axbench_result(path: str | Path) -> AxBenchResult:
    """Load what a run of ``axbench`` found.

    Args:
        path: Its folder, or the file results.json in it.

    Raises:
        FormatError: The file is missing, or damaged.
    """
    path = Path(path) / RESULTS if Path(path).is_dir() else Path(path)
    content = read_json(path)
    with refuse_damaged(path, "results.json of fgsteer axbench"):
        result = AxBenchResult(content)
        repr(result), result.table, result.scores
    return result


def _about(content: Mapping[str, Any]) -> list[str]:
    """What was run, in a few sentences."""
    plan, judge = content["plan"], content["judge"]
    subject = f"{count(content['concepts'], 'concept')} of {content['data']}"
    place = f"in {bare_name(content['model'])} at {content['hookpoint']}"
    if all(row["perplexity"] is None for row in content["methods"]):
        return [f"{subject}, detected {place}; no answers were written."]
    verb = "added" if plan["mode"] == "steer" else "suppressed"
    sentences = [
        f"{subject} {verb} {place}; {content['chosen_on']} of {plan['instructions']} instructions choose a concept's "
        f"factor, the others report; {len(plan['factors'])} factors, {plan['max_new_tokens']} tokens, temperature "
        f"{plan['temperature']:g}."
    ]
    if judge is None:
        return [*sentences, "No judge: detection and perplexity alone."]
    sentences.append(f"Judge: {judge}. Scores and ratings are from 0 to 2; intervals are 95 % over concepts.")
    if area := content["judge_facts"].get("auroc"):
        lowest = content["judge_facts"]["lowest_auroc"]
        sentences.append(
            f"This judge tells training texts with the concept from others, which it never saw, with AUROC {area:.3f} "
            f"on average and {lowest:.3f} for the concept where it is worst."
        )
    return [" ".join(sentences)]


def _rows(content: Mapping[str, Any]) -> list[str]:
    """The table, best score first, or without scores best detection first; columns without a figure are left out.

    Published scores stand beside scores alone: beside detection they would be read as published detection.
    """
    own = column_of(content["model"], content["layer"])
    columns = [own] if own else list(COLUMNS)
    columns = columns if any(row["score"] for row in content["methods"]) else []
    table = [_cells(row, columns) for row in sorted(content["methods"], key=_standing, reverse=True)]
    shown = [name for name in table[0] if any(cells[name] for cells in table)]
    lines = [f"| {' | '.join(shown)} |", "|---" * len(shown) + "|"]
    return lines + [f"| {' | '.join(cells[name] for name in shown)} |" for cells in table]


def _standing(row: Mapping[str, Any]) -> tuple[float, float]:
    return (row["score"]["mean"] if row["score"] else -1.0, row["detection"]["auroc"] if row["detection"] else -1.0)


def _cells(row: Mapping[str, Any], columns: Sequence[PublishedColumn]) -> dict[str, str]:
    """A method's figures by heading."""
    ratings, found, published = row["ratings"] or {}, row["detection"] or {}, row["published"]
    return {
        "method": row["label"],
        "score [95 %]": _interval(row["score"]),
        **{name: _number(ratings.get(name)) for name in ("concept", "instruction", "fluency")},
        "perplexity": _number(row["perplexity"], 1),
        "AUROC": _number(found.get("auroc")),
        "without hard negatives": _number(found.get("auroc_plain")),
        "accuracy": _number(found.get("hard_average")),
        **{f"published score, {column.name}": _number(published["scores"].get(column.name)) for column in columns},
        "published AUROC": _number(published["auroc"]),
    }


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _interval(score: Mapping[str, float] | None) -> str:
    if score is None:
        return ""
    ends = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{score['mean']:.3f}{ends}"


def published_of(method: str) -> dict[str, Any]:
    """The published figures of a method, by column, and its published AUROC."""
    row = contestant(method)
    scores = {column.name: column.scores[row.published] for column in COLUMNS if row.published in column.scores}
    area = DETECTION.get(row.published or row.label) if row.space == "residual" else None
    return {"name": row.published if scores else "", "scores": scores, "auroc": area}


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the values that there are; None without any."""
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
