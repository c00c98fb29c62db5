"""Plugins: modules of other packages, named by entry points, that add to fgsteer's tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fgsteer as fg
from fgsteer.methods import MethodSpec, register, table
from tests.helpers.cli import invoke
from tests.helpers.plugins import install_plugin

ROOT = Path(fg.__file__).resolve().parent.parent


def run_with_plugin(folder, *arguments):
    """Run Python with the folder's plugins."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], check=False, capture_output=True, text=True, env=environment
    )


def test_a_plugin_is_imported_once_and_may_ask_for_the_plugins(tmp_path):
    install_plugin(
        tmp_path,
        "counting",
        "from fgsteer.storage.plugins import load_plugins\nload_plugins()\nprint('imported')\n",
    )
    code = "from fgsteer.storage.plugins import load_plugins\nload_plugins()\nload_plugins()\n"
    result = run_with_plugin(tmp_path, "-c", code)
    assert result.stdout == "imported\n", result.stderr


def test_a_plugin_that_fails_is_named(tmp_path):
    install_plugin(tmp_path, "broken", "import a_module_that_is_nowhere\n")
    code = (
        "import fgsteer as fg\nfrom fgsteer.storage.plugins import load_plugins\n"
        "for _ in range(2):\n    try: load_plugins()\n    except fg.PluginError as error: print(error)\n"
    )
    result = run_with_plugin(tmp_path, "-c", code)
    lines = result.stdout.splitlines()
    assert len(lines) == 2, result.stderr
    for line in lines:
        assert "The plugin 'broken' cannot be imported" in line
        assert "No module named 'a_module_that_is_nowhere'" in line
        assert "'fgsteer.plugins'" in line
    for arguments, status in ((["--help"], 0), (["build", "--help"], 2)):
        result = run_with_plugin(tmp_path, "-m", "fgsteer", *arguments)
        assert result.returncode == status
        assert result.stderr.startswith("error: The plugin 'broken'" if status else "")
        assert "Traceback" not in result.stderr


TOY = '''
"""A method in one file of another package."""

from fgsteer.methods import MethodSpec, register


def sign_of_difference(stats, *, hookpoint=None, size: float = 1.0):
    """``v = size · sign(mean(h⁺) − mean(h⁻))``."""
    import fgsteer as fg

    at, contrast = stats.at("residual", hookpoint)
    return fg.SteeringVector(size * contrast.difference.sign().float(), at, provenance={"method": "toy"})


register(
    MethodSpec(
        "toy",
        "Toy signs",
        "The sign of the difference of means.",
        function=sign_of_difference,
        needs="layer",
        offered=("build", "bench", "sweep"),
    )
)
'''


class LengthJudge:
    """Judges by length."""

    name = "length"

    def score(self, texts, concept):
        return torch.tensor([min(1.0, len(text) / 100) for text in texts], dtype=torch.float64)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of a package whose plugin is loaded with the next look into a table, and forgotten after the test."""
    install_plugin(tmp_path, "toy_methods", TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("fgsteer.storage.plugins._Loading.begun", False)
    monkeypatch.setattr("fgsteer.methods.table._rows", dict(table._rows))
    yield tmp_path
    sys.modules.pop("toy_methods", None)


def test_help_lists_a_method_of_another_package_without_torch(toy):
    code = "import sys\nfrom fgsteer.cli import main\ntry: main()\nexcept SystemExit: assert 'torch' not in sys.modules"
    result = run_with_plugin(toy, "-c", code, "build", "--help")
    assert result.returncode == 0, result.stderr
    assert "toy" in result.stdout
    for command in ("build", "bench", "sweep"):
        assert "toy" in invoke(command, "--help").stdout


def test_a_method_of_one_file_outside_is_built_by_its_name(toy):
    g = np.random.default_rng(0)
    positive, negative = g.normal(0.1, 1, (9, 8)), g.normal(0, 1, (7, 8))
    contrast = fg.Contrast(*(fg.Moments.of(torch.as_tensor(side)) for side in (positive, negative)))
    stats = fg.ContrastStatistics({fg.Hookpoint(1): contrast})
    stats.save(toy / "stats")
    means = [[sum(row[d] for row in side) / len(side) for d in range(8)] for side in (positive, negative)]
    expected = [2.5 if up > down else -2.5 for up, down in zip(*means, strict=True)]
    assert fg.build("toy", stats=stats, size=2.5).direction.tolist() == expected
    assert fg.METHODS["toy"](stats, size=2.5).direction.tolist() == expected
    invoke("build", "toy", "--stats", toy / "stats", "--set", "size=2.5", "-o", toy / "vector")
    assert fg.SteeringVector.load(toy / "vector").direction.tolist() == expected
    with pytest.raises(fg.DataError, match="Expected a number as size, got --set size=big"):
        invoke("build", "toy", "--set", "size=big", "-o", toy / "vector")


def test_a_method_of_one_file_outside_is_swept_benchmarked_and_reported(toy, llama, tokenizer):
    sides = {"positives": ["the bride wore a ring", "the king"], "negatives": ["a dog sat", "a cat ran"]}
    data = fg.ContrastSet("x", **sides, held_out=fg.ContrastSet("y", **sides))
    swept = fg.sweep(
        llama, tokenizer, data, vectors="toy", layers=[0], coefficients=[0.1], controls=0, neutral=["the man"]
    )
    assert (swept.method, len(swept.cells)) == ("toy", 2)
    assert "toy" in fg.BenchPlan(("x",), layers=(0,)).methods
    plan = fg.BenchPlan(
        ("x",),
        methods=("unsteered", "caa", "toy"),
        layers=(0,),
        ce_rises=(0.001, 0.002),
        matched=None,
        prompts=2,
        texts=2,
        max_new_tokens=3,
        neutral=("the man sat", "a cat ran"),
        own_prompts=("the man", "a dog", "the old king", "a queen"),
    )
    fg.Bench(llama, tokenizer, {}, {}, LengthJudge(), plan, contrasts=[data]).run(toy / "run.jsonl")
    run = fg.load_run(toy / "run.jsonl")
    assert run.methods == ["unsteered", "caa", "toy"]
    fg.write_report(run, toy / "report.html")
    page = (toy / "report.html").read_text(encoding="utf-8")
    assert '<th scope="row">Toy signs</th>' in page
    assert "<!-- Toy signs -->" in page  # which matplotlib writes beside the shapes of a label's letters


def test_a_name_is_taken_once():
    mine = MethodSpec("caa", "Mine", "Another one.", function=fg.caa, needs="layer", offered=("build",))
    with pytest.raises(fg.PluginError, match="named 'caa' is in the table already"):
        register(mine)
    register(table.spec("caa"))  # the same row again, as when a module is loaded twice
    assert fg.METHODS["caa"] is fg.caa


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "My method"}, "Expected lower-case letters.*got name='My method'"),
        ({"label": " "}, "Expected a text as the label"),
        ({"needs": "magic"}, "one of 'nothing', 'layer', 'sae', 'effects'"),
        ({"operation": "multiply"}, "one of 'add', 'affine'"),
        ({"offered": ("build", "demo")}, "one of 'build', 'bench', 'sweep'"),
        ({"function": ""}, "a function for the method 'mine'"),
        ({"needs": "sae"}, 'Expected needs="layer".*got needs=\'sae\'.*leave "sweep" out'),
    ],
)
def test_rows_that_cannot_be_are_refused(change, message):
    row = {"name": "mine", "label": "Mine", "summary": "It does.", "function": "mine:build", "needs": "layer"}
    with pytest.raises(fg.ArgumentError, match=message):
        MethodSpec(**{**row, "offered": ("build", "sweep"), **change})
    with pytest.raises(fg.PluginError, match="'mine:build' of the method 'mine' cannot be imported: No module named"):
        MethodSpec(**row).load()
