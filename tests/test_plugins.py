"""Plugins: modules of other packages, named by entry points, that add to fgsteer's tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import fgsteer as fg
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

TOY_JOB = """
import json, sys
from pathlib import Path
import torch
from typer.testing import CliRunner
import fgsteer as fg
from tests.helpers.cli import app
from tests.helpers.tiny import tiny_model, word_tokenizer

class LengthJudge:
    name = "length"
    def score(self, texts, concept):
        return torch.tensor([min(1.0, len(text) / 100) for text in texts], dtype=torch.float64)

folder = Path(sys.argv[1])
run = lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
told = {command: run(command, "--help").stdout for command in ("build", "bench", "sweep")}
run("build", "toy", "--stats", folder / "stats", "--set", "size=2.5", "-o", folder / "vector")
model, tokenizer = tiny_model("llama"), word_tokenizer()
sides = {"positives": ["the bride wore a ring", "the king"], "negatives": ["a dog sat", "a cat ran"]}
data = fg.ContrastSet("x", **sides, held_out=fg.ContrastSet("y", **sides))
swept = fg.sweep(model, tokenizer, data, vectors="toy", layers=[0], coefficients=[0.1], controls=0, neutral=["the man"])
told["sweep method"], told["sweep cells"] = swept.method, len(swept.cells)
plan = fg.BenchPlan(("x",), methods=("unsteered", "caa", "toy"), layers=(0,), ce_rises=(0.001, 0.002), matched=None,
    prompts=2, texts=2, max_new_tokens=3, neutral=("the man sat", "a cat ran"),
    own_prompts=("the man", "a dog", "the old king", "a queen"))
assert "toy" in fg.BenchPlan(("x",), layers=(0,)).methods
fg.Bench(model, tokenizer, {}, {}, LengthJudge(), plan, contrasts=[data]).run(folder / "run.jsonl")
run = fg.load_run(folder / "run.jsonl")
fg.write_report(run, folder / "report.html")
told |= {"methods": run.methods, "report": (folder / "report.html").read_text()}
print(json.dumps(told))
"""


def test_a_method_of_one_file_outside_is_known_wherever_methods_are(tmp_path):
    install_plugin(tmp_path, "toy_methods", TOY)
    light = (
        "import sys\nfrom fgsteer.cli import main\ntry: main()\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    assert "toy" in run_with_plugin(tmp_path, "-c", light, "build", "--help").stdout
    g = np.random.default_rng(0)
    positive, negative = g.normal(0.1, 1, (9, 8)), g.normal(0, 1, (7, 8))
    contrast = fg.Contrast(*(fg.Moments.of(torch.as_tensor(side)) for side in (positive, negative)))
    fg.ContrastStatistics({fg.Hookpoint(1): contrast}).save(tmp_path / "stats")

    result = run_with_plugin(tmp_path, "-c", TOY_JOB, tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout)

    vector = fg.SteeringVector.load(tmp_path / "vector")
    means = [[sum(row[d] for row in side) / len(side) for d in range(8)] for side in (positive, negative)]
    assert vector.direction.tolist() == [2.5 if up > down else -2.5 for up, down in zip(*means, strict=True)]
    for command in ("build", "bench", "sweep"):
        assert "toy" in told[command]
    assert (told["sweep method"], told["sweep cells"]) == ("toy", 2)
    assert told["methods"] == ["unsteered", "caa", "toy"]
    assert '<th scope="row">Toy signs</th>' in told["report"]
    assert "<!-- Toy signs -->" in told["report"]  # which matplotlib writes beside the shapes of a label's letters
