"""The lowest versions that are tested are those that are declared."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
TOOLS = ("basedpyright", "mypy", "ruff")  # run once, with the newest


def pinned():
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    return {r.name: r for r in map(Requirement, (line for line in lines if line and not line.startswith("#")))}


def test_the_lowest_versions_are_the_declared_minimums():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["test"]])
    pins = pinned()
    for wanted in declared:
        if wanted.name in TOOLS:
            continue
        (lowest,) = (s.version for s in wanted.specifier if s.operator == ">=")
        tested = pins[wanted.name].specifier
        assert lowest in tested, f"{wanted.name}: {lowest} is declared, {tested} is tested"  # 8.3 is 8.3.0
