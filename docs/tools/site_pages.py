"""Pages of the documentation site that are made from the code and from other files of the repository.

mkdocs runs this as a hook (mkdocs.yml). What is generated is never committed, so that it cannot be out of date:
the API reference from the docstrings of ``fgsteer.__all__``, the command-line reference from the Typer application,
the tables that a page asks for by ``<!-- generated: NAME -->``, and copies of CHANGELOG.md and its like.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

import fgsteer

ROOT = Path(__file__).resolve().parents[2]
STUB = ast.parse(Path(fgsteer.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
MODULE_OF = {name.name: node.module for node in STUB.body if isinstance(node, ast.ImportFrom) for name in node.names}

# Files of the repository that are pages of the site: source, page.
COPIES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "pretrained/README.md": "default.md",
}
# Files of the repository that pages link to or show: folder, names, folder of the site.
RESULTS = ("benchmarks/results", ("report.html", "methods.svg", "coefficients.svg", "concepts.svg"), "assets/results")

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
    "features": "Features",
    "evaluation": "Evaluation",
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
    lines += [f"| [`{name}`](#fgsteer-{name}) | {first(command.help)} |" for name, command in commands.items()]
    for name, command in commands.items():
        context = typer.Context(command, info_name=f"fgsteer {name}")
        usage = " ".join(["fgsteer", name, *command.collect_usage_pieces(context)])
        lines += ["", f"## fgsteer {name}", "", command.help, "", "```text", usage, "```", ""]
        lines += ["| argument or option | what it means |", "|---|---|"]
        for parameter in command.get_params(context):
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


def registry_table() -> str:
    """How many SAEs sae-lens's registry lists, by model."""
    rows = fgsteer.registry()
    releases: dict[str, set[str]] = {}
    for row in rows:
        releases.setdefault(row.model, set()).add(row.release)
    saes = Counter(row.model for row in rows)
    lines = ["| model | releases | SAEs |", "|---|---:|---:|"]
    lines += [f"| `{model}` | {len(releases[model])} | {saes[model]} |" for model in sorted(saes)]
    return "\n".join(lines)


def contrasts_table() -> str:
    """The shipped contrast sets."""
    lines = ["| name | behavior | positives, negatives | held out |", "|---|---|---|---|"]
    for name in fgsteer.shipped_contrasts():
        contrast = fgsteer.load_contrast(name)
        held = contrast.held_out
        sizes = [f"{len(one.positives)}, {len(one.negatives)}" if one else "none" for one in (contrast, held)]
        lines.append(f"| `{name}` | {contrast.description} | {sizes[0]} | {sizes[1]} |")
    return "\n".join(lines)


def errors_table() -> str:
    """Every exception and warning, with its bases and what it means."""
    lines = ["| name | is also | raised when |", "|---|---|---|"]
    for name in grouped()["errors"]:
        bases = ", ".join(f"`{base.__name__}`" for base in getattr(fgsteer, name).__bases__)
        lines.append(f"| [`fg.{name}`][fgsteer.{name}] | {bases} | {summary(name)} |")
    return "\n".join(lines)


def scores_table() -> str:
    """The named selection scores."""
    rows = [f"| `{name}` | {first(score.__doc__)} |" for name, score in fgsteer.SCORES.items()]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def methods_table() -> str:
    """Every method of ``build`` and what it is."""
    rows = [f"| [`{name}`][fgsteer.{name}] | {summary(name)} |" for name in fgsteer.METHODS]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


TABLES: dict[str, Callable[[], str]] = {
    "registry": registry_table,
    "contrasts": contrasts_table,
    "errors": errors_table,
    "scores": scores_table,
    "methods": methods_table,
}
MARK = re.compile(r"<!-- generated: ([a-z]+) -->")


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
    folder, names, target = RESULTS
    for name in names:
        files.append(File.generated(config, f"{target}/{name}", abs_src_path=str(ROOT / folder / name)))
    return files


def rebased(text: str, source: str) -> str:
    """Links of a file of the repository, as they are from the site's front page."""
    homes = {name: page for name, page in COPIES.items() if (ROOT / name).exists()}

    def link(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        whole = target if source.count("/") == 0 else f"{source.rpartition('/')[0]}/{target}"
        if target in homes or whole in homes:
            return f"]({homes.get(target) or homes[whole]}{anchor})"
        if target == "README.md":
            return f"](index.md{anchor})"
        return f"]({target.removeprefix('docs/')}{anchor})"

    return re.sub(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", link, text)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables."""
    return MARK.sub(lambda mark: TABLES[mark[1]](), markdown)
