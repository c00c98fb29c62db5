"""What the repository says of itself agrees: versions, workflows, the Makefile, the changelog, CONTRIBUTING.md."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]  # of keepachangelog.com


def targets():
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.M))


def test_the_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = PROJECT["project"]
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert citation["license"] == project["license"]
    assert citation["authors"]


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
    assert set(re.findall(r"^\| `(\w+)` \|", CONTRIBUTING, re.M)) == markers
    paths = re.findall(r"`((?:tests|benchmarks|pretrained|\.?[a-z]+)/[\w./]*)`", CONTRIBUTING)
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "fgsteer" / path).exists(), path


def test_the_changelog_keeps_its_headings():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    releases = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert releases[0] == "[Unreleased]"
    for release in releases[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", release), release
    assert {line.removeprefix("### ") for line in lines if line.startswith("### ")} <= set(KINDS)
