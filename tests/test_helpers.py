"""The tests' own house: what tests share lies in tests/helpers, and no test is imported."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent


def is_test(module: str) -> bool:
    return bool(re.search(r"(^|\.)(test_\w+|conftest)(\.|$)", module))


def imported(tree: ast.AST):
    """Every module, or name of a module, that some code imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_test_is_imported_by_a_test_or_helper():
    for path in TESTS.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        from_tests = [name for name in imported(ast.parse(text)) if name.startswith(("tests", "."))]
        # scripts that tests run in other processes stand in strings
        from_tests += re.findall(r"^\s*(?:from|import) (tests[\w.]*)", text, re.M)
        assert not [name for name in from_tests if is_test(name)], path


def test_helpers_hold_no_tests():
    for path in (TESTS / "helpers").rglob("*.py"):
        assert not path.name.startswith("test_"), path
        names = [n.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if hasattr(n, "name")]
        assert not [name for name in names if name and name.lower().startswith("test")], path
