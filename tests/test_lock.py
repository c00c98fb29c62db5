"""constraints.txt locks what make demo, test and docs install: whole, within pyproject's bounds, and installed here."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# pyarrow: a typed error says what to install; accelerate: asked only of models that it moved; starlette: vLLM's own;
# IPython: asked only in notebooks, which it runs; tokenizers: what transformers' fast tokenizers are made of
UNDECLARED = {"pyarrow", "accelerate", "starlette", "ipython", "tokenizers"}
# what torch brings on a platform with GPUs, and nowhere else
OF_A_BUILD = ("nvidia-", "cuda-", "triton", "pytorch-triton")


def name_of(requirement):
    return canonicalize_name(requirement.name)


def locked():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name_of(r): r for r in (Requirement(line) for line in lines if not line.startswith("#"))}


def version(pin):
    (found,) = pin.specifier
    return Version(found.version)


def test_every_line_is_one_version_of_a_package():
    """No addresses, no files, no builds of one platform."""
    for pin in locked().values():
        (found,) = pin.specifier
        assert found.operator == "=="
        assert pin.url is None
        assert pin.marker is None
        assert Version(found.version).local is None
        assert "*" not in found.version


def test_every_dependency_is_locked_within_its_bounds():
    pins = locked()
    for wanted in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["test"], *EXTRAS["docs"]]):
        assert version(pins[name_of(wanted)]) in wanted.specifier, wanted


def test_all_that_is_needed_is_locked_and_installed_as_locked():
    """What fgsteer and its tests need, what that needs, and so on, as the packages in this environment tell it."""
    pins, seen = locked(), set()
    left = list(map(Requirement, [*PROJECT["dependencies"], *EXTRAS["test"]]))
    while left:
        wanted = left.pop()
        if (key := (name_of(wanted), *wanted.extras)) in seen:
            continue
        seen.add(key)
        for further in map(Requirement, distribution(wanted.name).requires or []):
            if further.marker is None or any(further.marker.evaluate({"extra": e}) for e in wanted.extras or [""]):
                left.append(further)
    names = {name for name, *_ in seen if not name.startswith(OF_A_BUILD)}
    assert names - set(pins) == set(), "make lock, then make test"
    found = {name: Version(Version(distribution(name).version).public) for name in names}
    assert found == {name: version(pins[name]) for name in names}, "make test installs what is locked"


def test_what_is_imported_is_declared_and_the_other_way_round():
    """Else a package that another one happens to bring may go away, or stand here for nothing."""
    homes = packages_distributions()
    imported = set()
    for path in (ROOT / "fgsteer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {module.partition(".")[0] for module in modules}
    imported -= {*sys.stdlib_module_names, "fgsteer"}
    # a module of what is not installed here has its package's name
    packages = {canonicalize_name(homes.get(module, [module])[0]) for module in imported}
    declared = {name_of(Requirement(text)) for text in PROJECT["dependencies"]}
    extra = {name_of(Requirement(text)) for texts in EXTRAS.values() for text in texts}
    assert declared - packages == set()
    assert packages - declared - extra <= UNDECLARED
