"""The command line as a person meets it: its version, completion in a shell, a summary of files on one screen."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import fgsteer as fg
from tests.helpers.cli import invoke

# a shell asks what can stand at the end of a command line; that must not take as long as importing torch does
COMPLETE = """
import os, sys
from fgsteer.cli import main
os.environ.update(_FGSTEER_COMPLETE="complete_zsh", _TYPER_COMPLETE_ARGS=sys.argv[1])
sys.argv = ["fgsteer"]
try:
    main()
finally:
    assert "torch" not in sys.modules
"""


def completed(line):
    return subprocess.run([sys.executable, "-c", COMPLETE, line], capture_output=True, text=True, check=False).stdout


def test_version():
    assert invoke("--version").stdout == f"fgsteer {fg.__version__}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("fgsteer ge", ["generate"]),
        ("fgsteer build fg", ["fgaa"]),
        ("fgsteer generate --op ", ["add", "affine", "ablate", "clamp"]),
        ("fgsteer generate --scope re", ["reply"]),
        ("fgsteer collect --tokens ", ["all", "last", "answer", "letter", "tail"]),
        ("fgsteer export --to g", ["gguf"]),
    ],
)
def test_shells_complete_commands_and_names(line, words):
    shown = completed(line)
    for word in words:
        assert f'"{word}"' in shown, shown
    assert '"density"' not in shown  # another command, which none of the lines begins


def test_the_list_of_commands_cuts_no_sentence_short():
    commands = invoke("--help").stdout.partition("Commands:")[2].strip().splitlines()
    assert len(commands) > 10
    assert all(line.endswith(".") and not line.endswith("...") for line in commands), commands


def test_completion_can_be_installed():
    assert "--install-completion" in invoke("--help").stdout


def test_info_of_a_file_fits_on_a_screen(tmp_path):
    path = tmp_path / "vector.safetensors"
    provenance = {
        "method": "fgaa",
        "hyperparameters": {"n_positive": 16, "mu": None},
        "sae": {"source": "a folder", "sha256": "3f" * 32},
        "data": [{"name": "love", "count": [40, 41]}],
        "feature_labels": {str(n): f"label {n}\x1b[2J" for n in range(900)},
    }
    features = {n: n / 7 for n in range(900)}
    fg.SteeringVector(torch.ones(8), 1, features=features, provenance=provenance).save(path)
    lines = invoke("info", path).stdout.splitlines()
    assert lines[0] == f"{path}: vector, written by fgsteer"
    facts = dict(line.split(maxsplit=1) for line in lines[1:-1])
    assert facts["features"].startswith("899: 128.4, 898: 128.3, ")
    assert facts["hyperparameters"] == "n_positive: 16"
    assert facts["sae"] == f"source: a folder, sha256: {'3f' * 6}"
    assert facts["data"] == "name: love, count: 40; 41"
    assert facts["direction"] == "8"
    assert facts["feature_labels"].startswith(r"0: label 0\x1b[2J, ")
    assert max(map(len, lines[1:-1])) < 130
    assert lines[-1] == f"fgsteer info {path} --json tells everything"
    assert len(json.loads(invoke("info", path, "--json").stdout)["features"]) == 900


def test_info_of_the_installation_fits_on_a_screen():
    shown = invoke("info").stdout
    assert f"fgsteer       {fg.__version__}\n" in shown
    assert "caa, ace" in shown
    assert len(shown.splitlines()) < 15
