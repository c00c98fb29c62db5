"""The table of exports: what it offers, what rows and options it refuses, and an export from outside in one file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fgsteer as fg
from fgsteer.export import ExportInputs, ExportOption, ExportSpec, register, rows, spec, specs
from tests.helpers.cli import click_group
from tests.helpers.plugins import install_plugin

ROOT = Path(fg.__file__).resolve().parent.parent
TOY = '''
"""An export from outside, in one file: norms of directions, as text."""
from fgsteer.errors import SteeringError
from fgsteer.export import ExportOption, ExportSpec, register
from fgsteer.storage.atomic import atomic_write


def write_norms(interventions, path, inputs):
    lines = []
    for item in interventions:
        if type(item).__name__ != "Add":
            raise SteeringError(type(item).__name__, "an Add")
        norm = float(item.coefficient * item.direction.norm())
        lines.append(f"{item.hookpoint} {norm:.{inputs.options['digits']}f}")
    with atomic_write(path) as temporary:
        temporary.write_text("\\n".join(lines))
    return [path]


register(
    ExportSpec(
        "norms",
        "A toy engine",
        writes="the norms of the directions",
        expresses="Add",
        refuses="everything else",
        exporter=write_norms,
        options=(ExportOption("digits", 2, "digits after the point"),),
    )
)
'''


def row(**fields):
    values = {"name": "x", "label": "X", "writes": "a file", "expresses": "Add", "refuses": "the rest", "exporter": ""}
    return ExportSpec(**{**values, **fields})


RUN = """
import contextlib, io, json, sys
from fgsteer.cli import main
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fgsteer", "export", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    answers.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
"""


def python_with(folder, *arguments):
    path = os.pathsep.join([str(folder), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "120"}
    return subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, env=environment)


def test_an_export_from_outside_in_one_file(tmp_path):
    """Help lists it, the command runs it with an option of its own, and what it cannot express is refused."""
    install_plugin(tmp_path, "toy_export", TOY)
    made, out = str(tmp_path / "v.safetensors"), tmp_path / "norms.txt"
    fg.SteeringVector(torch.tensor([3.0, 4.0]), fg.Hookpoint(1)).save(made)
    commands = [
        ["--help"],
        [made, "--to", "norms", "-c", "2", "--set", "digits=1", "-o", str(out), "--json"],
        [made, "--to", "norms", "--op", "ablate", "-o", str(out)],
    ]
    done = python_with(tmp_path, "-c", RUN, json.dumps(commands))
    told, written, refused = json.loads(done.stdout or done.stderr)
    assert "neuronpedia, norms." in told[1]
    assert "norms        the norms of the directions" in told[1]
    assert "norms: digits (digits after the point)" in " ".join(told[1].split())
    assert written[0] == 0, written
    assert json.loads(written[1])["files"] == [str(out)]
    assert out.read_text() == "blocks.1.hook_resid_post 10.0"
    assert (refused[0], refused[2]) == (2, "error: Expected an Add, got Ablate.\n")


def test_the_help_of_other_commands_loads_no_plugin(tmp_path):
    install_plugin(tmp_path, "loud", "raise RuntimeError('loaded')\n")
    assert python_with(tmp_path, "-m", "fgsteer", "--help").returncode == 0
    done = python_with(tmp_path, "-m", "fgsteer", "export", "--help")
    assert done.returncode == 2
    assert "The plugin 'loud' cannot be imported" in done.stderr


def test_every_row_has_its_module_and_its_words():
    assert [each["name"] for each in rows()] == [each.name for each in specs()]
    for each in specs():
        assert callable(each.load())
        assert each.checked_by
    [help_of_set] = [p.help for p in click_group().commands["export"].params if p.name == "settings"]
    assert "{export options}" in help_of_set  # filled in when help is shown


def test_a_row_that_cannot_be_is_refused():
    for fields in ({"name": "Two words"}, {"name": ""}, {"label": " "}, {"writes": ""}, {"refuses": ""}):
        with pytest.raises(fg.ArgumentError):
            row(**fields)
    with pytest.raises(fg.PluginError, match="in the table already"):
        register(row(name="gguf"))
    register(spec("gguf"))  # the same row twice is one row
    for nowhere in ("fgsteer.nowhere:write", "fgsteer.export.gguf:nothing", "gguf"):
        with pytest.raises(fg.PluginError, match="cannot be imported"):
            row(exporter=nowhere).load()
    with pytest.raises(fg.DataError, match=r"one of checkpoint.*got the export 'onnx'"):
        spec("onnx")


def test_options_have_defaults_and_types(tmp_path):
    received = []

    def exporter(interventions, path, inputs):
        received.append(inputs.options)
        return [path]

    options = (ExportOption("n", 3, "a number"), ExportOption("t", 0.5, "t"), ExportOption("where", None, "a folder"))
    toy = row(exporter=exporter, options=options)
    assert toy.write([], tmp_path / "x") == [tmp_path / "x"]
    toy.write([], tmp_path / "x", ExportInputs(options={"n": 4, "t": 1, "where": "here"}))
    assert received == [{"n": 3, "t": 0.5, "where": None}, {"n": 4, "t": 1, "where": "here"}]
    for wrong in ({"n": 0.5}, {"n": True}, {"t": "warm"}, {"where": 1}, {"other": 1}):
        with pytest.raises(fg.DataError, match="got the option "):
            toy.write([], tmp_path / "x", ExportInputs(options=wrong))
    with pytest.raises(fg.DataError, match="has no options of its own"):
        row(exporter=exporter).write([], tmp_path / "x", ExportInputs(options={"n": 1}))


def test_an_exporter_without_what_it_needs_says_so(tmp_path):
    item = fg.SteeringVector(torch.ones(2), fg.Hookpoint(1)).add(1.0, bos=True)
    with pytest.raises(fg.SteeringError, match="load_model="):
        spec("lm-eval").write([item], tmp_path / "x.pt")
