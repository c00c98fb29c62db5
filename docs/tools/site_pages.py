"""Pages of the documentation site that are made from the code and from other files of the repository.

mkdocs runs this as a hook (mkdocs.yml): it adds the API reference from the docstrings of ``fgsteer.__all__``, the
command-line reference from the Typer application, and copies of CHANGELOG.md and its like, none of which is committed.

    python docs/tools/site_pages.py     writes the tables between the marks of the pages, from the tables in the code
"""

from __future__ import annotations

import ast
import importlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import typer

import fgsteer
from fgsteer import methods
from fgsteer.cli.choices import with_choices
from fgsteer.evaluation.judges import table as judges
from fgsteer.export import table as exports
from fgsteer.interventions.table import INTERVENTIONS

ROOT = Path(__file__).resolve().parents[2]
STUB = ast.parse(Path(fgsteer.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
MODULE_OF = {name.name: node.module for node in STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}

# Files of the repository that are pages of the site: source, page.
COPIES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "pretrained/README.md": "default.md",
    "pretrained/organisms/README.md": "organisms.md",
    "pretrained/smollm2/README.md": "smollm2.md",
}
# Files of the repository that pages link to or show: by folder, names; and the folder of the site.
SHOWN = ("report.html", "methods.svg", "coefficients.svg", "concepts.svg", "answers.svg")
RESULTS = {"benchmarks/results": "assets/results", "benchmarks/results/smollm2": "assets/results/smollm2"}

# The pages of the API reference: the folders of the package in the order in which data flows, with their titles.
TITLES = {
    "data": "Data",
    "models": "Models and hookpoints",
    "saes": "SAEs",
    "activations": "Activations",
    "statistics": "Statistics",
    "vector": "Steering vectors",
    "interventions": "Interventions",
    "steering": "Steering and generation",
    "likelihood": "Likelihood and strength",
    "effects": "Effects",
    "methods": "Methods",
    "directions": "Refusal directions and cones",
    "transfer": "Transfer between models",
    "features": "Features",
    "selection": "Selection of features",
    "training": "Training of SAEs",
    "learning": "Training of vectors",
    "evaluation": "Evaluation",
    "authoring": "Contrast data",
    "conditional": "Conditional defences",
    "mechanisms": "What drives steering",
    "traces": "What steering did",
    "receipts": "Receipts",
    "export": "Exports",
    "errors": "Errors and warnings",
}


# ---------------------------------------------------------------- the API reference


def grouped() -> dict[str, list[str]]:
    """Every public name by the folder that it lives in; a folder without a title comes last, under its own name."""
    pages: dict[str, list[str]] = {folder: [] for folder in TITLES}
    for name in fgsteer.__all__:
        pages.setdefault(address(name).split(".")[1], []).append(name)
    return {folder: names for folder, names in pages.items() if names}


def address(name: str) -> str:
    """The module and name at which a public name is defined, wherever its module lies today."""
    return f"{MODULE_OF[name]}.{name}"


def summary(name: str) -> str:
    """The first sentence of a docstring; nothing for a constant, whose docstring is its type's."""
    value = getattr(fgsteer, name)
    return first(value.__doc__ if callable(value) else "")


def options(name: str) -> str:
    """What the entry of a name shows besides the rest: an error's bases, and a constant, which has no docstring."""
    value = getattr(fgsteer, name)
    if isinstance(value, type) and issubclass(value, BaseException):
        return "    options:\n      show_bases: true\n"
    return "" if callable(value) else "    options:\n      show_if_no_docstring: true\n"


def api_pages() -> dict[str, str]:
    """One page a group, and one that lists every name."""
    pages, index = {}, ["# API reference", "", "Every public name of `import fgsteer as fg`, by what it is for.", ""]
    for group, names in grouped().items():
        title = title_of(group)
        index += [f"## {title}", "", "| name | what it is |", "|---|---|"]
        index += [f"| [`fg.{name}`][fgsteer.{name}] | {summary(name)} |" for name in names] + [""]
        blocks = [f"[](){{ #fgsteer.{name} }}\n\n::: {address(name)}\n" for name in names]
        pages[f"reference/api/{group}.md"] = f"# {title}\n\n" + "\n".join(blocks)
    return {"reference/api/index.md": "\n".join(index) + "\n", **pages}


# ---------------------------------------------------------------- the command line


def cli_page() -> str:
    """Every command with its arguments and options, from the Typer application."""
    group = typer.main.get_command(importlib.import_module("fgsteer.cli").app)
    commands: dict[str, Any] = dict(sorted(getattr(group, "commands", {}).items()))
    lines = ["# Command line", "", str(group.help), "", "| command | what it does |", "|---|---|"]
    lines += [
        f"| [`{name}`](#fgsteer-{name}) | {first(with_choices(command.help))} |" for name, command in commands.items()
    ]
    for name, command in commands.items():
        context = typer.Context(command, info_name=f"fgsteer {name}")
        usage = " ".join(["fgsteer", name, *command.collect_usage_pieces(context)])
        lines += ["", f"## fgsteer {name}", "", command.help, "", "```text", usage, "```", ""]
        lines += ["| argument or option | what it means |", "|---|---|"]
        for parameter in command.get_params(context):
            parameter.help = with_choices(getattr(parameter, "help", None) or "")
            if (record := parameter.get_help_record(context)) is not None:
                lines.append(f"| `{record[0]}` | {cell(record[1])} |")
    return "\n".join(lines) + "\n"


def first(text: str | None) -> str:
    """The first paragraph of a text, as a cell of a table."""
    return cell((text or "").strip().split("\n\n")[0])


def cell(text: str) -> str:
    """A text on one line, with nothing in it that a table or HTML would take for its own."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


# ---------------------------------------------------------------- tables that a page asks for


def markdown(headings: str, rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; headings are parted by bars."""
    heads = headings.split(" | ")
    lines = [f"| {headings} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def registry_table() -> str:
    """How many SAEs sae-lens's registry lists, by model."""
    releases: dict[str, set[str]] = {}
    saes: Counter[str] = Counter()
    for row in fgsteer.registry():
        releases.setdefault(row.model, set()).add(row.release)
        saes[row.model] += 1
    return markdown(
        "model | releases | SAEs", ((f"`{model}`", len(releases[model]), saes[model]) for model in sorted(saes))
    )


def contrasts_table() -> str:
    """The shipped contrast sets, with their numbers of positives and negatives."""
    rows = []
    for name in fgsteer.shipped_contrasts() + fgsteer.shipped_contrasts(chat=True):
        contrast = fgsteer.load_contrast(name)
        sizes = [f"{one.count(True)}, {one.count(False)}" if one else "" for one in (contrast, contrast.held_out)]
        rows.append((f"`{name}`", contrast.description, *sizes))
    return markdown("name | behavior | positives, negatives | held out", rows)


def errors_table() -> str:
    """Every exception and warning, with its bases and what it means."""
    return markdown(
        "name | is also | means",
        (
            (f"`{name}`", ", ".join(f"`{base.__name__}`" for base in getattr(fgsteer, name).__bases__), summary(name))
            for name in grouped()["errors"]
        ),
    )


# What a method needs besides statistics or feature ids, in words.
NEEDS = {
    "nothing": "nothing",
    "layer": "a layer",
    "sae": "an SAE of the layer",
    "effects": "an SAE of the layer, and its effects",
}


def methods_table() -> str:
    """Every method and condition of the benchmark."""
    return markdown(
        "name | in tables and plots | what it does | needs | offered by | paper",
        (
            (
                f"`{row.name}`",
                row.label,
                cell(row.summary),
                NEEDS[row.needs],
                ", ".join(f"`{command}`" for command in row.offered),
                row.paper,
            )
            for row in methods.specs()
        ),
    )


def judges_table() -> str:
    """Every judge of behavior and of coherence."""
    return markdown(
        "score | name | what it does | needs",
        (
            (kind, f"`{row.name}`", cell(row.summary), f"`{row.needs}`" if row.needs else "")
            for kind in get_args(judges.Scores)
            for row in judges.specs(kind)
        ),
    )


def exports_table() -> str:
    """Every export."""
    return markdown(
        "format | for | expresses | refuses | how it is checked",
        (
            (f"`{row['name']}`", row["label"], row["expresses"], row["refuses"], row["checked by"])
            for row in exports.rows()
        ),
    )


def interventions_table() -> str:
    """Every kind of intervention."""
    return markdown(
        "intervention | h becomes | in words",
        (
            (
                f"`vec.{row.method}({row.amount}=…)`"
                if row.method
                else f"`vec.{row.name}({row.amount})`"
                if row.of_vector
                else f"`fg.{row.kind}(…)`",
                f"`{row.equation}`",
                row.summary,
            )
            for row in INTERVENTIONS
        ),
    )


SYSTEMS = Path(__file__).with_name("systems.jsonl")  # a system a line
UNMEASURED = "not measured yet"
BENCHMARKS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(r"\{([^{}]+?)(:\.\d+[fg%])?\}")


def systems() -> list[dict[str, Any]]:
    """The systems of papers, each with its functions, commands, page, tests, and file of results."""
    return [json.loads(line) for line in SYSTEMS.read_text(encoding="utf-8").splitlines()]


def systems_table() -> str:
    """Every system with what was measured, its functions, and its tests."""
    return markdown(
        "system | measured | functions and commands | tests",
        (
            (
                f"[{row['system']}](../{row['page']}) ([arXiv {row['paper']}](https://arxiv.org/abs/{row['paper']}))",
                measured(row),
                ", ".join(
                    [*(f"`fg.{name}`" for name in row["names"]), *(f"`fgsteer {name}`" for name in row["commands"])]
                ),
                ", ".join(f"`{path}`" for path in row["tests"]),
            )
            for row in systems()
        ),
    )


def measured(row: dict[str, Any]) -> str:
    """What was measured, with each ``{place:format}`` filled in from the file of results.

    A place is the keys and indices that lead to a figure of a JSON file, or a row's name and a column of a Markdown
    table, with slashes between them.
    """
    if row["results"] is None:
        return UNMEASURED
    file = BENCHMARKS / row["results"]
    content = file.read_text(encoding="utf-8")

    def fill(match: re.Match[str]) -> str:
        *keys, last = match[1].split("/")
        if file.suffix == ".md":
            line = next(line for line in content.splitlines() if line.startswith(f"| {keys[0]} |"))
            return line.split("|")[int(last) + 1].strip()
        value: Any = json.loads(content)
        for key in (*keys, last):
            value = value[int(key) if isinstance(value, list) else key]
        return format(value, (match[2] or ":")[1:]).replace("-", "−")

    return f"{FIGURE.sub(fill, row['measured'])} (`{row['results']}`)"


# Tables that stand in the pages, between marks; python docs/tools/site_pages.py writes them anew.
TABLES: dict[str, Callable[[], str]] = {
    "contrasts": contrasts_table,
    "errors": errors_table,
    "exports": exports_table,
    "interventions": interventions_table,
    "judges": judges_table,
    "methods": methods_table,
    "systems": systems_table,
}
MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.S)
REGISTRY = "<!-- registry -->"  # another one with every version of sae-lens: it is made when the site is built


def with_tables(text: str) -> str:
    """A page's text with its tables as they should be."""
    return MARKS.sub(lambda marks: f"{marks[1]}{TABLES[marks[2]]()}\n{marks[3]}", text)


# ---------------------------------------------------------------- mkdocs


def on_config(config: Any) -> Any:
    """Put the notebooks and the API's pages into the navigation; leave out what is not there."""
    notebooks = sorted(path.name for path in (ROOT / "docs" / "tutorials").glob("*.ipynb"))
    lists: dict[str, list[Any]] = {
        "tutorials/": [f"tutorials/{name}" for name in notebooks],
        "reference/api/": [page if "index" in page else {title_of(Path(page).stem): page} for page in api_pages()],
    }
    config.nav = [entry for entry in (expanded(entry, lists) for entry in config.nav) if entry is not None]
    if (ROOT / "CONTRIBUTING.md").exists():
        config.nav[-1]["Project"].append({"Contributing": "contributing.md"})
    return config


def title_of(group: str) -> str:
    """The title of a page of the API."""
    return TITLES.get(group, group.capitalize())


def expanded(entry: Any, lists: dict[str, list[Any]]) -> Any:
    """A navigation entry with its lists filled in; None where a list is empty."""
    if not isinstance(entry, dict):
        return entry
    ((title, value),) = entry.items()
    if isinstance(value, list):
        return {title: [inner for inner in (expanded(one, lists) for one in value) if inner is not None]}
    if value in lists:
        return {title: lists[value]} if lists[value] else None
    return entry


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and files that are not in docs/."""
    from mkdocs.structure.files import File  # here, so that tests read the tables without mkdocs

    pages = {**api_pages(), "reference/cli.md": cli_page()}
    for source, page in COPIES.items():
        if (ROOT / source).exists():
            pages[page] = rebased((ROOT / source).read_text(encoding="utf-8"), source)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    for folder, target in RESULTS.items():
        for name in SHOWN:
            files.append(File.generated(config, f"{target}/{name}", abs_src_path=str(ROOT / folder / name)))
    return files


def rebased(text: str, source: str) -> str:
    """Links of a file of the repository, as they are from the site's front page."""
    homes = {name: page for name, page in COPIES.items() if (ROOT / name).exists()}

    def link(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if page := "index.md" if path == "README.md" else homes.get(path):
            return f"[{label}]({page}{anchor})"
        if path.startswith("docs/"):
            return f"[{label}]({path.removeprefix('docs/')}{anchor})"
        return label  # a file that is not on the site

    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", link, text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the registry; the other tables stand in the pages."""
    return markdown.replace(REGISTRY, registry_table()) if REGISTRY in markdown else markdown


if __name__ == "__main__":
    for page in sorted((ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (made := with_tables(text)) != text:
            page.write_text(made, encoding="utf-8")
            print(page.relative_to(ROOT))
