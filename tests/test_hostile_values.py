"""Values that no option or argument can have: each ends at the door, with one typed error."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer
from typer.models import OptionInfo

import fgsteer as fg
from fgsteer import cli
from tests.helpers import axbench_folder
from tests.helpers.cli import click_group
from tests.helpers.saes import make_sae
from tests.helpers.tiny import D_MODEL

HUGE = str(10**400)
INTEGERS = [
    "nan",
    "inf",
    "-inf",
    str(2**63),
    str(2**70),
    f"-{2**70}",
    HUGE,
    "9" * 5000,
    "-2",
    "",
    "1e3",
    "0x1",
    "\udcff",
    "²",
]
FLOATS = ["nan", "inf", "-inf", HUGE, "9" * 5000, "1e999", "", "\udcff", "1,5"]
RELEASES = {"r": {"model": "m", "repo_id": "me/r", "saes": [{"id": "layer_1", "path": "layer_1"}]}}
COMMAND = click_group()
COMMANDS = COMMAND.commands


class Loaded(fg.FgsteerError):
    """A command came as far as loading a model."""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(required arguments by command that are right, the folder that they write to)."""
    at = tmp_path_factory.mktemp("hostile")
    fg.SteeringVector(torch.ones(D_MODEL), 1).save(at / "v")
    (at / "corpus.txt").write_text("A dog sat.\nA cat lay.\n", encoding="utf-8")
    vector, corpus = str(at / "v"), str(at / "corpus.txt")
    return {
        "audit": ["-r", "m"],
        "axbench": [str(axbench_folder.write(at / "mini")), "-o", str(at / "axbench"), "--sae", "s"],
        "bench": ["-o", str(at / "bench"), "--concept", "sea", "--judge", "keyword", "--sae", "s"],
        "build": ["from_features", "-o", str(at / "b"), "--features", "1", "--sae", "s"],
        "collect": ["sea", "-o", str(at / "s"), "--sae", "s"],
        "demo": [],
        "density": [corpus, "-o", str(at / "d"), "--sae", "s"],
        "describe-contrast": ["is happy", "-o", str(at / "happy.json")],
        "diagnose": ["sea"],
        "effects": ["-o", str(at / "e"), "--sae", "s"],
        "eval": ["--tasks", "x", "-v", vector],
        "examples": [corpus, "-o", str(at / "x"), "--sae", "s"],
        "explain": [vector, "-m", "m"],
        "export": [vector, "--to", "lm-eval", "-o", str(at / "v.pt"), "-m", "m"],
        "features": ["--feature", "1", "--sae", "s"],
        "fold": ["-v", vector, "-o", str(at / "folded")],
        "generate": ["the king", "-v", vector],
        "info": [],
        "lint": ["love"],
        "orthogonalize": ["-v", vector, "-o", str(at / "without")],
        "patterns": ["sea"],
        "play": ["-m", "default"],
        "saes": [],
        "serve": ["m"],
        "sweep": ["sea"],
        "train": ["dialogue", "-o", str(at / "trained"), "--hookpoint", "1"],
        "train-sae": [corpus, "-o", str(at / "sae"), "--hookpoint", "1", "--held-out", "1"],
    }


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line with no model to load: (status, lines of standard error)."""

    def refuse(*_, **__):
        raise Loaded("A model is loaded.")

    monkeypatch.setattr(cli, "app", COMMAND)  # built once
    monkeypatch.setattr(typer.main, "get_command", lambda _: COMMAND)
    for name in ("load_model", "run_tasks"):
        monkeypatch.setattr(fg, name, refuse)
    monkeypatch.setattr(fg, "load_sae", lambda *_, **__: make_sae())
    monkeypatch.setattr("fgsteer.cli.loading.check_fit", lambda *_: None)
    monkeypatch.setattr("fgsteer.cli.eval.find_spec", lambda _: True)
    monkeypatch.setattr("fgsteer.cli.demo.run", refuse)
    monkeypatch.setattr("fgsteer.saes.registry._releases", lambda: RELEASES)
    monkeypatch.setattr("fgsteer.serving.server.need_vllm", refuse)
    monkeypatch.setattr("fgsteer.play.web.need_play", lambda: None)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["fgsteer", *arguments])
        status: Any = 0
        with warnings.catch_warnings():
            try:
                cli.main()
            except SystemExit as end:
                status = end.code or 0
        return status, capsys.readouterr().err.splitlines()

    return call


def options(kind):
    """(command, option, its least and greatest value) of every option of a Python type."""
    found = []
    for name, command in sorted(COMMANDS.items()):
        hints = get_type_hints(command.callback, include_extras=True)
        for parameter in command.params:
            base, *_, info = get_args(hints.get(parameter.name)) or (None, None)
            if isinstance(info, OptionInfo) and kind.__name__ in str(base).replace("pathlib.", ""):
                found.append((name, max(parameter.opts, key=len), info.min, info.max))
    return found


def refused(run, *arguments):
    """What a command says that ends with status 2 and one error."""
    status, lines = run(*arguments)
    assert status == 2, (arguments, lines[-3:])
    errors = [line for line in lines if line.lower().startswith("error: ")]
    assert len(errors) == 1, (arguments, lines[-3:])
    assert lines[-1] is errors[0] or lines[-1] == errors[0]
    return errors[0]


def test_what_is_right_comes_as_far_as_the_model(files, run):
    """Else the tests below would see another error than theirs."""
    assert set(files) == set(COMMANDS)
    for name, arguments in files.items():
        if name in ("build", "info", "lint", "saes"):
            assert run(name, *arguments, "--json")[0] == 0, name
        else:
            assert refused(run, name, *arguments) == "error: A model is loaded.", name


def fine(value, least):
    """Whether a number of the lists above is one that the option may have; a seed has no least value."""
    return value == "-2" and (least is None or least <= -2)


@pytest.mark.parametrize(("command", "option", "least", "most"), options(int))
def test_whole_numbers_of_every_command(files, run, command, option, least, most):
    if option != "--seed":  # whose range a callback checks
        assert least is not None, "an option without a least value"
        assert most is not None, "an option without a greatest value"
    for value in INTEGERS:
        if not fine(value, least):
            assert "A model is loaded" not in refused(run, command, *files[command], f"{option}={value}"), value


@pytest.mark.parametrize(("command", "option"), [found[:2] for found in options(float)])
def test_numbers_of_every_command(files, run, command, option):
    for value in FLOATS:
        assert "A model is loaded" not in refused(run, command, *files[command], f"{option}={value}"), value


TEXTS = [
    "\udcff",
    "a\0b",
    "",
    "9" * 5000,
    "--5",
    "-",
    ".",
    "/dev/null/x",
    "[" * 2000,
    "nan",
    "\u202e",
    "=",
    ",",
    ":",
    "a\nb",
]


@pytest.mark.parametrize(("command", "option"), [found[:2] for found in options(str)])
def test_texts_of_every_command(files, run, command, option):
    """Some of these texts may be what an option takes; none may end in another way than those that are refused."""
    for value in TEXTS:
        status, lines = run(command, *files[command], f"{option}={value}")
        assert status in (0, 2), (value, lines[-3:])
        assert status == 0 or sum(line.lower().startswith("error: ") for line in lines) == 1, (value, lines[-3:])


@pytest.mark.parametrize(
    ("command", "option"), [found[:2] for found in options(Path) if found[1] != "--work" and found[0] != "serve"]
)
def test_paths_of_every_command(files, run, command, option):
    for value in ("x" * 5000, "/dev/null/x"):
        assert "A model is loaded" not in refused(run, command, *files[command], f"{option}={value}"), value


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("collect sea -o {0}/s --sae s --tokens=--5", "--tokens --5"),
        ("collect sea -o {0}/s --sae s --tokens=" + "9" * 5000, "--tokens 999"),
        ("diagnose sea --hookpoint " + "9" * 5000, "hookpoint = '999"),
        ("diagnose sea --hookpoint blocks." + "9" * 5000 + ".hook_resid_post", "hookpoint = 'blocks.999"),
        ("generate hi --dtype int8", "Expected one of float32, bfloat16, float16, float64, got --dtype int8"),
        ("generate hi --dtype complex64", "--dtype complex64"),
        ("generate hi --dtype float8_e4m3fn", "--dtype float8_e4m3fn"),
        ("generate hi --dtype bool", "--dtype bool"),
        ("generate hi --dtype __name__", "--dtype __name__"),
        ("generate hi --device meta", "--device meta, which stores no numbers"),
        ("generate hi --device cuda:-1", "--device cuda:-1"),
        ("generate hi --device \udcff", "--device"),
        ("generate hi --temperature 1e-300", "temperature = 1e-300"),
        ("generate hi --trace t.txt", "Expected a name that ends in .html or .json"),
        ("generate hi --trace t.html --trace-features 1,x", "--trace-features 1,x"),
        ("generate hi --trace-features 1", "--trace-features without --trace"),
        ("generate hi --temperature 1e300", "temperature = 1e+300"),
        ("generate hi --temperature -1", "'--temperature'"),
        ("generate hi --seed " + str(2**70), "'--seed'"),
        ("generate hi --max-new-tokens " + str(10**30), "'--max-new-tokens'"),
        ("generate \udcff", "half a character, '\\udcff' at 0, in prompt 0"),
        ("generate hi --system \udcff", "half a character, '\\udcff' at 6, in prompt 0, message 0"),
        ("features --search \udcff --sae s", "half a character"),
        ("effects -o {0}/e --sae s --top-p 2", "top_p = 2.0"),
        ("effects -o {0}/e --sae s --top-p 0", "top_p = 0.0"),
        ("effects -o {0}/e --sae s --temperature 1e-300", "temperature = 1e-300"),
        ("sweep sea --layer -1", "'--layer'"),
        ("saes --layer -1", "'--layer'"),
        ("build from_features -o {0}/v --sae s --features 1:nan", "nan"),
        ("build from_features -o {0}/v --sae s --features " + "9" * 5000, "--features"),
        ("build fgaa -o {0}/v --set n_positive=" + "9" * 5000, "n_positive"),
        ("build fgaa -o {0}/v --set n_positive=" + "[" * 5000, "n_positive"),
        ("bench -o {0}/b --judge x --judge-url http://a..b", "base_url"),
        ("serve m --layers " + "9" * 5000, "--layers"),
        ("serve m --layers -1", "--layers"),
        ("export {0}/v --to gguf -o /", "Cannot write /"),
        ("sweep sea --neutral {0}/none.txt", "none.txt holds no documents"),
        ("effects -o {0}/e --sae s --prompts {0}/none.txt", "none.txt holds no documents"),
        ("effects -o {0}/e --sae s --texts {0}/none.txt", "none.txt holds no documents"),
    ],
)
def test_values_that_cannot_be(arguments, told, run, tmp_path):
    (tmp_path / "none.txt").write_text("")
    assert told in refused(run, *arguments.format(tmp_path).split(" ")).replace("--judge-url", "base_url")
